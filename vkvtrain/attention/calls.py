"""The segments of a batch between two events, as calls of attention. Integers and positions only."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vkvtrain.lifetimes import Schedule


@dataclass(frozen=True)
class Call:
    """Segments of one attention call: `rows[n]` from token `starts[n]` to `ends[n]`, each padded to `length` tokens."""

    rows: list[int]
    starts: list[int]
    ends: list[int]
    length: int
    past: Tensor | None
    """Positions of the past that they see, ascending, int64 [N, Hkv, budget]; None before the first event."""

    @property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return all(end - start == self.length for start, end in zip(self.starts, self.ends, strict=True))

    def split(self, size: int) -> "Iterator[Call]":
        """The same in calls of at most `size` segments."""
        if size >= len(self.rows):
            yield self
            return
        for first in range(0, len(self.rows), size):
            at = slice(first, first + size)
            past = None if self.past is None else self.past[at]
            yield Call(self.rows[at], self.starts[at], self.ends[at], self.length, past)


def padded(start: int, end: int, window: int) -> int:
    """Tokens that a segment is padded to, so that the last ones of rows share a call."""
    return -(-(end - start) // window) * window if start else end


def replayed(evict_at: Tensor, schedule: Schedule) -> Iterator[Call]:
    """Every segment once, in the order of each row's events, with what `evict_at` [B, Hkv, S] says of the past."""
    held = evict_at.new_zeros(*evict_at.shape[:2], schedule.budget)
    spans = []
    for sequence in schedule.sequences:
        starts = [0, *(event.position + 1 for event in sequence.events)]
        ends = [*starts[1:], sequence.length]
        spans.append([(start, end) for start, end in zip(starts, ends, strict=True) if end > start])
    for number in range(max(map(len, spans))):
        groups: dict[tuple[int, int], list[int]] = {}
        for row, spans_of_row in enumerate(spans):
            if number < len(spans_of_row):
                start, end = spans_of_row[number]
                before = start - spans_of_row[number - 1][0] if number else 0
                groups.setdefault((padded(start, end, schedule.window), before), []).append(row)
        for (length, before), rows in groups.items():
            starts, ends = map(list, zip(*(spans[row][number] for row in rows), strict=True))
            past = None
            if number:
                index, first = schedule.index(rows), schedule.index(starts)[:, None, None]
                entries = torch.arange(-before, 0, device=evict_at.device) + first
                entries = entries.expand(-1, evict_at.shape[1], -1)
                if number > 1:
                    entries = torch.cat([held[index], entries], -1)
                past = _survivors(entries, evict_at[index].gather(-1, entries) > first, schedule.budget)
                held[index] = past
            yield Call(rows, starts, ends, length, past)


def _survivors(entries: Tensor, alive: Tensor, count: int) -> Tensor:
    """The `count` entries of each head that are alive, in their order, without asking the device how many."""
    slot = torch.where(alive, alive.cumsum(-1) - 1, count)
    return entries.new_empty(*entries.shape[:2], count + 1).scatter_(-1, slot, entries)[..., :count]


def joined(calls: Iterable[Call], size: Callable[[Call], int]) -> Iterator[Call]:
    """Calls of equal shape in one, up to `size(call)` segments in each."""
    waiting: dict[tuple[int, bool], list[Call]] = {}
    for call in calls:
        together = waiting.setdefault((call.length, call.past is None), [])
        together.append(call)
        if sum(len(waiting_call.rows) for waiting_call in together) >= size(call):
            yield from _joined(together).split(size(call))
            together.clear()
    for together in waiting.values():
        if together:
            yield from _joined(together).split(size(together[0]))


def _joined(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    past = [call.past for call in calls if call.past is not None]
    return Call(
        [row for call in calls for row in call.rows],
        [start for call in calls for start in call.starts],
        [end for call in calls for end in call.ends],
        calls[0].length,
        torch.cat(past) if past else None,
    )
