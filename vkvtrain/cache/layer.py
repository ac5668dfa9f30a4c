"""A layer that evicts (or, without a selector, keeps everything)."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.step import Counters, Step
from vkvtrain.logits import LogitForm, attend, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource
from vkvtrain.policies import Candidates

_BYTES = 2**22
"""Bytes of keys and values that an event gathers at once on a CPU, about: they stay in its cache."""
_BYTES_ON_DEVICE = 2**29
"""The same for an accelerator, where fewer and larger kernels are faster; bounds what an event allocates."""
_GROWTH = 256
"""Entries by which the storage of a layer that keeps everything grows."""


class EvictionLayer(RowLayer):
    """One layer's entries: storage [rows, Hkv, capacity, D], each row's entries in the first `live` slots, in order."""

    stored = ("keys", "values", "entry_positions", "mass", "queries", "philox")

    def __init__(self, shared: Shared, index: int, evicts: bool) -> None:
        self.selector = shared.selector if evicts else None
        super().__init__(shared, index)

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self.entry_positions: Tensor | None = None
        """int64 [rows, Hkv, capacity]; of a slot that is not in use, the position of the token that will take it."""
        self.queries: Tensor | None = None
        """The newest `window` queries of each row, that of entry i at place `i % window`, [rows, Hq, R, D]."""
        self.mass: Tensor | None = None
        """Accumulated attention of each entry, [rows, Hkv, capacity], for the policies that need it."""
        self.philox: Tensor | None = None
        """Words of the rows' Philox keys, int64 [rows, 2]."""
        self.form: LogitForm | None = None
        """The form of the layer's attention."""
        self.is_fixed = False
        """Whether the storage keeps its size, for good."""

    @property
    def evicts(self) -> bool:
        return self.selector is not None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        new = query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(query, key, value, form, mask, is_causal=mask is None)
            self._take_prompt(query, key, value, mask, form)
            return out.transpose(1, 2)
        assert self.step is not None
        step, self.step = self.step, None
        out = attend(query, key, value, form, step.visible)
        if new > 1:
            self._add_mass_of_chunk(query, step.before.live, form)
        if self.queries is not None:
            newest = query[:, :, -self.queries.shape[2] :].to(self.queries.dtype)
            self.queries.scatter_(2, step.place.expand(newest.shape), newest)
        self.finish(step)
        evict([self], step)
        return out.transpose(1, 2)

    # Storage

    def _take_prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> None:
        rows, heads, width, _ = key.shape
        device = key.device
        lengths = self.shared.row_lengths(mask, rows, width)
        self.counters = Counters.of_prompts(lengths)
        self.columns, self.form = width, form
        self.philox = torch.tensor(self.shared.keys(rows), dtype=torch.int64, device=device)
        config = self.shared.config
        capacity = max(lengths) + _GROWTH
        if self.selector is not None:
            assert config.budget is not None
            capacity = max(config.budget, max(lengths)) + config.window
        self.keys = key.new_zeros(rows, heads, capacity, key.shape[-1])
        self.values = value.new_zeros(rows, heads, capacity, value.shape[-1])
        self.entry_positions = torch.arange(capacity, device=device).expand(rows, heads, -1).clone()
        for row, length in enumerate(lengths):
            self.keys[row, :, :length] = key[row, :, width - length :]
            self.values[row, :, :length] = value[row, :, width - length :]
        if self.selector is not None and (self.selector.needs_queries or self.selector.needs_mass):
            self.queries = query.new_zeros(rows, query.shape[1], config.window, query.shape[-1])
            if self.selector.needs_mass:
                self.mass = key.new_zeros(rows, heads, capacity, dtype=score_dtype(key.dtype))
                self._add_mass_of_chunk(query, [0] * rows, form)
            for row, length in enumerate(lengths):
                newest = min(length, config.window)
                place = torch.arange(length - newest, length, device=device) % config.window
                self.queries[row, :, place] = query[row, :, width - newest :]
        self.is_initialized = True
        self.shared.finish()

    def fix_capacity(self, entries: int) -> None:
        """Storage of so many entries, which never moves from here on."""
        self._resize(entries)
        self.is_fixed = True

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = key.shape[2]
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        step = self.step = self.shared.step(self.counters, new, key.device, self.evicts)
        if step.entries > self.keys.shape[2]:
            self._resize(step.entries + (self.shared.config.window if self.evicts else _GROWTH))
        self.keys.scatter_(2, step.slot.expand(key.shape), key)
        self.values.scatter_(2, step.slot.expand(value.shape), value)
        return self.keys[:, :, : step.entries], self.values[:, :, : step.entries]

    def _resize(self, capacity: int) -> None:
        if self.keys is None or self.keys.shape[2] == capacity:
            return
        assert not self.is_fixed
        assert self.entry_positions is not None
        held = min(capacity, self.keys.shape[2])
        positions = self.entry_positions
        for name in ("keys", "values", "entry_positions", "mass"):
            old = getattr(self, name)
            if old is None:
                continue
            fresh = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            fresh[:, :, :held] = old[:, :, :held]
            setattr(self, name, fresh)
        ahead = torch.arange(1, capacity - held + 1, device=positions.device)
        self.entry_positions[:, :, held:] = positions[:, :, held - 1 : held] + ahead

    def match_storage(self, layers: Sequence[RowLayer]) -> None:
        same = [layer for layer in layers if isinstance(layer, EvictionLayer)]
        capacity = max(layer.keys.shape[2] for layer in same if layer.keys is not None)
        for layer in same:
            layer._resize(capacity)

    def join(self, sources: Sequence[RowLayer]) -> None:
        super().join(sources)
        self.form = next(source.form for source in sources if isinstance(source, EvictionLayer))

    def held_bytes(self, row: int) -> tuple[int, int]:
        return self.counters.live[row] * self.entry_bytes(), self.counters.peak[row] * self.entry_bytes()

    # Accumulated attention, in blocks of `window` entries: the queries of a block are in the ring when it is full

    def add_mass(self, step: Step) -> None:
        """Add what the queries of the blocks that a step filled attend to."""
        if self.mass is None or self.keys is None:
            return
        assert self.form is not None
        assert self.queries is not None
        dtype = self.mass.dtype
        for live, rows in step.full.items():
            place = _place(rows, self.shared, self.keys.device)
            keys, queries = self.keys[place, :, :live].to(dtype), self.queries[place].to(dtype)
            self.mass[place, :, :live] += attention_mass(queries, keys, self.form)

    def _add_mass_of_chunk(self, query: Tensor, before: Sequence[int], form: LogitForm) -> None:
        """The same for all blocks that end in a prompt or a chunk, which is stored; its queries are not yet.

        Args:
            query: [rows, Hq, q, D], padding on the left.
            before: entries that each row held before.
        """
        if self.mass is None:
            return
        assert self.keys is not None
        assert self.queries is not None
        window, dtype, width = self.shared.config.window, self.mass.dtype, query.shape[2]
        for row, held in enumerate(before):
            length = width if held else self.counters.live[row]  # a prompt may be padded
            live, pending = held + length, held % window
            queries = query[row, :, width - length :].to(dtype)
            if pending:
                queries = torch.cat([self.queries[row, :, :pending].to(dtype), queries], dim=1)
            start = live - length - pending
            for end in range(start + window, live + 1, window):
                block = queries[:, end - window - start : end - start]
                keys = self.keys[row, :, :end].to(dtype)
                self.mass[row, :, :end] += attention_mass(block[None], keys[None], form)[0]

    def release(self) -> None:
        """Give back what a prompt longer than the budget needed, after its event."""
        config = self.shared.config
        assert config.budget is not None
        limit = config.budget + config.window
        if not self.is_fixed and self.keys is not None and max(self.counters.live) <= limit < self.keys.shape[2]:
            self._resize(limit)


def evict(layers: Sequence[EvictionLayer], step: Step) -> None:
    """What follows a step that evicting layers, which count alike, have finished: the events that are due.

    An event is many small kernels, so it is one batch over rows and, as far as memory allows, over layers.
    """
    for layer in layers:
        layer.add_mass(step)
    for live, rows in step.due.items():
        for alike in _batches(layers, len(rows) * live):
            _evict_rows(alike, rows, live, step)
    if step.due:
        for layer in layers:
            layer.release()


def _batches(layers: Sequence[EvictionLayer], entries: int) -> Iterator[list[EvictionLayer]]:
    """Neighbouring layers whose tensors can be put together, at most as many as `_BYTES` allow."""

    def form(layer: EvictionLayer) -> tuple[Any, ...]:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.form is not None
        shapes = layer.keys.shape, layer.values.shape
        return layer.keys.device, layer.keys.dtype, *shapes, layer.form.scaling, layer.form.softcap

    for (device, *_), alike in groupby(layers, form):
        its = list(alike)
        limit = _BYTES if device.type == "cpu" else _BYTES_ON_DEVICE
        size = max(1, limit // (entries * its[0].entry_bytes()))
        yield from (its[first : first + size] for first in range(0, len(its), size))


def _evict_rows(layers: Sequence[EvictionLayer], rows: list[int], live: int, step: Step) -> None:
    """One event in rows that all hold `live` entries, of layers whose tensors can be put together."""
    shared, form, selector, some = layers[0].shared, layers[0].form, layers[0].selector, layers[0].keys
    assert form is not None
    assert selector is not None
    assert some is not None
    device, dtype = some.device, score_dtype(some.dtype)
    count, place = live - shared.config.window, _place(rows, shared, device)

    def of_all(name: str, entries: slice = slice(live)) -> Tensor:
        parts = [getattr(layer, name)[place, :, entries] for layer in layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    keys, values, positions = of_all("keys"), of_all("values"), of_all("entry_positions")
    mass = of_all("mass") if selector.needs_mass else None
    assert layers[0].philox is not None
    philox = layers[0].philox[place].repeat(len(layers), 1)
    candidates = Candidates(
        positions=positions[:, :, :count],
        queries=of_all("queries", slice(None)).to(dtype) if selector.needs_queries else None,
        keys=keys[:, :, :count].to(dtype) if selector.needs_keys else None,
        values=values[:, :, :count].to(dtype) if selector.needs_values else None,
        scaling=form.scaling,
        noise=NoiseSource(
            (philox[:, 0], philox[:, 1]),
            shared.index([step.before.events[row] for row in rows] * len(layers), device),
            shared.index([layer.index for layer in layers for _ in rows], device),
        ),
        window_keys=keys[:, :, count:].to(dtype) if selector.needs_window_keys else None,
        mass=None if mass is None else mass[:, :, :count],
        softcap=form.softcap,
    )
    kept = selector(candidates, [step.before.prompts[row] for row in rows] * len(layers))
    newest = torch.arange(count, live, device=device).expand(*kept.shape[:2], -1)
    slots = torch.cat([kept, newest], dim=-1)  # chronological: the window is newer than every candidate
    ahead = positions[:, :, -1:] + torch.arange(1, some.shape[2] - slots.shape[-1] + 1, device=device)
    held = {
        "entry_positions": torch.cat([positions.gather(-1, slots), ahead], dim=-1),
        "keys": keys.gather(2, slots[..., None].expand(*slots.shape, keys.shape[-1])),
        "values": values.gather(2, slots[..., None].expand(*slots.shape, values.shape[-1])),
    }
    if mass is not None:
        later = mass.new_zeros(*ahead.shape)  # what is appended starts at nothing
        held["mass"] = torch.cat([mass.gather(-1, slots), later], dim=-1)
    for name, entries in held.items():
        for layer, its in zip(layers, entries.split(len(rows)), strict=True):
            getattr(layer, name)[place, :, : its.shape[2]] = its


Rows = slice | Tensor


def _place(rows: list[int], shared: Shared, device: torch.device) -> Rows:
    """Ascending rows as an index: neighbours as a slice, which needs no copy."""
    if len(rows) == rows[-1] + 1 - rows[0]:
        return slice(rows[0], rows[-1] + 1)
    return shared.index(rows, device)
