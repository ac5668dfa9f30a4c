"""Noticing that a run has failed: a loss or gradient that is not finite, or a loss far above guessing for long."""

import math
from typing import Any

PATIENCE = 10
"""Steps in a row after which a high loss is divergence."""
TIMES_GUESSING = 2.0


class Failed(FloatingPointError):
    """A run that was stopped because its loss is no use."""


class Watch:
    """Looks at every step's loss and gradient norm.

    Diverged is: `PATIENCE` steps in a row above `TIMES_GUESSING` times the larger of log(vocabulary), the cross-entropy
    of guessing, and the first step's loss.
    """

    def __init__(self, vocabulary: int) -> None:
        self._guessing = math.log(vocabulary)
        self._first: float | None = None
        self._high = 0

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step's loss or gradient norm; None while nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self._first is None:
            self._first = loss
        limit = TIMES_GUESSING * max(self._guessing, self._first)
        self._high = self._high + 1 if loss > limit else 0
        if self._high < PATIENCE:
            return None
        return f"the loss is {loss:.4g}, and has been above {limit:.4g} for {PATIENCE} steps"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"first": self._first, "high": self._high}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._first, self._high = state["first"], state["high"]
