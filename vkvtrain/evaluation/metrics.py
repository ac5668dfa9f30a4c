"""What is measured of a generation, and the intervals of a mean over problems."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def is_looping(tokens: Sequence[int], longest: int = 64, repeats: int = 4) -> bool:
    """Whether the tokens end in one n-gram, n up to `longest`, repeated at least `repeats` times and over 16 tokens."""
    for n in range(1, min(longest, len(tokens) // repeats) + 1):
        times = max(repeats, -(-16 // n))
        tail = list(tokens[-n:])
        if len(tokens) >= times * n and list(tokens[-times * n :]) == tail * times:
            return True
    return False


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean over problems and its 95% interval: `{"value", "low", "high"}`.

    Bias-corrected bootstrap over problems (scipy, BCa); Wilson's score interval where all values are equal and the
    bootstrap has nothing to vary.
    """
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if np.ptp(data) == 0:
        if mean not in (0.0, 1.0):
            return {"value": mean, "low": mean, "high": mean}
        ci = stats.binomtest(round(mean * len(data)), len(data)).proportion_ci(method="wilson")
    else:
        ci = stats.bootstrap((data,), np.mean, n_resamples=4000, rng=np.random.default_rng(seed)).confidence_interval
    return {"value": mean, "low": float(ci.low), "high": float(ci.high)}


def paired_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean difference `ours - theirs` on the same problems, and its 95% bootstrap interval over problems."""
    if len(ours) != len(theirs):
        raise ValueError(f"a paired interval needs the same problems on both sides, got {len(ours)} and {len(theirs)}")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], seed)
