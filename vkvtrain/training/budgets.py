"""Which budget a step has: one, one of a list, one from a range, or one that moves from here to there.

budget: 2048
budget: [2048, 4096]
budget: {low: 1024, high: 4096}     # any multiple of the window from low to high
budget: {from: 8192, to: 2048}      # linear over the steps, rounded to a multiple of the window
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vkvtrain.config import nearest


@dataclass(frozen=True)
class ListedBudgets:
    """Each drawn equally often; None for a policy that keeps everything."""

    budgets: tuple[int | None, ...]

    def ends(self) -> list[int | None]:
        """The budgets that a run is judged at; what it is foremost trained for comes first."""
        return list(self.budgets)

    def at(self, progress: float, draw: random.Random) -> int | None:
        """The budget of a step; `progress` goes from 0 at the first step to 1 at the last."""
        return draw.choice(self.budgets)


@dataclass(frozen=True)
class BudgetRange:
    """Any multiple of the window from `low` to `high`, both included, equally often."""

    low: int
    high: int
    window: int

    def ends(self) -> list[int | None]:
        return [self.low, self.high]

    def at(self, progress: float, draw: random.Random) -> int | None:
        return draw.randrange(self.low, self.high + 1, self.window)


@dataclass(frozen=True)
class AnnealedBudget:
    """From `start` at the first step to `end` at the last, linearly, rounded to the nearest multiple of the window."""

    start: int
    end: int
    window: int

    def ends(self) -> list[int | None]:
        return [self.end, self.start]

    def at(self, progress: float, draw: random.Random) -> int | None:
        exact = self.start + (self.end - self.start) * progress
        return int(exact / self.window + 0.5) * self.window


BudgetSchedule = ListedBudgets | BudgetRange | AnnealedBudget


def budget_schedule(value: Any, window: int) -> BudgetSchedule:
    """What a recipe's `eviction.budget` says; that each budget fits the window is for `EvictionConfig` to check.

    Raises:
        ValueError: an empty list, a mapping with other keys than low and high or from and to, or low above high.
    """
    if isinstance(value, dict):
        return _moving(value, window)
    if value == []:
        raise ValueError("budget is an empty list: give at least one number")
    return ListedBudgets(tuple(value) if isinstance(value, list) else (value,))


def _moving(value: dict[Any, Any], window: int) -> BudgetSchedule:
    keys: Sequence[str] = ("from", "to") if {"from", "to"} & set(value) else ("low", "high")
    for key in value:
        if key not in keys:
            raise ValueError(f"budget: unknown key {key!r}{nearest(str(key), ['low', 'high', 'from', 'to'])}")
    for key in keys:
        number = value.get(key)
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(
                f"budget: {key!r} must be a whole number, got {number!r}; write {{{keys[0]}: ..., {keys[1]}: ...}}"
            )
    first, last = value[keys[0]], value[keys[1]]
    if keys[0] == "from":
        return AnnealedBudget(first, last, window)
    if first > last:
        raise ValueError(f"budget: low ({first}) is above high ({last}): swap them, or write from and to to anneal")
    return BudgetRange(first, last, window)
