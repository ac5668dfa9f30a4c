"""Attention under `evict_at`, segment by segment: O(S * budget) on any device.

The queries between two events see one fixed set of `budget` past keys and their own causal block. So the tokens up to
the first event are plain causal attention, and each later segment gathers what its event kept. The candidates of an
event are what its segment saw of the past, and its window's queries are the segment's: where a policy scores by window
attention alone, one walk over the events decides and attends from the same logits. The backward pass gathers again
instead of keeping what was gathered, S * budget / window entries, so its memory is that of dense attention.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vkvtrain.attention import products
from vkvtrain.attention.calls import Call, joined, padded, replayed
from vkvtrain.gather import Entries
from vkvtrain.lifetimes import Schedule, Walk
from vkvtrain.logits import LayerInputs, LogitForm, score_dtype
from vkvtrain.logits import attend as attend_entries
from vkvtrain.precision import outside_autocast
from vkvtrain.selection import Selector

_LOGITS = 2**19
"""Logits of one attention call on a CPU, about: they stay in its cache."""
_LOGITS_ON_DEVICE = 2**26
"""The same for an accelerator, which needs larger calls; bounds what is gathered."""
_PRODUCTS = 2**24
"""Most logits of a segment that plain products attend: a later turn of a conversation may be long."""


def attend(inputs: LayerInputs, evict_at: Tensor, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        inputs: query [B, Hq, S, D], key and value [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        schedule: events of the batch's sequences.
    """
    form = inputs.form
    out: Any = _Segments.apply(inputs.query, inputs.key, inputs.value, form.sinks, evict_at, schedule, form, None)
    return out


def can_decide(selector: Selector, device: torch.device) -> bool:
    """Whether `attend_and_decide` is to be had: not for a policy that stops between events to add up attention."""
    return device.type == "cpu" and not selector.needs_mass


def attend_and_decide(inputs: LayerInputs, schedule: Schedule, selector: Selector, layer: int) -> tuple[Tensor, Tensor]:
    """Attention output [B, S, Hq, D] and `evict_at` [B, Hkv, S] from one walk; arguments as for `Walk`."""
    form, chooses = inputs.form, (selector, layer)
    result: Any = _Segments.apply(inputs.query, inputs.key, inputs.value, form.sinks, None, schedule, form, chooses)
    return result


class _Segments(torch.autograd.Function):
    """Attention call by call; keeps its inputs for the backward pass and nothing else.

    autograd tells tensors from other arguments one by one, so the inputs come apart here and go together again. Where
    `evict_at` is given, attention follows it; where a selector and the layer's index are, one walk decides and attends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        evict_at: Tensor | None,
        schedule: Schedule,
        form: LogitForm,
        chooses: tuple[Selector, int] | None,
    ) -> Any:
        inputs = LayerInputs(query, key, value, form)
        layer = _Layer(inputs, schedule)
        out = _by_tokens(query, value.shape[-1], query.dtype)
        if evict_at is not None:
            for call in joined(replayed(evict_at, schedule), layer.segments_per_call):
                layer.forward(call, out)
        elif chooses is not None:
            evict_at = _walk(layer, Walk(inputs, schedule, *chooses), out)
            ctx.mark_non_differentiable(evict_at)
        ctx.save_for_backward(query, key, value, sinks, evict_at)
        ctx.schedule, ctx.form = schedule, form
        out = out.transpose(1, 2)
        return out if chooses is None else (out, evict_at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with outside_autocast(gradients[0].device):  # the caller may be in it
            return _Segments._gradients(ctx, gradients[0].transpose(1, 2))

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of the inputs, given that of the output [B, Hq, S, Dv]."""
        query, key, value, sinks, evict_at = ctx.saved_tensors
        layer = _Layer(LayerInputs(query, key, value, ctx.form), ctx.schedule)
        dtype = score_dtype(key.dtype)
        # a query is in one segment, but a key is added to by every segment that sees it: summed in score_dtype
        totals = [
            _by_tokens(query, query.shape[-1], query.dtype),
            _by_tokens(key, key.shape[-1], dtype),
            _by_tokens(value, value.shape[-1], dtype),
        ]
        total_sinks = None if sinks is None else torch.zeros_like(sinks)
        for call in joined(replayed(evict_at, ctx.schedule), layer.segments_per_call):
            grad_sinks = layer.backward(call, upstream, totals)
            if total_sinks is not None and grad_sinks is not None:
                total_sinks += grad_sinks
        return (*(total.to(key.dtype) for total in totals), total_sinks, None, None, None, None)


def _walk(layer: "_Layer", walk: Walk, out: Tensor) -> Tensor:
    """Walk the events, attending on the way; `evict_at`."""
    schedule = walk.schedule
    for stop in walk.stops():
        # what the last event kept is what all queries since then see of the past: chronological, so it comes first
        past = stop.positions[..., : schedule.budget] if stop.has_evicted else None
        ends = [block.end for block in stop.blocks]
        call = Call(stop.rows, stop.starts, ends, ends[0] - stop.starts[0], past)
        # then the segment's queries are the window's and its past are the candidates: its own logits give the scores
        is_window = past is not None and call.length == schedule.window and layer.takes_products(call)
        walk.reach(stop, layer.forward(call, out, is_window and walk.selector.only_window_attention))
    # tokens after a row's last event are in no stop; rows end at different lengths, so they are padded to share calls
    tails: dict[tuple[int, bool], list[int]] = {}
    for row, sequence in enumerate(schedule.sequences):
        start = walk.starts[row] or 0
        if start < sequence.length:
            tails.setdefault((padded(start, sequence.length, schedule.window), start > 0), []).append(row)
    for (length, has_evicted), rows in tails.items():
        past = walk.held[schedule.index(rows)] if has_evicted else None
        starts, ends = [walk.starts[row] or 0 for row in rows], [schedule.sequences[row].length for row in rows]
        layer.forward(Call(rows, starts, ends, length, past), out)
    return walk.evict_at


def _by_tokens(like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Zeros [B, H, S, dim] whose tokens lie together in memory, as a model's projections want them."""
    rows, heads, width, _ = like.shape
    return like.new_zeros(rows, width, heads, dim, dtype=dtype).transpose(1, 2)


class _Layer:
    """One layer's attention, call by call: gathers what a call sees, and puts what comes out where it belongs."""

    def __init__(self, inputs: LayerInputs, schedule: Schedule) -> None:
        self.query, self.key, self.value = Entries(inputs.query), Entries(inputs.key), Entries(inputs.value)
        self.schedule, self.form, self.device = schedule, inputs.form, inputs.query.device

    def _logits(self, call: Call) -> int:
        """Logits of one of the call's segments."""
        return self.query.heads * call.length * (call.length + (0 if call.past is None else self.schedule.budget))

    def segments_per_call(self, call: Call) -> int:
        limit = _LOGITS if self.device.type == "cpu" else _LOGITS_ON_DEVICE
        return max(1, limit // self._logits(call))

    def takes_products(self, call: Call) -> bool:
        """Whether a call is computed by plain matrix products, else by a fused kernel."""
        return self.device.type == "cpu" and call.past is not None and self._logits(call) <= _PRODUCTS

    def forward(self, call: Call, out: Tensor, scores: bool = False) -> Tensor | None:
        """Write the output of a call into `out` [B, Hq, S, Dv].

        Returns:
            If `scores`: the window attention to the past, [N, Hkv, budget]. For calls that take products.
        """
        attention, to = [], Entries(out)
        for piece in call.split(self.segments_per_call(call)):
            rows, queries, entries, real = self._places(piece)
            inputs = self._gather(rows, queries, entries)
            if self.takes_products(piece):
                segment = products.segment(inputs)
                result = products.output(segment)
                if scores:
                    attention.append(products.window_attention(segment, self.key.heads, self.schedule.budget))
            else:
                result = self._fused(piece, inputs)
            _add(to, rows, queries, result, real)
        return torch.cat(attention) if attention else None

    def backward(self, call: Call, upstream: Tensor, totals: list[Tensor]) -> Tensor | None:
        """Add a call's gradients to those of query, key and value, given that of the output [B, Hq, S, Dv].

        Returns:
            The gradient of the sinks, if there are any.
        """
        rows, queries, entries, real = self._places(call)
        inputs = self._gather(rows, queries, entries)
        gradient = Entries(upstream).gather(rows, queries)
        if real is not None:
            gradient = torch.where(real, gradient, 0.0)
        if self.takes_products(call):
            *gradients, grad_sinks = products.gradients(products.segment(inputs), gradient, self.form)
        else:
            leaves = [inputs.query, inputs.key, inputs.value]
            if self.form.sinks is not None:
                leaves.append(self.form.sinks.detach())
            query, key, value, *sinks = (leaf.requires_grad_() for leaf in leaves)
            form = replace(self.form, sinks=sinks[0] if sinks else None)
            with torch.enable_grad():
                out = self._fused(call, LayerInputs(query, key, value, form))
            gradients = list(torch.autograd.grad(out, leaves, gradient))
            grad_sinks = gradients.pop() if sinks else None
        for total, positions, gradient in zip(totals, (queries, entries, entries), gradients, strict=True):
            _add(Entries(total), rows, positions, gradient, None)
        return grad_sinks

    def _gather(self, rows: Tensor, queries: Tensor, entries: Tensor) -> LayerInputs:
        """Queries [N, Hq, L, D] and entries [N, Hkv, n, D] of rows [N], by positions."""
        query, key = self.query.gather(rows, queries), self.key.gather(rows, entries)
        return LayerInputs(query, key, self.value.gather(rows, entries), self.form)

    def _places(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rows [N], positions of queries [N, Hq, L] and entries [N, Hkv, budget + L], and which queries are tokens of
        their segment, bool [N, 1, L, 1]; None: all. What pads a segment lies on other tokens."""
        rows, start = self.schedule.index(call.rows), self.schedule.index(call.starts)[:, None]
        tokens = start + torch.arange(call.length, device=self.device)
        real = None
        if not call.is_full:
            real = (tokens < self.schedule.index(call.ends)[:, None])[:, None, :, None]
            tokens = tokens.clamp(max=self.schedule.width - 1)
        tokens = tokens[:, None]
        entries = tokens.expand(-1, self.key.heads, -1)
        if call.past is not None:
            entries = torch.cat([call.past, entries], -1)
        return rows, tokens.expand(-1, self.query.heads, -1), entries, real

    def _fused(self, call: Call, inputs: LayerInputs) -> Tensor:
        if call.past is None:
            return attend_entries(inputs, is_causal=True)
        visible = torch.ones(call.length, self.schedule.budget + call.length, dtype=torch.bool, device=self.device)
        return attend_entries(inputs, visible.tril(self.schedule.budget))


def _add(to: Entries, rows: Tensor, positions: Tensor, values: Tensor, real: Tensor | None) -> None:
    if real is not None:
        values = torch.where(real, values, 0.0)
    to.flat.index_add_(0, to.places(rows, positions).flatten(), values.to(to.flat.dtype).flatten(0, 2))
