"""Attention under `evict_at`, segment by segment: O(S * budget) on any device.

The queries between two events see one fixed set of `budget` past keys and their own causal block. So the tokens up to
the first event are plain causal attention, and each later segment gathers what its event kept. The backward pass
gathers again instead of keeping what was gathered, S * budget / window entries, so its memory is that of dense
attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vkvtrain.lifetimes import Plan
from vkvtrain.logits import LogitForm
from vkvtrain.logits import attend as attend_entries

_GATHERED = 2**20
"""Most elements of gathered keys in one attention call: they stay in a CPU's cache, and memory is bounded."""
_GATHERED_ON_DEVICE = 2**25
"""The same for an accelerator, which needs larger calls."""


def attend(query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, plan: Plan, form: LogitForm) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        plan: the batch's rows and events.
        form: scaling, soft cap and sinks of the attention.
    """
    out: Any = _Segments.apply(query, key, value, form.sinks, evict_at, plan, form)
    return out.transpose(1, 2)


@dataclass(frozen=True)
class _Call:
    """Segments of one attention call: `rows[n]` from token `starts[n]` to `ends[n]`, each padded to `length` tokens."""

    rows: list[int]
    starts: list[int]
    ends: list[int]
    length: int
    held: int
    """Past entries that a query sees beside its segment: `budget`, or 0 before the first event."""


def _calls(plan: Plan, per_call: int) -> Iterator[_Call]:
    """Every token of every row in one call; a call gathers at most about `per_call` entries a head."""
    groups: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for index, row in enumerate(plan.rows):
        starts = [0, *(event.position + 1 for event in row.events)]
        for start, end in zip(starts, [*starts[1:], row.length], strict=True):
            if end > start:
                padded = -(-(end - start) // plan.window) * plan.window if start else end
                groups.setdefault((padded, plan.budget if start else 0), []).append((index, start, end))
    for (length, held), segments in groups.items():
        step = max(1, per_call // (held + length))
        for begin in range(0, len(segments), step):
            rows, starts, ends = zip(*segments[begin : begin + step], strict=True)
            yield _Call(list(rows), list(starts), list(ends), length, held)


class _Places:
    """Where a call's queries and entries lie in [B * H, S] of the whole batch, flattened."""

    def __init__(self, call: _Call, evict_at: Tensor, plan: Plan, q_heads: int) -> None:
        kv_heads, width, device = evict_at.shape[1], plan.width, evict_at.device
        row, start = plan.index(call.rows), plan.index(call.starts)[:, None]
        own = start + torch.arange(call.length, device=device)
        self.real = (own < plan.index(call.ends)[:, None])[:, None, :, None]
        """Bool [N, 1, L, 1]: queries that are tokens of the segment."""
        own = own.clamp(max=width - 1)[:, None].expand(-1, kv_heads, -1)
        entries = torch.cat([_held(evict_at[row], start[:, None], call.held), own], -1) if call.held else own
        heads = torch.arange(kv_heads, device=device)
        self.entries = (row[:, None] * kv_heads + heads)[:, :, None] * width + entries
        heads = torch.arange(q_heads, device=device)
        self.queries = (row[:, None] * q_heads + heads)[:, :, None] * width + own[:, :1]

    def gather(self, source: Tensor, places: Tensor) -> Tensor:
        """[B, H, S, D] -> [N, H, L, D]."""
        return source.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, -1)


def _held(evict_at: Tensor, start: Tensor, count: int) -> Tensor:
    """The `count` positions that each segment sees of the past, ascending, [N, Hkv, count].

    Args:
        evict_at: of the segments' rows, [N, Hkv, S].
        start: first tokens of the segments, [N, 1, 1].
        count: entries that an event leaves.
    """
    position = torch.arange(evict_at.shape[-1], device=evict_at.device)
    alive = (position < start) & (evict_at > start)
    slot = torch.where(alive, alive.cumsum(-1) - 1, count)
    slots = evict_at.new_empty(*slot.shape[:2], count + 1)
    return slots.scatter_(-1, slot, position.expand_as(slot))[..., :count]


def _visible(call: _Call, device: torch.device) -> Tensor:
    """What each query of a segment sees, bool [L, held + L]."""
    return torch.ones(call.length, call.held + call.length, dtype=torch.bool, device=device).tril(call.held)


def _attend_call(query: Tensor, key: Tensor, value: Tensor, call: _Call, form: LogitForm) -> Tensor:
    if not call.held:
        return attend_entries(query, key, value, form, is_causal=True)
    return attend_entries(query, key, value, form, _visible(call, query.device))


class _Segments(torch.autograd.Function):
    """Attention call by call; keeps its inputs for the backward pass and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, evict_at: Tensor, plan: Plan,
        form: LogitForm,
    ) -> Tensor:  # fmt: skip
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        flat = out.view(-1, out.shape[-1])
        for call in _calls(plan, _per_call(key)):
            places = _Places(call, evict_at, plan, query.shape[1])
            part = _attend_call(
                places.gather(query, places.queries), places.gather(key, places.entries),
                places.gather(value, places.entries), call, form,
            )  # fmt: skip
            # what pads a segment lies on other tokens, to which it adds nothing
            flat.index_add_(0, places.queries.flatten(), torch.where(places.real, part, 0.0).flatten(0, 2))
        ctx.save_for_backward(query, key, value, sinks, evict_at)
        ctx.plan, ctx.form = plan, form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, evict_at = ctx.saved_tensors
        plan, form = ctx.plan, ctx.form
        gradient = gradients[0].contiguous()
        totals = [torch.zeros_like(source) for source in (query, key, value)]
        if sinks is not None:
            totals.append(torch.zeros_like(sinks))
        for call in _calls(plan, _per_call(key)):
            places = _Places(call, evict_at, plan, query.shape[1])
            lie = (places.queries, places.entries, places.entries)
            inputs = [
                places.gather(source, where).requires_grad_()
                for source, where in zip((query, key, value), lie, strict=True)
            ]
            if sinks is not None:
                inputs.append(sinks.detach().requires_grad_())
            its_form = LogitForm(form.scaling, form.softcap, inputs[3] if sinks is not None else None)
            with torch.enable_grad():
                part = _attend_call(inputs[0], inputs[1], inputs[2], call, its_form)
            of_part = torch.where(places.real, places.gather(gradient, places.queries), 0.0)
            for total, where, found in zip(
                totals, (*lie, None), torch.autograd.grad(part, inputs, of_part), strict=False
            ):
                if where is None:
                    total += found
                else:
                    total.view(-1, total.shape[-1]).index_add_(0, where.flatten(), found.flatten(0, 2))
        return (*totals, *([None] if sinks is None else []), None, None, None)


def _per_call(key: Tensor) -> int:
    limit = _GATHERED if key.device.type == "cpu" else _GATHERED_ON_DEVICE
    return max(1, limit // (key.shape[1] * key.shape[3]))
