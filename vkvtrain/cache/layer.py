"""A layer that evicts (or, without a selector, keeps everything).

One event, `_evict_rows`, is four steps: gather, score, select, store back; `docs/how-it-works.md` follows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.step import Counters, Step
from vkvtrain.cache.storage import EntryStorage
from vkvtrain.logits import LayerInputs, attend, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource
from vkvtrain.policies import Candidates, value_size
from vkvtrain.selection import Selector

_BYTES = 2**22
"""Bytes of keys and values that an event gathers at once on a CPU, about: they stay in its cache."""
_BYTES_ON_DEVICE = 2**29
"""The same for an accelerator, where fewer and larger kernels are faster; bounds what an event allocates."""
_GROWTH = 256
"""Entries by which the storage of a layer that keeps everything grows."""


class EvictionLayer(RowLayer):
    """One layer's entries: storage [rows, Hkv, capacity, D], each row's entries in the first `live` slots, in order."""

    def __init__(self, shared: Shared, index: int, evicts: bool) -> None:
        self.selector = shared.selector if evicts else None
        super().__init__(shared, index)

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self.is_fixed = False
        """Whether the storage keeps its size, for good."""

    @property
    def storage(self) -> EntryStorage:
        held = super().storage
        assert isinstance(held, EntryStorage)
        return held

    @property
    def evicts(self) -> bool:
        return self.selector is not None

    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        new = inputs.query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(inputs, mask, is_causal=mask is None)
            self._take_prompt(inputs, mask)
            return out.transpose(1, 2)
        step = self.take_step()
        out = attend(inputs, step.visible)
        if new > 1:
            self._add_mass_of_chunk(inputs.query, step.before.live)
        if self.storage.queries.shape[2]:
            self.storage.remember(inputs.query, step.place)
        self.finish(step)
        evict([self], step)
        return out.transpose(1, 2)

    # Storage

    def _take_prompt(self, inputs: LayerInputs, mask: Tensor | None) -> None:
        rows, _, width, _ = inputs.key.shape
        lengths = self.shared.row_lengths(mask, rows, width)
        self.counters, self.columns = Counters.of_prompts(lengths), width
        config, longest = self.shared.config, max(lengths)
        capacity, places, has_mass = longest + _GROWTH, 0, False
        if self.selector is not None:
            capacity = max(self.selector.budget, longest) + config.window
            has_mass = self.selector.needs_mass
            places = config.window if self.selector.needs_queries or has_mass else 0
        philox = self.shared.keys(rows)
        self._storage = EntryStorage.of_prompts(inputs, lengths, philox, capacity, places, has_mass)
        self._add_mass_of_chunk(inputs.query, [0] * rows)
        self.shared.finish()

    def fix_capacity(self, entries: int) -> None:
        """Storage of so many entries, which never moves from here on."""
        self._resize(entries)
        self.is_fixed = True

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        step = self.step = self.shared.step(self.counters, key.shape[2], key.device, self.evicts)
        if step.entries > self.storage.capacity:
            self._resize(step.entries + (self.shared.config.window if self.evicts else _GROWTH))
        self.storage.append(key, value, step.slot)
        return self.storage.keys[:, :, : step.entries], self.storage.values[:, :, : step.entries]

    def _resize(self, capacity: int) -> None:
        assert not self.is_fixed or self.storage.capacity == capacity
        self.storage.resize(capacity)

    def match_storage(self, layers: Sequence[RowLayer]) -> None:
        evicting = [layer for layer in layers if isinstance(layer, EvictionLayer)]
        capacity = max(layer.storage.capacity for layer in evicting)
        for layer in evicting:
            layer._resize(capacity)

    def held_bytes(self, row: int) -> tuple[int, int]:
        size = self.storage.entry_bytes
        return self.counters.live[row] * size, self.counters.peak[row] * size

    # Accumulated attention, in blocks of `window` entries: the queries of a block are in the ring when it is full

    def add_mass(self, step: Step) -> None:
        """Add what the queries of the blocks that a step filled attend to."""
        held, dtype = self.storage, self.storage.mass.dtype
        if not held.mass.shape[2]:
            return
        for live, rows in step.full.items():
            place = _place(rows, self.shared, held.keys.device)
            keys, queries = held.keys[place, :, :live].to(dtype), held.queries[place].to(dtype)
            held.mass[place, :, :live] += attention_mass(queries, keys, held.form)

    def _add_mass_of_chunk(self, query: Tensor, before: Sequence[int]) -> None:
        """The same for all blocks that end in a prompt or a chunk, which is stored.

        Args:
            query: [rows, Hq, q, D], padding on the left.
            before: entries that each row held before.
        """
        held, window, dtype, width = self.storage, self.shared.config.window, self.storage.mass.dtype, query.shape[2]
        if not held.mass.shape[2]:
            return
        for row, entries in enumerate(before):
            length = width if entries else self.counters.live[row]  # a prompt may be padded
            live, pending = entries + length, entries % window
            queries = query[row, :, width - length :].to(dtype)
            # a block that the chunk fills may have begun before it: its first queries are still in the ring, where the
            # chunk's come only after this. A prompt begins at 0, so what the ring holds of it is not read.
            if pending:
                queries = torch.cat([held.queries[row, :, :pending].to(dtype), queries], dim=1)
            start = live - length - pending
            for end in range(start + window, live + 1, window):
                block = queries[:, end - window - start : end - start]
                keys = held.keys[row, :, :end].to(dtype)
                held.mass[row, :, :end] += attention_mass(block[None], keys[None], held.form)[0]

    def release(self, budget: int) -> None:
        """Give back what a prompt longer than the budget needed, after its event."""
        limit = budget + self.shared.config.window
        if not self.is_fixed and max(self.counters.live) <= limit < self.storage.capacity:
            self._resize(limit)


def evict(layers: Sequence[EvictionLayer], step: Step) -> None:
    """What follows a step that evicting layers, which count alike, have finished: the events that are due.

    An event is many small kernels, so it is one batch over rows and, as far as memory allows, over layers.
    """
    for layer in layers:
        layer.add_mass(step)
    for live, rows in step.due.items():
        for together in _batches(layers, len(rows) * live):
            _evict_rows(together, rows, live, step)
    for layer in layers:
        if step.due and layer.selector is not None:
            layer.release(layer.selector.budget)


def _batches(layers: Sequence[EvictionLayer], entries: int) -> Iterator[list[EvictionLayer]]:
    """Neighbouring layers whose tensors can be put together, at most as many as `_BYTES` allow."""

    def likeness(layer: EvictionLayer) -> tuple[object, ...]:
        held = layer.storage
        shapes = held.keys.shape, held.values.shape
        return held.keys.device, held.keys.dtype, *shapes, held.form.scaling, held.form.softcap

    for _, group in groupby(layers, likeness):
        neighbours = list(group)
        held = neighbours[0].storage
        limit = _BYTES if held.keys.device.type == "cpu" else _BYTES_ON_DEVICE
        size = max(1, limit // (entries * held.entry_bytes))
        yield from (neighbours[first : first + size] for first in range(0, len(neighbours), size))


@dataclass(frozen=True)
class _Held:
    """The entries of an event's rows, [N, Hkv, live, ...], in the dtype that they are stored in; N = layers x rows."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor
    queries: Tensor


def _evict_rows(layers: Sequence[EvictionLayer], rows: list[int], live: int, step: Step) -> None:
    """One event in rows that all hold `live` entries, of layers whose tensors can be put together."""
    selector = layers[0].selector
    if selector is None:
        return
    place = _place(rows, layers[0].shared, layers[0].storage.keys.device)
    held = _gather(layers, place, live, selector)
    candidates = _candidates(held, layers, rows, place, step, selector)
    # the scores are the policy's, the selection is shared: `Selector.score`, then `Selector.select`
    kept = selector(candidates, [step.before.prompts[row] for row in rows] * len(layers))
    _store_back(held, kept, layers, place, len(rows))


def _gather(layers: Sequence[EvictionLayer], place: "Rows", live: int, selector: Selector) -> _Held:
    """The rows' entries, one layer after another."""

    def gathered(name: str, slots: slice = slice(live)) -> Tensor:
        tensors = [getattr(layer.storage, name)[place, :, slots] for layer in layers]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    storage = layers[0].storage
    return _Held(
        keys=gathered("keys"),
        values=gathered("values"),
        positions=gathered("entry_positions"),
        mass=gathered("mass") if selector.needs_mass else storage.mass,
        # the ring is in chronological order, because an event comes where the entries are a multiple of the window
        queries=gathered("queries", slice(None)) if selector.needs_queries else storage.queries,
    )


def _candidates(
    held: _Held, layers: Sequence[EvictionLayer], rows: list[int], place: "Rows", step: Step, selector: Selector
) -> Candidates:
    """The entries older than the window, with what the policy reads of them in the dtype of scores."""
    storage, shared, policy = layers[0].storage, layers[0].shared, selector.policy
    device, dtype = held.keys.device, score_dtype(held.keys.dtype)
    count = held.keys.shape[2] - shared.config.window
    # every layer has the same keys: the layer's index is a word of the counter
    philox = storage.philox[place].repeat(len(layers), 1)
    events = [step.before.events[row] for row in rows] * len(layers)
    indices = [layer.index for layer in layers for _ in rows]
    values = held.values[:, :, :count].to(dtype) if selector.needs_values else None
    sizes = {} if values is None else {measure: value_size(values, measure) for measure in selector.measures}
    return Candidates(
        positions=held.positions[:, :, :count],
        queries=held.queries.to(dtype) if policy.needs_queries else None,
        keys=held.keys[:, :, :count].to(dtype) if policy.needs_keys else None,
        values=values if policy.needs_values else None,
        scaling=storage.form.scaling,
        noise=NoiseSource((philox[:, 0], philox[:, 1]), shared.index(events, device), shared.index(indices, device)),
        window_keys=held.keys[:, :, count:].to(dtype) if policy.needs_window_keys else None,
        mass=held.mass[:, :, :count] if policy.needs_mass else None,
        softcap=storage.form.softcap,
        value_sizes=sizes,
        policy=shared.config.policy,
    )


def _store_back(held: _Held, kept: Tensor, layers: Sequence[EvictionLayer], place: "Rows", rows: int) -> None:
    """What is kept, then the window, in the first slots; `kept` are slots of candidates, [N, Hkv, budget - window]."""
    live, window = held.keys.shape[2], layers[0].shared.config.window
    newest = torch.arange(live - window, live, device=kept.device).expand(*kept.shape[:2], -1)
    slots = torch.cat([kept, newest], dim=-1)  # chronological: the window is newer than every candidate
    # a free slot says which position the token will have that takes it, so that decoding never writes positions
    free = layers[0].storage.capacity - slots.shape[-1]
    ahead = held.positions[:, :, -1:] + torch.arange(1, free + 1, device=kept.device)
    survivors = {
        "entry_positions": torch.cat([held.positions.gather(-1, slots), ahead], dim=-1),
        "keys": held.keys.gather(2, slots[..., None].expand(*slots.shape, held.keys.shape[-1])),
        "values": held.values.gather(2, slots[..., None].expand(*slots.shape, held.values.shape[-1])),
    }
    if held.mass.shape[2]:
        later = held.mass.new_zeros(*ahead.shape)  # what is appended starts at nothing
        survivors["mass"] = torch.cat([held.mass.gather(-1, slots), later], dim=-1)
    # stored only when all are gathered: what was gathered of one layer and neighbouring rows is a view of its storage
    for name, entries in survivors.items():
        for layer, stored in zip(layers, entries.split(rows), strict=True):
            getattr(layer.storage, name)[place, :, : stored.shape[2]] = stored


Rows = slice | Tensor


def _place(rows: list[int], shared: Shared, device: torch.device) -> Rows:
    """Ascending rows as an index: neighbours as a slice, which needs no copy."""
    if len(rows) == rows[-1] + 1 - rows[0]:
        return slice(rows[0], rows[-1] + 1)
    return shared.index(rows, device)
