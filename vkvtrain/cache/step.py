"""The counters of a cache's rows, and what a forward does with them: integers, and index tensors made once a forward.

All layers of a kind count alike, so one layer makes the `Step` and the others take it. Nothing here asks a device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from vkvtrain.events import is_due


@dataclass(frozen=True)
class Counters:
    """Of each row of a layer."""

    prompts: tuple[int, ...]
    """Tokens of the first prompt."""
    seen: tuple[int, ...]
    """Tokens given to the cache."""
    live: tuple[int, ...]
    """Entries held."""
    peak: tuple[int, ...]
    """Most entries ever held."""
    events: tuple[int, ...]
    """Evictions."""

    @classmethod
    def of_prompts(cls, lengths: Sequence[int]) -> Self:
        """Rows that hold their prompts."""
        held = tuple(lengths)
        return cls(prompts=held, seen=held, live=held, peak=held, events=(0,) * len(held))

    @classmethod
    def join(cls, counters: Sequence[Self]) -> Self:
        """The rows of several, one after another."""
        return cls(*(sum(counts, ()) for counts in zip(*(each._tuples() for each in counters), strict=True)))

    def keep(self, rows: Sequence[int]) -> Self:
        """These rows, in this order."""
        return type(self)(*(tuple(counts[row] for row in rows) for counts in self._tuples()))

    def replace_row(self, row: int, other: Self) -> Self:
        """The first row of another in the place of `row`."""
        return self.join([self.keep(range(row)), other.keep([0]), self.keep(range(row + 1, len(self.seen)))])

    def append(self, new: int) -> Self:
        """After `new` tokens in every row."""
        live = tuple(count + new for count in self.live)
        peak = tuple(map(max, self.peak, live))
        return replace(self, seen=tuple(count + new for count in self.seen), live=live, peak=peak)

    def evict(self, rows: Sequence[int], budget: int) -> Self:
        """After an event in some rows."""
        live, events = list(self.live), list(self.events)
        for row in rows:
            live[row], events[row] = budget, events[row] + 1
        return replace(self, live=tuple(live), events=tuple(events))

    def _tuples(self) -> Iterator[tuple[int, ...]]:
        return (getattr(self, field.name) for field in fields(self))


class Step:
    """A forward of `new` tokens a row that continue the sequences of some layers.

    Args:
        before: the rows' counters before it.
        new: tokens of each row.
        device: where the layers are.
        window: newest entries kept at an event, and entries of a block.
        budget: entries kept at an event; None for layers that evict nothing.
    """

    def __init__(self, before: Counters, new: int, device: torch.device, window: int, budget: int | None) -> None:
        self.before, self.new, self.device, self.window = before, new, device, window
        self.is_checked = False
        """Whether its tokens are known to continue the rows."""
        self.evicts = budget is not None
        self.appended = before.append(new)
        """The counters when its tokens are stored."""
        self.entries = max(self.appended.live)
        """Slots that attention reads."""
        self.full: dict[int, list[int]] = {}
        """By entries held, the rows whose block of `window` entries one new token filled."""
        self.due: dict[int, list[int]] = {}
        """By entries held, the rows in which an event follows."""
        self.after = self.appended
        """The counters after its events."""
        if budget is not None and new == 1:
            live = self.appended.live
            self.full = _group(live, [row for row, count in enumerate(live) if count % window == 0])
            due = [row for rows in self.full.values() for row in rows if is_due(live[row], budget, window)]
            self.due = _group(live, sorted(due))
            self.after = self.appended.evict(due, budget)
        self._rings: dict[int, Ring] = {}

    @cached_property
    def slot(self) -> Tensor:
        """Where the tokens are stored, int64 [rows, 1, new, 1]."""
        first = torch.tensor(self.before.live, device=self.device)
        slots = first[:, None] if self.new == 1 else first[:, None] + torch.arange(self.new, device=self.device)
        return slots[:, None, :, None]

    @cached_property
    def place(self) -> Tensor:
        """Where the newest `window` of the tokens leave their queries, int64 [rows, 1, min(new, window), 1].

        Entry n - 1 of a row is at place `(n - 1) % window`, so a block that is full is in chronological order.
        """
        return self.slot[:, :, -self.window :] % self.window

    @cached_property
    def visible(self) -> Tensor | None:
        """Which slots each token sees, bool [rows, 1, new, entries]; None for all."""
        if self.new == 1 and min(self.appended.live) == self.entries:
            return None
        return torch.arange(self.entries, device=self.device) <= self.slot

    def ring(self, window: int) -> "Ring":
        """Where the tokens go in layers with a sliding window of their own."""
        if window not in self._rings:
            self._rings[window] = Ring(self.before.seen, self.new, window, self.device)
        return self._rings[window]


class Ring:
    """The rings of a sliding-window layer: token i of a row lies in slot `i % window`.

    Args:
        seen: tokens of each row before the step.
        new: tokens that it gives.
        window: tokens that a query sees, itself included.
        device: where the layers are.
    """

    def __init__(self, seen: Sequence[int], new: int, window: int, device: torch.device) -> None:
        self.seen, self.new, self.window, self.device = seen, new, window, device
        self.filled = min(max(seen) + new, window)
        """Slots that were ever written, after the step."""

    @cached_property
    def _first(self) -> Tensor:
        return torch.tensor(self.seen, device=self.device)[:, None]

    @cached_property
    def slot(self) -> Tensor:
        """Where the newest `window` of the tokens are stored, int64 [rows, 1, min(new, window), 1]."""
        newest = torch.arange(max(0, self.new - self.window), self.new, device=self.device)
        return ((self._first + newest) % self.window)[:, None, :, None]

    @cached_property
    def visible(self) -> Tensor | None:
        """Which slots one token sees once it is stored, bool [rows, 1, 1, filled]; None for all."""
        if min(self.seen) + 1 >= self.filled:
            return None
        return (torch.arange(self.filled, device=self.device) <= self._first)[:, None, None]

    @cached_property
    def visible_to_chunk(self) -> Tensor:
        """What each token of a chunk sees of the ring before it and of the chunk, bool [rows, 1, new, window + new]."""
        age = (self._first - 1 - torch.arange(self.window, device=self.device)) % self.window
        # positions; what was never written is out of reach
        ring = torch.where(age < self._first, self._first - 1 - age, -self.window)
        chunk = self._first + torch.arange(self.new, device=self.device)
        distance = chunk[:, :, None] - torch.cat([ring, chunk], dim=1)[:, None]
        return ((distance >= 0) & (distance < self.window))[:, None]


def _group(values: Sequence[int], rows: Sequence[int]) -> dict[int, list[int]]:
    """Rows by value."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(values[row], []).append(row)
    return groups
