"""Training: from a layer's queries, keys and values to `evict_at`, the whole sequence's eviction in one integer a key.

`evict_at[b, h, j]` is the first query position that no longer sees key `j`; a key that is never dropped has S + 1,
padding has 0. The events are walked in order, in parallel over rows and heads, with the same selection code that
decoding uses. Knows nothing of attention outputs: a layer's choice depends only on its own q, k, v.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vkvtrain.cache import score_dtype
from vkvtrain.config import EvictionConfig
from vkvtrain.events import Chunks, Event, normalise_chunks, schedule
from vkvtrain.noise import NoiseSource, Stream, stream_key
from vkvtrain.policies import Candidates
from vkvtrain.selection import Selector


@dataclass(frozen=True)
class Row:
    """One right-padded sequence: its length, first prompt, events and Philox key."""

    length: int
    prompt: int
    events: list[Event]
    key: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is known of a batch before any layer runs: rows, width and device. Integers only, but for `index`."""

    rows: list[Row]
    width: int
    budget: int
    window: int
    device: torch.device
    _index: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    def index(self, values: Sequence[int]) -> Tensor:
        """Python ints as an int64 tensor on the device; every layer asks for the same ones, which are copied once."""
        wanted = tuple(values)
        if wanted not in self._index:
            self._index[wanted] = torch.tensor(wanted, dtype=torch.int64, device=self.device)
        return self._index[wanted]

    def without_events(self) -> "Plan":
        """The same batch for a layer that keeps everything."""
        return replace(self, rows=[replace(row, events=[]) for row in self.rows])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [B]."""
        return self.index([row.length for row in self.rows])


def make_plan(
    config: EvictionConfig,
    prompts: Sequence[int | Chunks],
    streams: Sequence[Stream],
    lengths: Sequence[int],
    width: int,
    device: torch.device,
) -> Plan:
    """The plan of a batch.

    Args:
        config: the eviction setting.
        prompts: of each row its prompt length, or the chunks that decoding would append without eviction.
        streams: names each row's randomness.
        lengths: tokens of each row, padding excluded.
        width: columns of the batch, S.
        device: where the batch is.
    """
    rows = []
    for prompt, stream, length in zip(prompts, streams, lengths, strict=True):
        chunks = normalise_chunks(prompt, length)
        events = []
        if config.evicts:
            assert config.budget is not None
            events = schedule(chunks, length, config.budget, config.window)
        rows.append(Row(length, chunks[0][1], events, stream_key(config.seed, stream)))
    return Plan(rows, width, config.budget or 0, config.window, device)


def never_evicted(plan: Plan, kv_heads: int) -> Tensor:
    """`evict_at` of a layer that keeps everything, int64 [B, Hkv, S]."""
    real = torch.arange(plan.width, device=plan.device) < plan.lengths[:, None]
    return (real[:, None] * (plan.width + 1)).expand(-1, kv_heads, -1).clone()


@torch.no_grad()
def lifetimes(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, selector: Selector, layer: int, scaling: float
) -> Tensor:
    """`evict_at`, int64 [B, Hkv, S].

    Args:
        query: [B, Hq, S, D], after RoPE.
        key, value: [B, Hkv, S, D].
        plan: the batch's rows and events.
        selector: chooses what survives.
        layer: index of the layer, for the noise.
        scaling: factor of the attention logits.
    """
    heads, budget, window, dtype = key.shape[1], plan.budget, plan.window, score_dtype(key.dtype)
    kv_head = torch.arange(heads, device=key.device)[None, :, None]
    q_head = torch.arange(query.shape[1], device=key.device)[None, :, None]
    offsets = torch.arange(window, device=key.device)
    evict_at = never_evicted(plan, heads)
    held = evict_at.new_zeros(len(plan.rows), heads, budget)  # positions that each row holds after its last event

    for number in range(max((len(row.events) for row in plan.rows), default=0)):
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(plan.rows):
            if number < len(row.events):
                groups.setdefault(row.events[number].live, []).append(index)
        for live, indices in groups.items():
            rows = plan.index(indices)
            at = plan.index([plan.rows[i].events[number].position for i in indices])
            count = live - window
            if number == 0:
                positions = torch.arange(live, device=key.device).expand(len(indices), heads, -1)
            else:
                fresh = torch.arange(budget - live + 1, 1, device=key.device) + at[:, None]
                positions = torch.cat([held[rows], fresh[:, None].expand(-1, heads, -1)], dim=-1)
            considered = positions[:, :, :count]
            row = rows[:, None, None]
            queries = None
            if selector.needs_queries:
                queries = query[row, q_head, (at[:, None] - (window - 1) + offsets)[:, None]].to(dtype)
            philox = [plan.index([plan.rows[i].key[word] for i in indices]) for word in (0, 1)]
            candidates = Candidates(
                positions=considered,
                queries=queries,
                keys=key[row, kv_head, considered].to(dtype) if selector.needs_keys else None,
                values=value[row, kv_head, considered].to(dtype) if selector.needs_values else None,
                scaling=scaling,
                noise=NoiseSource((philox[0], philox[1]), torch.full_like(rows, number), layer),
            )
            slots = selector(candidates, [plan.rows[i].prompt for i in indices])
            kept = considered.gather(-1, slots)
            evict_at[row, kv_head, considered] = (at + 1)[:, None, None].expand_as(considered)
            evict_at[row, kv_head, kept] = plan.width + 1
            held[rows] = torch.cat([kept, positions[:, :, count:]], dim=-1)
    return evict_at
