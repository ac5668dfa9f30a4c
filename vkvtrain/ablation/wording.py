"""The words and numbers of a report: rows of its tables, its headlines and hints, as text."""

from collections.abc import Sequence
from typing import Any

from vkvtrain.ablation.grid import BASE, DENSE, FULL
from vkvtrain.ablation.statistics import ALPHA, Estimate
from vkvtrain.ablation.summary import UNTRAINED, WITH_DENSE, Comparison, Key, Setting, Summary

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def points(value: float, sign: bool = False) -> str:
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def percent(estimate: Estimate | None) -> str:
    """An estimate with its interval, in percent."""
    if estimate is None:
        return ""
    return f"{points(estimate['value'])}% [{points(estimate['low'])}, {points(estimate['high'])}]"


def difference(estimate: Estimate) -> str:
    """A difference with its interval, in points."""
    low, high = (points(estimate[end], sign=True) for end in ("low", "high"))
    return f"{points(estimate['value'], sign=True)} [{low}, {high}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def unit_of(most: float) -> tuple[float, str]:
    """The unit in which a number of bytes is best read."""
    return next((size, name) for size, name in UNITS if most >= size or size == 1)


def size_of(value: float | None) -> str:
    """A number of bytes in the unit in which it is best read."""
    if value is None:
        return ""
    size, name = unit_of(value)
    return f"{value / size:,.1f} {name}"


def budget_of(key: Key) -> str:
    return "" if key.budget is None else str(key.budget)


def name_of(key: Key) -> str:
    """A setting in one line."""
    return f"{key.model}, full cache" if key.budget is None else f"{key.model}, {key.policy}, {key.budget}"


def setting_row(setting: Setting, summary: Summary) -> dict[str, Any]:
    """A row of the main table as text."""
    key, means = setting.key, setting.means
    dense = summary.compared(key, WITH_DENSE)
    untrained = summary.compared(key, UNTRAINED)
    notes = []
    if setting.finished < setting.cells:
        notes.append(f"{setting.cells - setting.finished} of {setting.cells} cells missing")
    if setting.never_evicted:
        notes.append("never evicted: the budget was not reached")
    return {
        "model": key.model,
        "policy": "full cache" if key.budget is None else key.policy,
        "budget": budget_of(key),
        "control": setting.control,
        "hole": setting.finished == 0,
        "grade": percent(setting.grade) or "missing",
        "untrained": difference(untrained.difference) if untrained else "",
        "dense": difference(dense.difference) if dense else "",
        "gap": "undefined" if setting.gap_undefined else percent(setting.gap),
        "tokens": number(means.get("tokens")),
        "looping_or_cut_off": share(means.get("looping_or_cut_off")),
        "looping": share(means.get("looping")),
        "answered": share(means.get("answered")),
        "evictions": number(means.get("evictions"), 1),
        "compression": times(setting.compression),
        "peak": size_of(means.get("peak_kv_bytes")),
        "peak_ratio": times(setting.peak_ratio),
        "n": f"{setting.problems} x {setting.repeats:g}" if setting.finished else "",
        "notes": "; ".join(notes),
    }


def comparison_row(one: Comparison) -> dict[str, Any]:
    """A row of the table of comparisons as text."""
    seen = None if one.resolution is None else one.resolution.difference()
    return {
        "setting": name_of(one.ours),
        "with": one.kind,
        "n": f"{one.problems} x {one.repeats}",
        "difference": difference(one.difference),
        "p": p_value(one.p),
        "p_holm": p_value(one.p_holm),
        "significant": one.p_holm < ALPHA,
        "resolves": "" if seen is None else points(seen),
    }


def resolution_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What differences experiments of this and of other sizes resolve, for the hardest comparison with a control."""
    known = [one for one in comparisons if one.resolution is not None and one.ours.budget is not None]
    if not known:
        return []
    worst = max(known, key=lambda one: one.resolution.difference() if one.resolution else 0.0)
    found = worst.resolution
    assert found is not None
    sizes = [(found.problems, found.repeats), (30, found.repeats), (4 * found.problems, found.repeats)]
    if found.within is not None:
        sizes += [(30, 16), (found.problems, 16)]
    said = []
    for problems, repeats in dict.fromkeys(sizes):
        seen = points(found.difference(problems, repeats))
        said.append(f"{problems} problems x {repeats} repeats resolve differences above {seen} points")
    return ["Here, " + said[0], *said[1:]]


def headlines(summary: Summary, task: str) -> list[str]:
    """The result in a sentence for each adapter, at its first policy and smallest budget."""
    said = []
    for model in summary.plan["sweep"]["adapters"]:
        rows = [s for s in summary.settings if s.key.task == task and s.key.model == model and s.key.budget is not None]
        rows = [s for s in rows if s.finished and s.key.policy == rows[0].key.policy]
        if model == DENSE or not rows:
            continue
        ours = min(rows, key=lambda s: s.key.budget or 0)
        key = ours.key
        others = [(BASE, "the untrained model"), (DENSE, "the dense-trained control")]
        beside = [
            f"{percent(theirs.grade)} for {name}"
            for other, name in others
            if (theirs := summary.setting(Key(task, other, key.policy, key.budget))) is not None and theirs.finished
        ]
        full = summary.setting(Key(task, BASE, FULL, None))
        beside += [f"{percent(full.grade)} with the full cache"] if full is not None and full.finished else []
        gap = f" It closes {percent(ours.gap)} of the gap." if ours.gap is not None else ""
        said.append(
            f"{model} under {key.policy} at budget {key.budget}: {percent(ours.grade)}"
            + (f", against {', '.join(beside)}." if beside else ".")
            + gap
        )
    return said
