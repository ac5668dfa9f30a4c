"""Training: from a layer's queries, keys and values to `evict_at`, the whole sequence's eviction in one integer a key.

`evict_at[b, h, j]` is the first query position that no longer sees key `j`; a key that is never dropped has S + 1,
padding has 0. The events are walked in order, in parallel over rows and heads, with the same selection code that
decoding uses. Knows nothing of attention outputs: a layer's choice depends only on its own q, k, v.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vkvtrain.config import EvictionConfig
from vkvtrain.events import Block, Chunks, Event, blocks, normalise_chunks
from vkvtrain.logits import LogitForm, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource, Stream, stream_key
from vkvtrain.policies import Candidates
from vkvtrain.selection import Selector


@dataclass(frozen=True)
class Row:
    """One right-padded sequence: its length, first prompt, blocks of `window` entries and Philox key."""

    length: int
    prompt: int
    blocks: list[Block]
    key: tuple[int, int]

    @property
    def events(self) -> list[Event]:
        return [block.event for block in self.blocks if block.event is not None]


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
        return replace(self, rows=[replace(row, blocks=[]) for row in self.rows])

    def on(self, device: torch.device) -> "Plan":
        """The same batch on another device."""
        return replace(self, device=device, _index={})

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
        found = []
        if config.evicts:
            assert config.budget is not None
            found = blocks(chunks, length, config.budget, config.window)
        rows.append(Row(length, chunks[0][1], found, stream_key(config.seed, stream)))
    return Plan(rows, width, config.budget or 0, config.window, device)


def never_evicted(plan: Plan, kv_heads: int) -> Tensor:
    """`evict_at` of a layer that keeps everything, int64 [B, Hkv, S]."""
    real = torch.arange(plan.width, device=plan.device) < plan.lengths[:, None]
    return (real[:, None] * (plan.width + 1)).expand(-1, kv_heads, -1).clone()


@torch.no_grad()
def lifetimes(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, selector: Selector, layer: int, form: LogitForm
) -> Tensor:
    """`evict_at`, int64 [B, Hkv, S].

    Args:
        query: [B, Hq, S, D], after RoPE.
        key, value: [B, Hkv, S, D].
        plan: the batch's rows and events.
        selector: chooses what survives.
        layer: index of the layer, for the noise.
        form: scaling, soft cap and sinks of the attention.
    """
    walk = _Walk(query, key, value, plan, selector, layer, form)
    stops = [[block for block in row.blocks if selector.needs_mass or block.event is not None] for row in plan.rows]
    for number in range(max(map(len, stops), default=0)):
        groups: dict[tuple[int, bool], list[int]] = {}
        for index, row in enumerate(stops):
            if number < len(row):
                groups.setdefault((row[number].live, row[number].event is not None), []).append(index)
        for indices in groups.values():
            walk.stop(indices, [stops[index][number] for index in indices])
    return walk.evict_at


class _Walk:
    """One layer's events, in order, over rows that may be at different events."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, selector: Selector, layer: int, form: LogitForm
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.plan, self.selector, self.layer, self.form = plan, selector, layer, form
        self.dtype = score_dtype(key.dtype)
        rows, heads, width, _ = key.shape
        self.kv_head = torch.arange(heads, device=key.device)[None, :, None]
        self.q_head = torch.arange(query.shape[1], device=key.device)[None, :, None]
        self.evict_at = never_evicted(plan, heads)
        self.held = self.evict_at.new_zeros(rows, heads, plan.budget)
        """Positions that each row holds after its last event."""
        self.evicted = [False] * rows
        self.mass = key.new_zeros(rows, heads, width if selector.needs_mass else 0, dtype=self.dtype)
        """Accumulated attention of each entry held, by slot."""

    def stop(self, indices: list[int], reached: list[Block]) -> None:
        """Rows that hold equally many entries at the end of a block: accumulate attention, and evict if it is due."""
        plan, selector, window = self.plan, self.selector, self.plan.window
        live = reached[0].live
        rows = plan.index(indices)
        end = plan.index([block.end for block in reached])
        positions = self._positions(indices, rows, end, live)
        row = rows[:, None, None]
        queries = None
        if selector.needs_queries or selector.needs_mass:
            newest = torch.arange(-window, 0, device=self.key.device)
            queries = self.query[row, self.q_head, (end[:, None] + newest)[:, None]].to(self.dtype)
        if selector.needs_mass:
            assert queries is not None
            keys = self.key[row, self.kv_head, positions].to(self.dtype)
            self.mass[rows, :, :live] += attention_mass(queries, keys, self.form)
        events = [block.event for block in reached if block.event is not None]
        if events:
            self._evict(indices, rows, end, positions, queries, [event.index for event in events])

    def _positions(self, indices: list[int], rows: Tensor, end: Tensor, live: int) -> Tensor:
        """Positions held, chronological, [N, Hkv, live]: what the last event kept, and all tokens since."""
        heads = self.key.shape[1]
        parts = []
        for is_later in (False, True):
            members = [place for place, index in enumerate(indices) if self.evicted[index] == is_later]
            if not members:
                continue
            if not is_later:
                found = torch.arange(live, device=self.key.device).expand(len(members), heads, -1)
            else:
                place = self.plan.index(members)
                fresh = torch.arange(self.plan.budget - live, 0, device=self.key.device) + end[place][:, None]
                found = torch.cat([self.held[rows[place]], fresh[:, None].expand(-1, heads, -1)], dim=-1)
            parts.append((members, found))
        if len(parts) == 1:
            return parts[0][1]
        order = self.plan.index([place for members, _ in parts for place in members])
        return torch.cat([found for _, found in parts])[order.argsort()]

    def _evict(
        self, indices: list[int], rows: Tensor, end: Tensor, positions: Tensor, queries: Tensor | None,
        events: list[int],
    ) -> None:  # fmt: skip
        plan, selector, count = self.plan, self.selector, positions.shape[-1] - self.plan.window
        row, considered = rows[:, None, None], positions[:, :, :count]
        philox = [plan.index([plan.rows[i].key[word] for i in indices]) for word in (0, 1)]

        def entries(source: Tensor, wanted: Tensor) -> Tensor:
            return source[row, self.kv_head, wanted].to(self.dtype)

        candidates = Candidates(
            positions=considered,
            queries=queries if selector.needs_queries else None,
            keys=entries(self.key, considered) if selector.needs_keys else None,
            values=entries(self.value, considered) if selector.needs_values else None,
            scaling=self.form.scaling,
            noise=NoiseSource((philox[0], philox[1]), plan.index(events), self.layer),
            window_keys=entries(self.key, positions[:, :, count:]) if selector.needs_window_keys else None,
            mass=self.mass[rows, :, :count] if selector.needs_mass else None,
            softcap=self.form.softcap,
        )
        slots = selector(candidates, [plan.rows[i].prompt for i in indices])
        kept = considered.gather(-1, slots)
        self.evict_at[row, self.kv_head, considered] = end[:, None, None].expand_as(considered)
        self.evict_at[row, self.kv_head, kept] = plan.width + 1
        self.held[rows] = torch.cat([kept, positions[:, :, count:]], dim=-1)
        if selector.needs_mass:
            mass = self.mass[rows, :, : positions.shape[-1]]
            self.mass[rows] = 0
            self.mass[rows, :, : plan.budget] = torch.cat([mass.gather(-1, slots), mass[:, :, count:]], dim=-1)
        for index in indices:
            self.evicted[index] = True
