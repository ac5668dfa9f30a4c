"""Intervals and tests against closed forms, and their coverage and power in simulated experiments."""

import numpy as np
import pytest
from scipy import stats

from vkvtrain.ablation.statistics import (
    crossed_interval,
    gap_closed,
    holm,
    interval,
    paired_interval,
    permutation_p,
    problem_means,
    resolution,
)

EXPERIMENTS = 200
"""Coverage of 95% has a standard error of 1.5 points; a bootstrap over few problems is a little narrow."""


def graded(rng, chances, repeats):
    """Grades [problems, repeats] of problems that are solved with these chances."""
    return (rng.random((len(chances), repeats)) < chances[:, None]).astype(float)


def covers(found, truth):
    return found["low"] <= truth <= found["high"]


def test_intervals():
    mixed = interval([0.0, 1.0] * 100)
    assert mixed["low"] < mixed["value"] == 0.5 < mixed["high"]
    assert mixed["high"] - mixed["low"] == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)
    assert interval([0.0, 1.0] * 100) == mixed  # seeded
    perfect = interval([1.0] * 100)
    assert perfect["value"] == perfect["high"] == 1
    assert 0.95 < perfect["low"] < 0.97  # Wilson's interval: a perfect sample is no proof of a perfect model
    ours, theirs = [1.0, 1.0, 1.0, 0.0] * 50, [0.0, 1.0, 0.0, 0.0] * 50
    paired = paired_interval(ours, theirs)
    assert 0.4 < paired["low"] < paired["value"] == 0.5 < paired["high"] < 0.6
    equal = paired_interval(ours, ours)
    assert equal["value"] == 0
    assert -0.02 < equal["low"] == -equal["high"] < 0
    assert paired_interval([2.5, 3.5], [2.5, 3.5]) == {"value": 0, "low": 0, "high": 0}  # losses are no grades
    with pytest.raises(ValueError, match="same problems"):
        paired_interval(ours, theirs[1:])
    with pytest.raises(ValueError, match="at least one problem"):
        interval([])


def test_repeats_are_averaged_before_anything_else():
    assert problem_means([("b", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.5)]) == {"b": 0.5, "a": 0.0}


def test_an_interval_over_problems_covers_and_one_over_repeats_would_not():
    rng = np.random.default_rng(0)
    clustered = pooled = 0
    for _ in range(EXPERIMENTS):
        grades = graded(rng, rng.beta(0.5, 0.5, 40), 8)
        clustered += covers(interval(grades.mean(1).tolist()), 0.5)
        pooled += covers(interval(grades.ravel().tolist()), 0.5)
    assert 0.89 < clustered / EXPERIMENTS < 0.99
    assert pooled / EXPERIMENTS < 0.7


def test_a_paired_interval_covers_and_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)
    hits, paired, unpaired = 0, [], []
    for _ in range(EXPERIMENTS):
        easy = rng.beta(0.5, 0.5, 40)
        ours, theirs = graded(rng, 0.1 + 0.9 * easy, 4).mean(1), graded(rng, 0.8 * easy, 4).mean(1)
        found = paired_interval(ours.tolist(), theirs.tolist())
        hits += covers(found, 0.1 + 0.1 * 0.5)
        paired.append(found["high"] - found["low"])
        unpaired.append(2 * 1.96 * np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 40))
    assert 0.89 < hits / EXPERIMENTS < 0.99
    assert np.mean(paired) < 0.6 * np.mean(unpaired)


def test_the_interval_of_the_gap_covers():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(EXPERIMENTS):
        easy = rng.beta(2, 2, 60)
        full, base, adapted = (graded(rng, scale * easy, 4).mean(1).tolist() for scale in (1.0, 0.4, 0.85))
        found.append(gap_closed(adapted, base, full))
    defined = [gap for gap in found if gap is not None]
    assert len(defined) > 0.97 * EXPERIMENTS
    assert 0.89 < np.mean([covers(gap, 0.75) for gap in defined]) < 0.99


def test_the_gap_is_undefined_where_eviction_costs_nothing():
    rng = np.random.default_rng(3)
    easy = rng.beta(2, 2, 30)
    full, base, adapted = (graded(rng, easy, 2).mean(1).tolist() for _ in range(3))
    assert gap_closed(adapted, base, full) is None
    assert gap_closed([1.0] * 9, [1.0, 1.0, 0.0] * 3, [1.0] * 9) is None  # a third of nine: not clearly above 0
    assert gap_closed([1.0] * 30, [1.0] * 30, [0.0] * 30) is None  # eviction helped: there is no loss to win back


def test_a_gap_without_variation_is_no_certainty():
    full, base = [1.0] * 100, [0.0, 0.0, 0.0, 1.0] * 25
    closed = gap_closed(full, base, full)
    assert closed is not None
    assert closed["value"] == 1
    assert 0.9 < closed["low"] < 0.96
    assert closed["high"] - 1 == pytest.approx(1 - closed["low"])
    open_gap = gap_closed(base, base, full)
    assert open_gap is not None
    assert open_gap["value"] == 0
    assert -0.06 < open_gap["low"] < 0 < open_gap["high"] < 0.06
    half = gap_closed([0.5] * 100, [0.0] * 100, [1.0] * 100)  # nothing varies, and nothing is 0 or 1
    assert half is not None
    assert half == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(("better", "worse"), [(3, 0), (7, 2), (6, 6), (10, 3), (40, 18)])
def test_on_right_and_wrong_answers_the_permutation_test_is_the_sign_test(better, worse):
    """Which is McNemar's exact test. Up to 13 differing problems scipy enumerates; beyond, it draws."""
    ours = [1.0] * better + [0.0] * worse + [1.0] * 20
    theirs = [0.0] * better + [1.0] * worse + [1.0] * 20
    exact = stats.binomtest(better, better + worse).pvalue
    assert permutation_p(ours, theirs) == pytest.approx(exact, rel=1e-9 if better + worse <= 13 else 0.3)
    assert permutation_p(ours, theirs) == permutation_p(theirs, ours)


def test_the_permutation_test_rejects_as_often_as_it_says():
    rng = np.random.default_rng(4)
    found = []
    for _ in range(100):
        easy = rng.random(20)
        found.append(permutation_p(*(graded(rng, easy, 3).mean(1).tolist() for _ in range(2))))
    assert np.mean(np.array(found) <= 0.05) < 0.1
    assert permutation_p([1.0, 0.0], [1.0, 0.0]) == permutation_p([1.0, 0.0], [0.0, 0.0]) == 1


def test_holm_by_hand():
    """Sorted, times (comparisons left), never falling: 3 x 0.01, 2 x 0.02, 1 x 0.03 raised to 0.04."""
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_resolution_is_that_of_the_normal_formula_for_many_problems():
    rng = np.random.default_rng(5)
    ours = {problem: [grade] for problem, grade in enumerate(rng.integers(0, 2, 2000).astype(float))}
    theirs = {problem: [grade] for problem, grade in enumerate(rng.integers(0, 2, 2000).astype(float))}
    found = resolution(ours, theirs)
    assert found is not None
    deviation = np.std([ours[p][0] - theirs[p][0] for p in ours], ddof=1)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert found.difference() == pytest.approx(z * deviation / 2000**0.5, rel=2e-3)
    assert found.difference(500) == pytest.approx(2 * found.difference(), rel=5e-3)
    with pytest.raises(ValueError, match="one repeat"):
        found.difference(repeats=16)


def test_a_difference_that_is_said_to_be_seen_is_seen_four_times_in_five():
    rng = np.random.default_rng(6)
    deviation, problems = 0.3, 25
    ours = {p: [value] for p, value in enumerate(rng.normal(0, deviation, 20_000))}
    found = resolution(ours, {p: [0.0] for p in ours})
    assert found is not None
    seen = stats.ttest_1samp(rng.normal(found.difference(problems), deviation, (4000, problems)), 0, axis=1).pvalue
    assert np.mean(seen < 0.05) == pytest.approx(0.8, abs=0.03)


def test_more_repeats_are_predicted_from_fewer():
    rng = np.random.default_rng(7)
    easy = rng.beta(1, 1, 3000)

    def experiment(repeats):
        sides = (graded(rng, 0.2 + 0.8 * easy, repeats), graded(rng, easy, repeats))
        return resolution(*({p: row.tolist() for p, row in enumerate(side)} for side in sides))

    few, many = experiment(4), experiment(16)
    assert few is not None
    assert many is not None
    assert (few.repeats, many.repeats) == (4, 16)
    assert few.difference(30, 16) == pytest.approx(many.difference(30), rel=0.05)
    assert many.difference(30, 4) == pytest.approx(few.difference(30), rel=0.05)
    assert few.difference(30, 16) < 0.7 * few.difference(30)


def test_nothing_is_said_where_nothing_differs():
    same = {0: [1.0], 1: [0.0]}
    assert resolution(same, same) is None
    assert resolution({0: [1.0]}, {0: [0.0]}) is None
    with pytest.raises(ValueError, match="same problems"):
        resolution(same, {0: [1.0]})


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.15])
def test_an_interval_over_runs_and_problems_covers_other_runs(spread):
    """Grades of three training runs that differ by `spread`, on the same problems, some of which are harder."""
    rng = np.random.default_rng(3)
    covered = narrow = 0
    for _ in range(EXPERIMENTS):
        chances = 0.5 + spread * rng.standard_normal((3, 1)) + rng.uniform(-0.3, 0.3, 150)
        grades = (rng.random((3, 150)) < chances).astype(float)
        covered += covers(crossed_interval(grades.tolist()), 0.5)
        narrow += covers(interval(grades.mean(0).tolist()), 0.5)
    assert covered / EXPERIMENTS >= 0.92
    if spread == 0.15:
        assert narrow / EXPERIMENTS < 0.7  # what an interval over problems alone is worth here


def test_an_interval_over_runs_and_problems_by_hand():
    table = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    found = crossed_interval(table.tolist())
    # mean squares of the two-way layout: runs 1/3, problems 19/36, rest 1/9, with 2, 3 and 6 degrees of freedom
    total = 1 / 3 + 19 / 36 - 1 / 9
    freedom = total**2 / ((1 / 3) ** 2 / 2 + (19 / 36) ** 2 / 3 + (1 / 9) ** 2 / 6)
    half = stats.t.ppf(0.975, freedom) * (total / 12) ** 0.5
    assert found["value"] == pytest.approx(7 / 12)
    assert found["high"] - found["value"] == pytest.approx(half)
    assert found["value"] - found["low"] == pytest.approx(half)


def test_an_interval_of_one_run_or_of_equal_grades_is_that_over_problems():
    grades = [0.0, 1.0, 1.0, 0.0, 1.0] * 20
    assert crossed_interval([grades]) == interval(grades)
    assert crossed_interval([[1.0] * 50] * 3) == interval([1.0] * 50)
    # runs that agree problem by problem say nothing new, and are not taken for three times as many problems
    same = crossed_interval([grades] * 3)
    assert same["high"] - same["low"] == pytest.approx(interval(grades)["high"] - interval(grades)["low"], rel=0.1)
