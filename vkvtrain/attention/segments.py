"""Attention under `evict_at`, segment by segment: O(S * budget) on any device.

The queries between two events see one fixed set of `budget` past keys and their own causal block. So the tokens up to
the first event are plain causal attention, and each later segment gathers what its event kept.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vkvtrain.lifetimes import Plan
from vkvtrain.logits import LogitForm
from vkvtrain.logits import attend as attend_entries

_GATHERED = 2**25
"""Most elements of gathered keys in one attention call: bounds the memory of a call, not its result."""


def attend(query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, plan: Plan, form: LogitForm) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        plan: the batch's rows and events.
        form: scaling, soft cap and sinks of the attention.
    """
    first = [row.events[0].position + 1 if row.events else row.length for row in plan.rows]
    longest = max(first)
    prefix = attend_entries(query[:, :, :longest], key[:, :, :longest], value[:, :, :longest], form, is_causal=True)
    parts = [_tokens(prefix), _tokens(query.new_zeros(1, query.shape[1], 1, value.shape[-1]))]
    zero = len(plan.rows) * longest
    # where each token's output lies in the concatenation of the parts
    where = [[zero] * plan.width for _ in plan.rows]
    for row, length in enumerate(first):
        where[row][:length] = range(row * longest, row * longest + length)
    offset = zero + 1
    per_call = max(1, _GATHERED // (key.shape[1] * key.shape[3]))
    for length, group in _segments(plan, per_call):
        out = _attend_segments(query, key, value, evict_at, plan, form, length, group)
        parts.append(_tokens(out))
        for index, (row, start, end) in enumerate(group):
            where[row][start:end] = range(offset + index * length, offset + index * length + end - start)
        offset += len(group) * length
    order = plan.index([index for row in where for index in row])
    return torch.cat(parts).index_select(0, order).view(len(plan.rows), plan.width, query.shape[1], -1)


Segment = tuple[int, int, int]
"""(row, first token, one past the last token)."""


def _segments(plan: Plan, per_call: int) -> Iterator[tuple[int, list[Segment]]]:
    """(padded length, segments) of every attention call; a call gathers at most about `per_call` entries a head."""
    groups: dict[int, list[Segment]] = {}
    for index, row in enumerate(plan.rows):
        starts = [event.position + 1 for event in row.events]
        for start, end in zip(starts, [*starts[1:], row.length], strict=True) if starts else ():
            if end > start:
                padded = -(-(end - start) // plan.window) * plan.window
                groups.setdefault(padded, []).append((index, start, end))
    for length, segments in groups.items():
        step = max(1, per_call // (plan.budget + length))
        for begin in range(0, len(segments), step):
            yield length, segments[begin : begin + step]


def _attend_segments(
    query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, plan: Plan, form: LogitForm,
    length: int, segments: Sequence[Segment],
) -> Tensor:  # fmt: skip
    """Attention output [N, Hq, length, D] of N segments; what lies past a segment's end is to be ignored."""
    row = plan.index([segment[0] for segment in segments])[:, None, None]
    start = plan.index([segment[1] for segment in segments])
    kv_head = torch.arange(key.shape[1], device=key.device)[None, :, None]
    q_head = torch.arange(query.shape[1], device=key.device)[None, :, None]
    position = torch.arange(plan.width, device=key.device)
    alive = (position < start[:, None, None]) & (evict_at[row[:, 0, 0]] > start[:, None, None])
    held = torch.where(alive, position, plan.width).topk(plan.budget, largest=False, sorted=True).values
    own = (start[:, None] + torch.arange(length, device=key.device)).clamp(max=plan.width - 1)[:, None]
    entries = torch.cat([held, own.expand(-1, key.shape[1], -1)], dim=-1)
    visible = torch.ones(length, plan.budget + length, dtype=torch.bool, device=key.device).tril(plan.budget)
    return attend_entries(
        query[row, q_head, own], key[row, kv_head, entries], value[row, kv_head, entries], form, visible
    )


def _tokens(out: Tensor) -> Tensor:
    """[N, Hq, L, D] -> [N * L, Hq, D]."""
    return out.transpose(1, 2).flatten(0, 1)
