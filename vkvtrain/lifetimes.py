"""Training: from a layer's queries, keys and values to `evict_at`, the whole sequence's eviction in one integer a key.

`evict_at[b, h, j]` is the first query position that no longer sees key `j`; a key that is never dropped has S + 1,
padding has 0. The events are walked in order, in parallel over rows and heads, with the same selection code that
decoding uses. Knows nothing of attention outputs: a layer's choice depends only on its own q, k, v. Where it depends
not even on them, `vkvtrain.foresight` decides all layers at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vkvtrain.config import EvictionConfig
from vkvtrain.events import Block, Chunks, Event, blocks, normalise_chunks
from vkvtrain.gather import Entries
from vkvtrain.logits import LayerInputs, LogitForm, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource, Stream, stream_key
from vkvtrain.policies import Candidates, value_size
from vkvtrain.selection import Selector


@dataclass(frozen=True)
class SequenceSchedule:
    """One right-padded sequence: its length, first prompt, blocks of `window` entries and Philox key words."""

    length: int
    prompt: int
    blocks: list[Block]
    key: tuple[int, int]

    @property
    def events(self) -> list[Event]:
        return [block.event for block in self.blocks if block.event is not None]


@dataclass(frozen=True)
class Schedule:
    """A batch's schedule of events, known before any layer runs. Integers only, but for `index`."""

    sequences: list[SequenceSchedule]
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

    def without_events(self) -> "Schedule":
        """The same batch for a layer that keeps everything."""
        return replace(self, sequences=[replace(sequence, blocks=[]) for sequence in self.sequences])

    def on(self, device: torch.device) -> "Schedule":
        """The same batch on another device."""
        return replace(self, device=device, _index={})

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [B]."""
        return self.index([sequence.length for sequence in self.sequences])


def make_schedule(
    config: EvictionConfig,
    prompts: Sequence[int | Chunks],
    streams: Sequence[Stream],
    lengths: Sequence[int],
    width: int,
    device: torch.device,
) -> Schedule:
    """The schedule of a batch's events.

    Args:
        config: the eviction setting.
        prompts: of each row its prompt length, or the chunks that decoding would append without eviction.
        streams: names each row's randomness.
        lengths: tokens of each row, padding excluded.
        width: columns of the batch, S.
        device: where the batch is.
    """
    sequences = []
    for prompt, stream, length in zip(prompts, streams, lengths, strict=True):
        chunks = normalise_chunks(prompt, length)
        filled: list[Block] = []
        if config.evicts and config.budget is not None:
            filled = blocks(chunks, length, config.budget, config.window)
        sequences.append(SequenceSchedule(length, chunks[0][1], filled, stream_key(config.seed, stream)))
    return Schedule(sequences, width, config.budget or 0, config.window, device)


def never_evicted(schedule: Schedule, kv_heads: int) -> Tensor:
    """`evict_at` of a layer that keeps everything, int64 [B, Hkv, S]."""
    # S + 1 and not S: an event after the last token sets S, and what it drops is no longer held at the end
    real = torch.arange(schedule.width, device=schedule.device) < schedule.lengths[:, None]
    return (real[:, None] * (schedule.width + 1)).expand(-1, kv_heads, -1).clone()


@torch.no_grad()
def lifetimes(
    query: Tensor, key: Tensor, value: Tensor, schedule: Schedule, selector: Selector, layer: int, form: LogitForm
) -> Tensor:
    """`evict_at`, int64 [B, Hkv, S].

    Args:
        query: [B, Hq, S, D], after RoPE.
        key, value: [B, Hkv, S, D].
        schedule: events of the batch's sequences.
        selector: chooses what survives.
        layer: index of the layer, for the noise.
        form: scaling, soft cap and sinks of the attention.
    """
    return walked(Walk(LayerInputs(query, key, value, form), schedule, selector, layer))


def walked(walk: "Walk") -> Tensor:
    """`evict_at` after all events of a walk, int64 [B, Hkv, S]."""
    for stop in walk.stops():
        walk.reach(stop)
    return walk.evict_at


@dataclass(frozen=True)
class Stop:
    """Where a walk stops: rows that hold equally many entries at the end of a block, all due for an event or none."""

    rows: list[int]
    blocks: list[Block]
    starts: list[int]
    """Of each row its first token since its last event."""
    positions: Tensor
    """Positions held, chronological, int64 [N, Hkv, live]: what the last event kept, and all tokens since."""
    has_evicted: bool
    """Whether these rows had an event before."""


class Walk:
    """One layer's events, in order, over rows that may be at different events; or those of several layers, as rows.

    Args:
        inputs: the layer's query [B, Hq, S, D], key and value [B, Hkv, S, D].
        schedule: events of the batch's sequences.
        selector: chooses what survives.
        layer: index of the layer, or of each row's layer, for the noise.
    """

    def __init__(self, inputs: LayerInputs, schedule: Schedule, selector: Selector, layer: int | Sequence[int]) -> None:
        self.schedule, self.selector, self.form = schedule, selector, inputs.form
        self.layers = [layer] * len(schedule.sequences) if isinstance(layer, int) else layer
        """Of each row the layer, for its noise."""
        key, value = inputs.key, inputs.value
        self.dtype = score_dtype(key.dtype)
        rows, heads, width, _ = key.shape
        self.query, self.key, self.value = Entries(inputs.query), Entries(key), Entries(value)
        self.value_sizes = {measure: value_size(value, measure, self.dtype) for measure in selector.measures}
        self.evict_at = never_evicted(schedule, heads)
        self._until = Entries(self.evict_at[..., None])
        """The same by entry, to write to."""
        self.held = self.evict_at.new_zeros(rows, heads, schedule.budget)
        """Positions that each row holds after its last event."""
        self.starts: list[int | None] = [None] * rows
        """Of each row its first token since its last event, if it had one."""
        self.mass = key.new_zeros(rows, heads, width if selector.needs_mass else 0, dtype=self.dtype)
        """Accumulated attention of each entry held, by slot."""

    def stops(self) -> Iterator[Stop]:
        """Where the rows evict (and, for a policy that accumulates attention, where their blocks end), in order.

        Every stop must be reached before the next one is asked for: a stop's positions are what the row's event before
        it kept.
        """
        every_block = self.selector.needs_mass
        stops = [
            [block for block in sequence.blocks if every_block or block.event is not None]
            for sequence in self.schedule.sequences
        ]
        for number in range(max(map(len, stops), default=0)):
            groups: dict[tuple[int, bool, bool], list[int]] = {}
            for row, blocks_of_row in enumerate(stops):
                if number < len(blocks_of_row):
                    block, has_evicted = blocks_of_row[number], self.starts[row] is not None
                    groups.setdefault((block.live, block.event is not None, has_evicted), []).append(row)
            for (live, _, has_evicted), rows in groups.items():
                ends = [stops[row][number] for row in rows]
                starts = [self.starts[row] or 0 for row in rows]
                yield Stop(rows, ends, starts, self._positions(rows, ends, live, has_evicted), has_evicted)

    def _positions(self, rows: list[int], blocks: list[Block], live: int, has_evicted: bool) -> Tensor:
        heads, device = self.evict_at.shape[1], self.evict_at.device
        if not has_evicted:
            return torch.arange(live, device=device).expand(len(rows), heads, -1)
        end = self.schedule.index([block.end for block in blocks])[:, None, None]
        fresh = torch.arange(self.schedule.budget - live, 0, device=device) + end
        return torch.cat([self.held[self.schedule.index(rows)], fresh.expand(-1, heads, -1)], dim=-1)

    def reach(self, stop: Stop, attention: Tensor | None = None) -> None:
        """Accumulate attention, and evict if it is due.

        Args:
            stop: the next one of `stops`.
            attention: of the window to each candidate, [N, Hkv, C], where it is known already; see `Candidates`.
        """
        selector, window = self.selector, self.schedule.window
        rows, end = self.schedule.index(stop.rows), self.schedule.index([block.end for block in stop.blocks])
        queries = None
        if attention is None and (selector.needs_queries or selector.needs_mass):
            newest = torch.arange(-window, 0, device=rows.device) + end[:, None, None]
            queries = self.query.gather(rows, newest.expand(-1, self.query.heads, -1)).to(self.dtype)
        if selector.needs_mass and queries is not None:
            keys = self.key.gather(rows, stop.positions).to(self.dtype)
            self.mass[rows, :, : keys.shape[2]] += attention_mass(queries, keys, self.form)
        events = [block.event.index for block in stop.blocks if block.event is not None]
        if events:
            candidates = self._candidates(stop, events, queries, attention)
            slots = selector(candidates, [self.schedule.sequences[row].prompt for row in stop.rows])
            self._evict(stop, rows, end, slots)

    def _candidates(
        self, stop: Stop, events: list[int], queries: Tensor | None, attention: Tensor | None
    ) -> Candidates:
        """What decoding gives the policy at the same event: the entries older than the window."""
        schedule, policy = self.schedule, self.selector.policy
        rows, count = schedule.index(stop.rows), stop.positions.shape[-1] - schedule.window
        considered, window = stop.positions[:, :, :count], stop.positions[:, :, count:]
        low, high = (schedule.index([schedule.sequences[row].key[word] for row in stop.rows]) for word in (0, 1))
        layers = schedule.index([self.layers[row] for row in stop.rows])

        def entries(source: Entries, positions: Tensor, wanted: bool) -> Tensor | None:
            return source.gather(rows, positions).to(self.dtype) if wanted else None

        return Candidates(
            positions=considered,
            queries=queries if policy.needs_queries else None,
            keys=entries(self.key, considered, policy.needs_keys and attention is None),
            values=entries(self.value, considered, policy.needs_values),
            scaling=self.form.scaling,
            noise=NoiseSource((low, high), schedule.index(events), layers),
            window_keys=entries(self.key, window, policy.needs_window_keys),
            mass=self.mass[rows, :, :count] if policy.needs_mass else None,
            softcap=self.form.softcap,
            attention=attention,
            value_sizes={name: sizes[rows].gather(-1, considered) for name, sizes in self.value_sizes.items()},
            policy=self.selector.config.policy,
        )

    def _evict(self, stop: Stop, rows: Tensor, end: Tensor, slots: Tensor) -> None:
        """Write the lifetimes of an event's candidates, of which those in `slots` [N, Hkv, K] are kept."""
        count = stop.positions.shape[-1] - self.schedule.window
        considered, window = stop.positions[:, :, :count], stop.positions[:, :, count:]
        kept = considered.gather(-1, slots)
        # first all candidates end here, then the kept ones live on: two writes of known shapes, where naming the
        # victims would ask the device how many there are
        until = self._until.flat[:, 0]
        ends = end[:, None, None].expand_as(considered)
        until.scatter_(0, self._until.places(rows, considered).flatten(), ends.flatten())
        until.index_fill_(0, self._until.places(rows, kept).flatten(), self.schedule.width + 1)
        self.held[rows] = torch.cat([kept, window], dim=-1)
        if self.selector.needs_mass:
            mass = self.mass[rows, :, : stop.positions.shape[-1]]
            self.mass[rows] = 0
            self.mass[rows, :, : self.schedule.budget] = torch.cat([mass.gather(-1, slots), mass[:, :, count:]], dim=-1)
        for row, block in zip(stop.rows, stop.blocks, strict=True):
            self.starts[row] = block.end
