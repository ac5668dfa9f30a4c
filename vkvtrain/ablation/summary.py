"""What a sweep found: estimates of each setting, comparisons with the controls, gaps closed, and what is missing.

Knows the store and the statistics; knows nothing of how they are shown.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from vkvtrain.ablation.export import Status, statuses
from vkvtrain.ablation.grid import BASE, DENSE, FULL, PolicyEntry
from vkvtrain.ablation.statistics import (
    Estimate,
    Resolution,
    gap_closed,
    holm,
    interval,
    paired_interval,
    permutation_p,
    resolution,
)
from vkvtrain.ablation.store import Store

BAR = PolicyEntry(policy="random", protect_prompt=True).label
"""Random eviction with a protected prompt: the strongest training-free bar on reasoning."""
AVERAGED = ("tokens", "final_length", "evictions", "peak_kv_bytes", "looping_or_cut_off", "answered", "looping")

Grades = dict[int, dict[int | None, list[float]]]
"""Grades by problem and seed (None: the same for every seed), one of each repeat."""


@dataclass(frozen=True)
class Key:
    """A setting of the grid, its seeds and problems left out."""

    task: str
    model: str
    policy: str
    budget: int | None


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same problems and seeds.

    Attributes:
        ours: the setting.
        theirs: what it is compared with.
        kind: what the comparison asks.
        problems: problems that both have.
        repeats: responses to each of them, seeds included, of the side with more.
        difference: mean difference of the grade, ours less theirs.
        p: two-sided p of the paired permutation test.
        p_holm: p adjusted for all comparisons of the sweep.
        resolution: what differences an experiment like this can see; None where nothing differs.
    """

    ours: Key
    theirs: Key
    kind: str
    problems: int
    repeats: int
    difference: Estimate
    p: float
    p_holm: float
    resolution: Resolution | None


@dataclass(frozen=True)
class Setting:
    """What was measured under one setting.

    Attributes:
        key: the setting.
        control: whether it is there to be compared with.
        cells: cells that belong to it, and how many of them are finished.
        problems: problems with a grade.
        repeats: responses to a problem, seeds included.
        grade: mean over problems of the mean over repeats and seeds; None if no cell is finished.
        means: means over samples of what was measured; None where nothing was recorded.
        compression: final length / budget; None without a budget.
        peak_ratio: peak bytes with the full cache / peak bytes, of the same model; None where either is missing.
        gap: share of the loss to eviction that is won back; None where it is undefined or means nothing.
        gap_undefined: whether it would mean something, but eviction cost the untrained model too little.
        never_evicted: whether a budget was set and never reached.
    """

    key: Key
    control: bool
    cells: int
    finished: int
    problems: int = 0
    repeats: float = 0
    grade: Estimate | None = None
    means: Mapping[str, float | None] = field(default_factory=dict)
    compression: float | None = None
    peak_ratio: float | None = None
    gap: Estimate | None = None
    gap_undefined: bool = False
    never_evicted: bool = False


@dataclass(frozen=True)
class Summary:
    """Everything that a report says in numbers."""

    plan: dict[str, Any]
    settings: list[Setting]
    comparisons: list[Comparison]
    missing: list[Status]

    def setting(self, key: Key) -> Setting | None:
        """The setting of a key, if the sweep has it."""
        return next((setting for setting in self.settings if setting.key == key), None)

    def compared(self, key: Key, kind: str) -> Comparison | None:
        """The comparison of a setting, if there is one of that kind."""
        return next((one for one in self.comparisons if one.ours == key and one.kind == kind), None)


UNTRAINED, WITH_DENSE, WITH_BAR, WITH_FULL, FULL_CACHE = (
    "untrained, evicted alike",
    "dense-trained, evicted alike",
    f"untrained, {BAR}",
    "untrained, full cache",
    "untrained, both full cache",
)
"""The kinds of comparisons, by what a setting is compared with."""


def summarise(store: Store) -> Summary:
    """The summary of the sweep as it was last run; what is not finished is listed as missing."""
    plan = store.plan()
    by_key: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for cell in plan["cells"]:
        by_key[Key(cell["task"], cell["model"], cell["policy"], cell["budget"])].append(cell)
    finished = store.finished()
    samples = read_samples(store, [cell["cell"] for cell in plan["cells"] if cell["cell"] in finished])
    grades = {key: grades_of(cells, samples) for key, cells in by_key.items()}
    settings = [measure(key, cells, samples, grades[key]) for key, cells in by_key.items()]
    settings = [relate(setting, settings, grades) for setting in settings]
    comparisons = adjusted(compare_all(grades))
    missing = [status for status in statuses(store) if status.state != "finished"]
    return Summary(plan, settings, comparisons, missing)


def read_samples(store: Store, cells: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Numbers of the samples by cell, without their texts."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = ", ".join(("cell", "seed", "doc_id", "repeat", "grade", *AVERAGED))
    with store.connect(cells) as connection:
        rows = connection.sql(f"SELECT {names} FROM samples ORDER BY cell, doc_id, repeat").to_arrow_table().to_pylist()
    for row in rows:
        found[row["cell"]].append(row)
    return found


def grades_of(cells: Sequence[dict[str, Any]], samples: Mapping[str, Sequence[dict[str, Any]]]) -> Grades:
    """The grades of a setting's finished cells."""
    found: Grades = {}
    for cell in cells:
        for row in samples.get(cell["cell"], ()):
            found.setdefault(row["doc_id"], {}).setdefault(cell["seed"], []).append(row["grade"])
    return found


def flat(grades: Grades) -> dict[int, list[float]]:
    """All grades of each problem."""
    return {doc: [grade for repeats in seeds.values() for grade in repeats] for doc, seeds in grades.items()}


def on_the_same(*sides: Grades) -> list[dict[int, list[float]]] | None:
    """The grades of several settings on the problems and seeds that all of them have; None if there are none.

    A setting without randomness stands for every seed.
    """
    problems = [doc for doc in sides[0] if all(doc in side for side in sides)]
    chosen: list[dict[int, list[float]]] = [{} for _ in sides]
    for doc in problems:
        drawn = [set(side[doc]) for side in sides if set(side[doc]) != {None}]
        seeds = set.intersection(*drawn) if drawn else {None}
        if not seeds:
            continue
        for side, found in zip(sides, chosen, strict=True):
            own = side[doc]
            found[doc] = [grade for seed in own if seed is None or seed in seeds for grade in own[seed]]
    return chosen if chosen[0] else None


def means_of(grades: Mapping[int, Sequence[float]]) -> list[float]:
    """Mean grade of each problem."""
    return [mean(repeats) for repeats in grades.values()]


def measure(
    key: Key, cells: Sequence[dict[str, Any]], samples: Mapping[str, Sequence[dict[str, Any]]], grades: Grades
) -> Setting:
    """What was measured under one setting, by itself."""
    finished = [cell for cell in cells if cell["cell"] in samples]
    setting = Setting(key, cells[0]["control"], len(cells), len(finished))
    if not finished:
        return setting
    rows = [row for cell in finished for row in samples[cell["cell"]]]
    means: dict[str, float | None] = {}
    for name in AVERAGED:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = mean(values) if values else None
    length, evictions = means["final_length"], means["evictions"]
    return replace(
        setting,
        problems=len(grades),
        repeats=len(rows) / len(grades),
        grade=interval(means_of(flat(grades))),
        means=means,
        compression=None if key.budget is None or length is None else length / key.budget,
        never_evicted=key.budget is not None and evictions == 0,
    )


def relate(setting: Setting, settings: Sequence[Setting], grades: Mapping[Key, Grades]) -> Setting:
    """A setting with what needs others: peak bytes beside the full cache's, and the gap that its adapter closes."""
    key = setting.key
    full = next((one for one in settings if one.key == Key(key.task, key.model, FULL, None)), None)
    ours = setting.means.get("peak_kv_bytes")
    theirs = full.means.get("peak_kv_bytes") if full is not None else None
    if ours and theirs and key.budget is not None:
        setting = replace(setting, peak_ratio=theirs / ours)
    if key.model == BASE or key.budget is None:
        return setting
    evicted, best = Key(key.task, BASE, key.policy, key.budget), Key(key.task, BASE, FULL, None)
    if not all(grades.get(one) for one in (key, evicted, best)):
        return setting
    sides = on_the_same(grades[key], grades[evicted], grades[best])
    if sides is None:
        return setting
    adapted, base, full_cache = map(means_of, sides)
    gap = gap_closed(adapted, base, full_cache)
    return replace(setting, gap=gap, gap_undefined=gap is None)


def compare_all(grades: Mapping[Key, Grades]) -> list[Comparison]:
    """Every comparison with a control that the finished cells allow, p not yet adjusted."""
    trained = {key.model for key in grades} - {BASE}
    found = []
    for key in grades:
        wanted: list[tuple[str, Key]] = []
        evicted = key.budget is not None
        if key.model != BASE:
            kind = UNTRAINED if evicted else FULL_CACHE
            wanted.append((kind, replace(key, model=BASE)))
            if evicted and key.model != DENSE:
                wanted.append((WITH_DENSE, replace(key, model=DENSE)))
        if evicted and key.model != DENSE and key.policy != BAR and (key.model != BASE or not trained):
            wanted.append((WITH_BAR, Key(key.task, BASE, BAR, key.budget)))
        if evicted and not trained:
            wanted.append((WITH_FULL, Key(key.task, BASE, FULL, None)))
        for kind, other in wanted:
            if grades.get(key) and grades.get(other) and (one := compare(key, other, kind, grades)) is not None:
                found.append(one)
    return found


def compare(ours: Key, theirs: Key, kind: str, grades: Mapping[Key, Grades]) -> Comparison | None:
    """One comparison on the problems and seeds that both have; None if there are none."""
    sides = on_the_same(grades[ours], grades[theirs])
    if sides is None:
        return None
    us, them = map(means_of, sides)
    p = permutation_p(us, them)
    repeats = max(len(values) for side in sides for values in side.values())
    return Comparison(ours, theirs, kind, len(us), repeats, paired_interval(us, them), p, p, resolution(*sides))


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's adjustment for all of them."""
    values = holm([one.p for one in comparisons])
    return [replace(one, p_holm=value) for one, value in zip(comparisons, values, strict=True)]
