"""Intervals, tests and sample sizes of grades that are paired by problem.

The unit is the problem: repeats and seeds of a problem are averaged first (`problem_means`), and problems are what is
resampled, so repeats never pass for independent observations. Knows numbers; knows nothing of models, tasks or files.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

Estimate = dict[str, float]
"""`{"value", "low", "high"}`: an estimate and the ends of its 95% interval."""

RESAMPLES = 4000
PERMUTATIONS = 99_999
"""Many, so that an adjusted p can still be small: the least that a permutation test can give is 2 / 100,000."""
ALPHA, POWER = 0.05, 0.8
"""Two-sided level and power of the sample-size hints."""


def problem_means(grades: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """Mean grade of each problem over its repeats and seeds, in the order of first appearance."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for problem, grade in grades:
        found[problem].append(grade)
    return {problem: float(np.mean(values)) for problem, values in found.items()}


def interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean over problems and its 95% interval: `{"value", "low", "high"}`.

    Bias-corrected bootstrap over problems (scipy, BCa), a little narrow for fewer than about 50 of them; Wilson's score
    interval where all values are equal and the bootstrap has nothing to vary.
    """
    data = _finite(values)
    mean = float(data.mean())
    if np.ptp(data) == 0:
        if mean not in (0.0, 1.0):
            return {"value": mean, "low": mean, "high": mean}
        ci = stats.binomtest(round(mean * len(data)), len(data)).proportion_ci(method="wilson")
    else:
        ci = stats.bootstrap(
            (data,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(seed), batch=1000
        ).confidence_interval
    return {"value": mean, "low": float(ci.low), "high": float(ci.high)}


def paired_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """Mean difference `ours - theirs` on the same problems, and its 95% bootstrap interval over problems.

    Where no grade (0 to 1) differs, the interval is as wide as Wilson's upper bound on the share of problems that
    would.
    """
    differences = _paired(ours, theirs)
    if differences.any():
        return interval(differences.tolist(), seed)
    spread = _none_of(len(differences)) if min(ours) >= 0 and max(ours) <= 1 else 0.0
    return {"value": 0.0, "low": -spread, "high": spread}


def crossed_interval(grades: Sequence[Sequence[float]]) -> Estimate:
    """Mean over training runs and problems, and its 95% interval, which covers other runs *and* other problems.

    Both are samples: grade = mean + run + problem + rest. With R runs and P problems, each graded once by each, the
    variance of the mean is estimated by `(MS_runs + MS_problems - MS_rest) / (R P)` from the mean squares of the
    two-way layout, no component less than zero, and t has Satterthwaite's degrees of freedom. Few runs that differ
    make a wide interval. Where nothing varies, or with one run, it is `interval` over problems.

    Args:
        grades: [runs][problems], or differences of two arms, paired by problem and by the run's seed.
    """
    table = np.asarray(grades, dtype=float)
    runs, problems = table.shape
    if runs == 1 or not np.ptp(table):
        return interval(table.mean(0).tolist())
    mean = table.mean()
    by_run, by_problem = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - by_run[:, None] - by_problem
    degrees = np.array([runs - 1, problems - 1, (runs - 1) * (problems - 1)])
    squares = np.array([problems * (by_run**2).sum(), runs * (by_problem**2).sum(), (rest**2).sum()]) / degrees
    squares[:2] = np.maximum(squares[:2], squares[2])
    total = squares[0] + squares[1] - squares[2]
    half = stats.t.ppf(1 - ALPHA / 2, total**2 / (squares**2 / degrees).sum()) * math.sqrt(total / table.size)
    return {"value": float(mean), "low": float(mean - half), "high": float(mean + half)}


def permutation_p(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of no mean difference: a paired permutation test (scipy), exact for few problems that differ.

    Exchanging the two sides of a problem flips the sign of its difference; problems without one change nothing.
    """
    differences = _paired(ours, theirs)
    differences = differences[differences != 0]
    if len(differences) < 2:  # with one, either sign is as extreme
        return 1.0
    test = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", vectorized=True, n_resamples=PERMUTATIONS, batch=5000,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for the number of comparisons by Holm's method (statsmodels), in the same order."""
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist() if len(p_values) else []


def gap_closed(
    adapted: Sequence[float], evicted: Sequence[float], full: Sequence[float], seed: int = 0
) -> Estimate | None:
    """Share of the loss to eviction that an adapter wins back: `(adapted - evicted) / (full - evicted)`.

    All three are problem means on the same problems: the adapted model evicted, the untrained model evicted, and the
    untrained model with the full cache. The interval is a paired BCa bootstrap of the ratio over problems.

    Returns:
        None where it is undefined, because `full - evicted` is not clearly above 0: its 95% interval is not, or one of
        the resamples over problems, in which the ratio would be wild.
    """
    loss = paired_interval(full, evicted, seed)
    lost = _paired(full, evicted)
    resampled = np.random.default_rng(seed).choice(lost, (RESAMPLES, len(lost))).mean(1)
    if loss["low"] <= 0 or resampled.min() <= 0 or lost.sum() <= lost.max():
        return None
    ours, base, best = (_finite(side) for side in (adapted, evicted, full))
    for share, end in ((1.0, full), (0.0, evicted)):
        if not _paired(adapted, end).any():  # the same in every resample: as wide as in `paired_interval`
            spread = _none_of(len(ours)) / loss["value"]
            return {"value": share, "low": share - spread, "high": share + spread}

    def ratio(a: np.ndarray, e: np.ndarray, f: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.mean(axis) - e.mean(axis)) / (f.mean(axis) - e.mean(axis))

    value = float(ratio(ours, base, best))
    if np.allclose(ours - base, value * (best - base), rtol=0, atol=1e-12):  # every problem wins back the same share
        return {"value": value, "low": value, "high": value}
    ends = stats.bootstrap(
        (ours, base, best), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return {"value": value, "low": float(ends.low), "high": float(ends.high)}


@dataclass(frozen=True)
class Resolution:
    """How small a difference an experiment like this one can see.

    Attributes:
        problems: problems of the experiment.
        between: variance over problems of the true difference.
        within: variance of one repeat's difference around its problem's, or None where repeats do not tell.
        repeats: repeats of the experiment, seeds included.
    """

    problems: int
    between: float
    within: float | None
    repeats: int

    def difference(self, problems: int | None = None, repeats: int | None = None) -> float:
        """Smallest true difference that is found with 80% power by a two-sided paired t-test at 5%.

        `d(n) * sqrt(between + within / repeats)`; d(n) is the effect size that statsmodels' TTestPower solves for, near
        2.8 / sqrt(n).

        Raises:
            ValueError: other repeats than those of the experiment where `within` is not known.
        """
        problems, repeats = problems or self.problems, repeats or self.repeats
        if problems < 2:
            return math.nan
        if self.within is None:
            if repeats != self.repeats:
                raise ValueError("one repeat does not tell what more of them would bring")
            variance = self.between
        else:
            variance = self.between + self.within / repeats
        effect = TTestPower().solve_power(nobs=problems, alpha=ALPHA, power=POWER, alternative="two-sided")
        return float(effect) * math.sqrt(variance)


def resolution(ours: Mapping[Any, Sequence[float]], theirs: Mapping[Any, Sequence[float]]) -> Resolution | None:
    """From the grades of every repeat of both sides, by problem; None where nothing differs or there is one problem.

    A problem's variance over its repeats is taken out of the variance over problems, so that other numbers of repeats
    can be predicted. A side with one repeat (deterministic, or run once) counts as without noise; if both have one,
    `within` is None.
    """
    if ours.keys() != theirs.keys():
        raise ValueError("a resolution needs the same problems on both sides")
    differences = np.array([np.mean(ours[problem]) - np.mean(theirs[problem]) for problem in ours])
    if len(differences) < 2 or not np.ptp(differences):
        return None
    total = float(differences.var(ddof=1))
    counts = [min(len(values) for values in side.values()) for side in (ours, theirs)]
    if max(counts) < 2:
        return Resolution(len(differences), total, None, 1)
    noise = [
        float(np.mean([np.var(values, ddof=1) for values in side.values()])) if count > 1 else 0.0
        for side, count in zip((ours, theirs), counts, strict=True)
    ]
    own = sum(variance / count for variance, count in zip(noise, counts, strict=True))
    return Resolution(len(differences), max(0.0, total - own), sum(noise), max(counts))


def _finite(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if not len(data):
        raise ValueError("an interval needs at least one problem, got none")
    return data


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    if len(ours) != len(theirs):
        raise ValueError(f"a paired interval needs the same problems on both sides, got {len(ours)} and {len(theirs)}")
    return _finite(ours) - _finite(theirs)


def _none_of(problems: int) -> float:
    """Wilson's upper 95% bound on a share that was 0 of `problems`."""
    return float(stats.binomtest(0, problems).proportion_ci(method="wilson").high)
