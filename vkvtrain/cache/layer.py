"""A layer that evicts (or, without a selector, keeps everything)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.events import is_due
from vkvtrain.logits import LogitForm, attend, attention_mass, score_dtype
from vkvtrain.noise import NoiseSource
from vkvtrain.policies import Candidates

_GROWTH = 256
"""Entries by which the storage of a layer that keeps everything grows."""


class EvictionLayer(RowLayer):
    """One layer's entries: storage [rows, Hkv, capacity, D], each row's entries in the first `live[row]` slots.

    All counters are Python ints that are known without asking the device.
    """

    stored = ("keys", "values", "entry_positions", "mass", "queries", "philox")
    counted = ("prompts", "seen", "live", "peak", "events")

    def __init__(self, shared: Shared, index: int, evicts: bool) -> None:
        self.selector = shared.selector if evicts else None
        super().__init__(shared, index)

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self.entry_positions: Tensor | None = None
        """int64 [rows, Hkv, capacity]."""
        self.queries: Tensor | None = None
        """The newest `window` queries of each row, token i at place `i % window`, [rows, Hq, R, D]."""
        self.mass: Tensor | None = None
        """Accumulated attention of each entry, [rows, Hkv, capacity], for the policies that need it."""
        self.philox: Tensor | None = None
        """Words of the rows' Philox keys, int64 [rows, 2]."""
        self.prompts: list[int] = []
        self.live: list[int] = []
        self.peak: list[int] = []
        self.events: list[int] = []
        self.decoded = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        new = query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(query, key, value, form, mask, is_causal=mask is None)
            self._take_prompt(query, key, value, mask, form)
            return out.transpose(1, 2)
        self.refuse_padding(mask, new)
        entries = key.shape[2]
        before = [live - new for live in self.live]
        if new == 1 and min(self.live) == entries:
            visible = None
        else:
            slots = torch.arange(entries, device=key.device)
            last = self.shared.index(before, key.device)[:, None, None, None]
            visible = slots <= last + torch.arange(new, device=key.device)[:, None]
        out = attend(query, key, value, form, visible)
        if new > 1:
            self._add_mass_of_chunk(query, [new] * len(self.live), form)
        self._remember(query, [0] * len(self.live))
        if new == 1:
            self.decoded = True
            self._evict(form)
        return out.transpose(1, 2)

    # Storage

    def _take_prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> None:
        rows, heads, width, _ = key.shape
        device = key.device
        lengths = self.shared.row_lengths(mask, rows, width)
        self.prompts, self.live, self.peak, self.seen = list(lengths), list(lengths), list(lengths), list(lengths)
        self.events = [0] * rows
        self.columns = width
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
                self._add_mass_of_chunk(query, lengths, form)
            self._remember(query, [width - length for length in lengths])
        self.is_initialized = True

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows, _, new, _ = key.shape
        if new > 1 and not self.decoded:
            raise ValueError(
                "EvictionCache was given a second chunk before any token was decoded: pass the whole prompt at once "
                "(prefill_chunk_size is not supported)"
            )
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        needed = max(self.live) + new
        if needed > self.keys.shape[2]:
            self._resize(needed + (_GROWTH if self.selector is None else self.shared.config.window))
        device = key.device
        row = self.shared.index(range(rows), device)[:, None]
        offset = torch.arange(new, device=device)
        slot = self.shared.index(self.live, device)[:, None] + offset
        self.keys[row, :, slot] = key.transpose(1, 2)
        self.values[row, :, slot] = value.transpose(1, 2)
        self.entry_positions[row, :, slot] = (self.shared.index(self.seen, device)[:, None] + offset)[:, :, None]
        self.live = [live + new for live in self.live]
        self.seen = [seen + new for seen in self.seen]
        self.peak = [max(peak, live) for peak, live in zip(self.peak, self.live, strict=True)]
        self.columns += new
        return self.keys[:, :, :needed], self.values[:, :, :needed]

    def _resize(self, capacity: int) -> None:
        if self.keys is None or self.keys.shape[2] == capacity:
            return
        held = min(capacity, max(self.live))
        for name in ("keys", "values", "entry_positions", "mass"):
            old = getattr(self, name)
            if old is None:
                continue
            fresh = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            fresh[:, :, :held] = old[:, :, :held]
            setattr(self, name, fresh)

    def match_storage(self, layers: Sequence[RowLayer]) -> None:
        same = [layer for layer in layers if isinstance(layer, EvictionLayer)]
        capacity = max(layer.keys.shape[2] for layer in same if layer.keys is not None)
        for layer in same:
            layer._resize(capacity)

    def join(self, sources: Sequence[RowLayer]) -> None:
        super().join(sources)
        self.decoded = any(isinstance(source, EvictionLayer) and source.decoded for source in sources)

    def held_bytes(self, row: int) -> tuple[int, int]:
        return self.live[row] * self.entry_bytes(), self.peak[row] * self.entry_bytes()

    def _remember(self, query: Tensor, padding: Sequence[int]) -> None:
        """Keep the newest `window` queries of each row, token `i` at place `i % window`."""
        if self.queries is None:
            return
        window, width = self.queries.shape[2], query.shape[2]
        for new, rows in _group([min(width - pad, window) for pad in padding]).items():
            row = self.shared.index(rows, query.device)[:, None]
            newest = torch.arange(-new, 0, device=query.device)
            place = (self.shared.index([self.seen[r] for r in rows], query.device)[:, None] + newest) % window
            self.queries[row, :, place] = query[row, :, width + newest].to(self.queries.dtype)

    def _window_queries(self, rows: Sequence[int]) -> Tensor:
        """The newest `window` queries of some rows in chronological order, [N, Hq, R, D], in the scores' dtype."""
        assert self.queries is not None
        window, device = self.queries.shape[2], self.queries.device
        order = [[(self.seen[r] + i) % window for i in range(window)] for r in rows]
        places = torch.stack([self.shared.index(places, device) for places in order])
        queries = self.queries[self.shared.index(rows, device)[:, None], :, places].transpose(1, 2)
        return queries.to(score_dtype(queries.dtype)).contiguous()

    # Accumulated attention, in blocks of `window` entries: the queries of a block are in the ring when it is full

    def _add_mass(self, rows: list[int], live: int, form: LogitForm) -> None:
        """Add what the newest block's queries attend to, in rows that all hold `live` entries."""
        assert self.mass is not None
        assert self.keys is not None
        row = self.shared.index(rows, self.keys.device)
        self.mass[row, :, :live] += attention_mass(
            self._window_queries(rows), self.keys[row, :, :live].to(self.mass.dtype), form
        )

    def _add_mass_of_chunk(self, query: Tensor, lengths: Sequence[int], form: LogitForm) -> None:
        """The same for all blocks that end in a prompt or a chunk; call before `_remember` and after storing it.

        Args:
            query: [rows, Hq, q, D], padding on the left.
            lengths: tokens of the chunk in each row, padding excluded.
        """
        if self.mass is None:
            return
        assert self.keys is not None
        window, dtype = self.shared.config.window, self.mass.dtype
        for row, (length, live) in enumerate(zip(lengths, self.live, strict=True)):
            pending = (live - length) % window
            queries = query[row, :, query.shape[2] - length :].to(dtype)
            if pending:
                self.seen[row] -= length  # the ring still ends before the chunk
                queries = torch.cat([self._window_queries([row])[0, :, window - pending :], queries], dim=1)
                self.seen[row] += length
            start = live - length - pending
            for end in range(start + window, live + 1, window):
                block = queries[:, end - window - start : end - start]
                keys = self.keys[row, :, :end].to(dtype)
                self.mass[row, :, :end] += attention_mass(block[None], keys[None], form)[0]

    # Eviction

    def _evict(self, form: LogitForm) -> None:
        if self.selector is None:
            return
        config = self.shared.config
        assert config.budget is not None
        if self.mass is not None:
            for live, rows in _group([0 if live % config.window else live for live in self.live]).items():
                if live:
                    self._add_mass(rows, live, form)
        due = [live if is_due(live, config.budget, config.window) else 0 for live in self.live]
        for live, rows in _group(due).items():
            if live:
                self._evict_rows(rows, live, form)
        limit = config.budget + config.window
        if any(due) and max(self.live) <= limit and self.keys is not None and self.keys.shape[2] > limit:
            self._resize(limit)  # a prompt longer than the budget needed more

    def _evict_rows(self, rows: list[int], live: int, form: LogitForm) -> None:
        """One event in rows that all hold `live` entries."""
        selector, config = self.selector, self.shared.config
        assert selector is not None
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        assert self.philox is not None
        device = self.keys.device
        row = self.shared.index(rows, device)
        count = live - config.window
        dtype = score_dtype(self.keys.dtype)
        positions = self.entry_positions[row, :, :live]
        candidates = Candidates(
            positions=positions[:, :, :count],
            queries=self._window_queries(rows) if selector.needs_queries else None,
            keys=self.keys[row, :, :count].to(dtype) if selector.needs_keys else None,
            values=self.values[row, :, :count].to(dtype) if selector.needs_values else None,
            scaling=form.scaling,
            noise=NoiseSource(
                (self.philox[row, 0], self.philox[row, 1]),
                self.shared.index([self.events[r] for r in rows], device),
                self.index,
            ),
            window_keys=self.keys[row, :, count:live].to(dtype) if selector.needs_window_keys else None,
            mass=None if self.mass is None else self.mass[row, :, :count],
            softcap=form.softcap,
        )
        kept = selector(candidates, [self.prompts[r] for r in rows])
        newest = torch.arange(count, live, device=device).expand(*kept.shape[:2], -1)
        slots = torch.cat([kept, newest], dim=-1)  # chronological: the window is newer than every candidate
        budget = slots.shape[-1]
        self.entry_positions[row, :, :budget] = positions.gather(-1, slots)
        for storage in (self.keys, self.values):
            index = slots[..., None].expand(*slots.shape, storage.shape[-1])
            storage[row, :, :budget] = storage[row, :, :live].gather(2, index)
        if self.mass is not None:
            mass = self.mass[row, :, :live].gather(-1, slots)
            self.mass[row] = 0  # what is appended starts at nothing
            self.mass[row, :, :budget] = mass
        for r in rows:
            self.live[r] = budget
            self.events[r] += 1


def _group(values: Sequence[int]) -> dict[int, list[int]]:
    """Indices by value."""
    groups: dict[int, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return groups
