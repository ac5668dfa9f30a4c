"""A layer that evicts (or, without a selector, keeps everything)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.step import Counters, Step
from vkvtrain.logits import LogitForm, attend, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource
from vkvtrain.policies import Candidates

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
        self.decoded = False
        self.step: Step | None = None
        """What is under way, from `update` to the end of `attend`."""
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
        self.shared.refuse_padding(mask, new)
        assert self.step is not None
        step, self.step = self.step, None
        out = attend(query, key, value, form, step.visible)
        if new > 1:
            self._add_mass_of_chunk(query, step.before.live, form)
        if self.queries is not None:
            newest = query[:, :, -self.queries.shape[2] :].to(self.queries.dtype)
            self.queries.scatter_(2, step.place.expand(newest.shape), newest)
        self.finish(step)
        return out.transpose(1, 2)

    def finish(self, step: Step) -> None:
        if step.new == 1:
            self.decoded = True
            self._evict(step)
        super().finish(step)

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

    def fix_capacity(self, entries: int) -> None:
        """Storage of so many entries, which never moves from here on."""
        self._resize(entries)
        self.is_fixed = True

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = key.shape[2]
        if new > 1 and not self.decoded:
            raise ValueError(
                "EvictionCache was given a second chunk before any token was decoded: pass the whole prompt at once "
                "(prefill_chunk_size is not supported)"
            )
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
        same = [source for source in sources if isinstance(source, EvictionLayer)]
        self.decoded = any(source.decoded for source in same)
        self.form = same[0].form

    def held_bytes(self, row: int) -> tuple[int, int]:
        return self.counters.live[row] * self.entry_bytes(), self.counters.peak[row] * self.entry_bytes()

    def _window_queries(self, rows: Tensor | None) -> Tensor:
        """The newest `window` queries of rows with a full block, chronological, [N, Hq, R, D], in the scores' dtype."""
        assert self.queries is not None
        queries = _pick(self.queries, rows)
        return queries.to(score_dtype(queries.dtype))

    def _index(self, rows: list[int], device: torch.device) -> Tensor | None:
        """Rows as an index; None for all of them, which need no copy."""
        return None if len(rows) == len(self.counters.live) else self.shared.index(rows, device)

    # Accumulated attention, in blocks of `window` entries: the queries of a block are in the ring when it is full

    def _add_mass(self, rows: list[int], live: int) -> None:
        """Add what the newest block's queries attend to, in rows that all hold `live` entries."""
        assert self.form is not None
        assert self.mass is not None
        assert self.keys is not None
        row = self._index(rows, self.keys.device)
        keys = _pick(self.keys[:, :, :live], row).to(self.mass.dtype)
        found = attention_mass(self._window_queries(row), keys, self.form)
        if row is None:
            self.mass[:, :, :live] += found
        else:
            self.mass[row, :, :live] += found

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

    # Eviction

    def _evict(self, step: Step) -> None:
        if self.mass is not None:
            for live, rows in step.full.items():
                self._add_mass(rows, live)
        for live, rows in step.due.items():
            self._evict_rows(rows, live, step)
        if not step.due or self.keys is None or self.is_fixed:
            return
        config = self.shared.config
        assert config.budget is not None
        limit = config.budget + config.window
        if max(step.after.live) <= limit < self.keys.shape[2]:
            self._resize(limit)  # a prompt longer than the budget needed more

    def _evict_rows(self, rows: list[int], live: int, step: Step) -> None:
        """One event in rows that all hold `live` entries."""
        selector, config, form = self.selector, self.shared.config, self.form
        assert selector is not None
        assert form is not None
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        assert self.philox is not None
        device = self.keys.device
        row = self._index(rows, device)
        count = live - config.window
        dtype = score_dtype(self.keys.dtype)
        keys, values = (_pick(storage[:, :, :live], row) for storage in (self.keys, self.values))
        positions = _pick(self.entry_positions[:, :, :live], row)
        philox = _pick(self.philox, row)
        mass = None if self.mass is None else _pick(self.mass[:, :, :live], row)
        candidates = Candidates(
            positions=positions[:, :, :count],
            queries=self._window_queries(row) if selector.needs_queries else None,
            keys=keys[:, :, :count].to(dtype) if selector.needs_keys else None,
            values=values[:, :, :count].to(dtype) if selector.needs_values else None,
            scaling=form.scaling,
            noise=NoiseSource(
                (philox[:, 0], philox[:, 1]),
                self.shared.index([step.before.events[r] for r in rows], device),
                self.index,
            ),
            window_keys=keys[:, :, count:].to(dtype) if selector.needs_window_keys else None,
            mass=None if mass is None else mass[:, :, :count],
            softcap=form.softcap,
        )
        kept = selector(candidates, [step.before.prompts[r] for r in rows])
        newest = torch.arange(count, live, device=device).expand(*kept.shape[:2], -1)
        slots = torch.cat([kept, newest], dim=-1)  # chronological: the window is newer than every candidate
        budget = slots.shape[-1]
        ahead = positions[:, :, -1:] + torch.arange(1, self.keys.shape[2] - budget + 1, device=device)
        _put(self.entry_positions, row, torch.cat([positions.gather(-1, slots), ahead], dim=-1))
        for storage, held in ((self.keys, keys), (self.values, values)):
            _put(storage, row, held.gather(2, slots[..., None].expand(*slots.shape, held.shape[-1])))
        if self.mass is not None and mass is not None:
            later = mass.new_zeros(*ahead.shape)  # what is appended starts at nothing
            _put(self.mass, row, torch.cat([mass.gather(-1, slots), later], dim=-1))


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _put(storage: Tensor, rows: Tensor | None, entries: Tensor) -> None:
    """Write the first entries of some rows, None for all; entries [N, Hkv, n, ...] are no view of the storage."""
    if rows is None:
        storage[:, :, : entries.shape[2]] = entries
    else:
        storage[rows, :, : entries.shape[2]] = entries
