"""Tables and figures of the evidence, from the records of its arms; writes them into `docs/evidence.md` and the README.

What is not measured yet is said to be missing. Knows nothing of models.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from arms import BASE, BUDGETS, POLICY, ROOT, SHIPPED, TRANSFER, TRANSFERRED, WINDOW, Study, label
from matplotlib.figure import Figure

from vkvtrain.ablation.statistics import Estimate, crossed_interval, interval, paired_interval
from vkvtrain.training.run_directory import METRICS

DOCS = ROOT / "docs/evidence.md"
README = ROOT / "README.md"
NAMES = {
    BASE: "base, not trained on",
    "dense": "dense",
    "random": "random mask",
    "vase": "`vase_attnv`, sft",
    "distill": "`vase_attnv`, distill",
    "snapkv": "`snapkv`, sft",
}
"""Arms in the order of the tables."""
COLOURS = {"base": "#8c8c8c", "dense": "#4c78a8", "random": "#f2a93b", "vase": "#e45756"}
EVICTED = tuple(f"{POLICY} {budget}" for budget in BUDGETS)

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each arm, the records of the runs that were measured."""


def records(study: Study) -> Records:
    """The records that are there, by arm and in the order of the seeds."""
    names = {recipe: [arm.name for arm in study.arms if arm.recipe == recipe] for recipe in NAMES} | {BASE: [BASE]}
    found = {recipe: [one for name in names[recipe] if (one := study.record(name)).get("cells")] for recipe in NAMES}
    return {recipe: runs for recipe, runs in found.items() if runs}


def grades(runs: Sequence[Mapping[str, Any]], cell: str, what: str = "exact") -> list[list[float]]:
    """[runs][problems] of the runs that have a cell: 0 or 1, or for lines the share of a problem's lines."""
    rows = [run["cells"][cell][what] for run in runs if cell in run["cells"]]
    if what in ("right", "follows"):
        return [[problem.count("1") / len(problem) for problem in row.split()] for row in rows]
    return [[float(grade) for grade in row] for row in rows]


def percent(estimate: Estimate, sign: str = "") -> str:
    low, high = max(-1.0 if sign else 0.0, estimate["low"]), min(1.0, estimate["high"])
    return f"{100 * estimate['value']:{sign}.1f} [{100 * low:{sign}.0f}, {100 * high:{sign}.0f}]"


def estimate(runs: Sequence[Mapping[str, Any]], cell: str, what: str = "exact") -> str:
    table = grades(runs, cell, what)
    return percent(crossed_interval(table)) if table else "not measured"


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], cell: str) -> str:
    """Ours less theirs in points, paired by problem and by the training seed; a single run stands for every seed."""
    left, right = grades(ours, cell), grades(theirs, cell)
    if not left or not right:
        return "not measured"
    pairs = zip(left, right * len(left) if len(right) == 1 else right, strict=False)
    return percent(crossed_interval([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]), "+")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def budget_columns(found: Records) -> list[str]:
    """`full cache`, and each budget with its compression."""
    cells = found[BASE][0]["cells"]
    lengths = cells["full"]["final_length"]
    length = sum(lengths) / len(lengths)
    return ["full cache", *(f"{budget} entries ({length / budget:.1f}x)" for budget in BUDGETS)]


def main_table(found: Records) -> str:
    rows = [
        [
            NAMES[recipe],
            str(len(runs)) if recipe != BASE else "-",
            *(estimate(runs, cell) for cell in ("full", *EVICTED)),
        ]
        for recipe, runs in found.items()
    ]
    return markdown(["trained", "runs", *budget_columns(found)], rows)


def comparisons(found: Records) -> str:
    """What is asked of the arms, in points."""
    asked = [
        ("vase", "dense", "trained under eviction, less dense"),
        ("vase", "random", "the policy simulated, less a random mask"),
        ("random", "dense", "a random mask, less dense"),
        ("vase", BASE, "trained under eviction, less the base"),
    ]
    rows = [
        [words, *(difference(found[ours], found[theirs], cell) for cell in ("full", *EVICTED))]
        for ours, theirs, words in asked
        if ours in found and theirs in found
    ]
    return markdown(["difference in points", *budget_columns(found)], rows)


def detail_table(found: Records) -> str:
    """How answers go wrong, at the smaller budget."""
    cell = EVICTED[-1]
    rows = []
    for recipe, runs in found.items():
        cells = [run["cells"][cell] for run in runs if cell in run["cells"]]
        if not cells:
            continue
        tokens = [value for one in cells for value in one["tokens"]]
        looping = [value == "1" for one in cells for value in one["looping"]]
        shares = [estimate(runs, cell, what) for what in ("exact", "trace", "right", "follows")]
        rows.append(
            [NAMES[recipe], *shares, f"{sum(tokens) / len(tokens):.0f}", f"{100 * sum(looping) / len(looping):.1f}"]
        )
    header = ["trained", "answer", "whole trace", "right lines", "lines that follow", "tokens", "looping"]
    return markdown(header, rows)


def transfer_table(found: Records) -> str:
    """Every adapter of seed 0 under policies that it was not trained for."""
    cells = [EVICTED[0], *(label(*cell) for cell in TRANSFER)]
    rows = [
        [NAMES[recipe], *(estimate(runs[:1], cell) if cell in runs[0]["cells"] else "-" for cell in cells)]
        for recipe, runs in found.items()
        if recipe in TRANSFERRED
    ]
    return markdown(["trained (seed 0)", *cells], rows)


def by_age(runs: Sequence[Mapping[str, Any]], cell: str) -> dict[int, tuple[int, float]]:
    """Of each age, the number of lines that need a balance so old, over all runs, and the share that follows."""
    seen: list[tuple[int, bool]] = []
    for run in runs:
        if cell in run["cells"]:
            ages, follows = (run["cells"][cell][name].replace(" ", "") for name in ("ages", "follows"))
            seen += [(int(age), mark == "1") for age, mark in zip(ages, follows, strict=True)]
    groups = {age: [mark for _, mark in group] for age, group in groupby(sorted(seen), key=lambda pair: pair[0])}
    return {age: (len(marks), sum(marks) / len(marks)) for age, marks in groups.items()}


def age_table(found: Records) -> str:
    cell = EVICTED[-1]
    of = {recipe: by_age(runs, cell) for recipe, runs in found.items()}
    ages = sorted({age for one in of.values() for age in one})
    rows = [
        [NAMES[recipe], *(f"{100 * one[age][1]:.0f}" if age in one else "-" for age in ages)]
        for recipe, one in of.items()
        if one
    ]
    return markdown(["lines that follow, in percent; lines back", *map(str, ages)], rows)


def held_table(found: Records) -> str:
    cell = str(BUDGETS[-1])
    rows = []
    for recipe, runs in found.items():
        if "held" not in runs[0]:
            continue
        for what, words in (("held", "the balance"), ("around", "tokens around it")):
            of = runs[0]["held"][cell]
            rows.append([NAMES[recipe], words, *(f"{100 * one[what]:.0f}" for one in of.values())])
        ages = list(of)
    return markdown(["trained (seed 0)", "held, in percent; lines back", *ages], rows) if rows else "Not measured yet."


def text_table(found: Records) -> str:
    """Loss on other text, of seed 0, and what the training changed of it under eviction."""
    losses = {recipe: runs[0]["other_text"] for recipe, runs in found.items() if "other_text" in runs[0]}
    if BASE not in losses:
        return "Not measured yet."
    rows = []
    for recipe, of in losses.items():
        change = paired_interval(of["evicted"], losses[BASE]["evicted"])
        both = [f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in map(interval, of.values())]
        rows.append([NAMES[recipe], *both, f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"])
    return markdown(["trained (seed 0)", *next(iter(losses.values())), "evicted, less the base evicted"], rows)


def figure(found: Records, path: Path) -> None:
    """Lines that follow by age, and what is held of the balances that they need, both at the smaller budget."""
    drawing = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for recipe, colour in COLOURS.items():
        for place, run in enumerate(found.get(recipe, ())):
            points = by_age([run], EVICTED[-1])
            style = {"color": colour, "alpha": 1.0 if place == 0 else 0.4}
            left.plot(list(points), [100 * share for _, share in points.values()], marker="o", markersize=4, **style,
                      label=NAMES[recipe].replace("`", "") if place == 0 else None)  # fmt: skip
            if "held" in run:
                held = run["held"][str(BUDGETS[-1])]
                right.plot([int(age) for age in held], [100 * one["held"] for one in held.values()], marker="o",
                           markersize=4, **style)  # fmt: skip
    left.set_title(f"Lines that follow, {POLICY}, {BUDGETS[-1]} entries", fontsize=10)
    right.set_title("Needed balances still held, mean over layers and KV heads", fontsize=10)
    left.set_ylabel("percent")
    left.set_ylim(0, 102)
    for axes in (left, right):
        axes.set_xlabel("age of the balance, in lines")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    drawing.savefig(path, dpi=150)


def still_missing(study: Study, found: Records) -> str:
    """What the plan has and the records have not."""
    lines = [
        f"- {NAMES[recipe]}: {len(found.get(recipe, ()))} of {planned} training seeds"
        for recipe in NAMES
        if recipe != BASE and (planned := sum(arm.recipe == recipe for arm in study.arms)) > len(found.get(recipe, ()))
    ]
    wanted = {label(*cell) for cell in TRANSFER}
    lines += [
        f"- transfer of {NAMES[recipe]}: {len(gap)} of {len(wanted)} cells are not measured"
        for recipe in TRANSFERRED
        if recipe in found and (gap := wanted - set(found[recipe][0]["cells"]))
    ]
    return "\n".join(lines) or "Nothing: every arm of the plan is measured."


def settings_line(found: Records) -> str:
    """What was measured, in a sentence."""
    cells = found[BASE][0]["cells"]
    problems = len(cells["full"]["exact"])
    days = sorted({cell["finished"][:10] for runs in found.values() for run in runs for cell in run["cells"].values()})
    peaks = {name: sum(cells[name]["peak_kv_bytes"]) / problems for name in ("full", *EVICTED)}
    ratios = " and ".join(f"{peaks['full'] / peaks[cell]:.1f}x" for cell in EVICTED)
    return (
        f"{problems} test problems, greedy, bfloat16, window {WINDOW}; at its peak the full cache is {ratios} as large "
        f"as the evicted ones; measured on two CPU cores, {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    )


def base_log() -> str:
    """The base's training, in a sentence."""
    rows = [json.loads(line) for line in (ROOT / SHIPPED / METRICS).read_text().splitlines()]
    return f"{len(rows)} steps of four problems, loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.4f}"


def write(study: Study) -> None:
    """Write figure, tables and README from the records that are there."""
    found = records(study)
    figure(found, ROOT / "docs/evidence.png")
    parts = {
        "settings": settings_line(found),
        "base": base_log(),
        "answers": main_table(found),
        "comparisons": comparisons(found),
        "details": detail_table(found),
        "ages": age_table(found),
        "held": held_table(found),
        "transfer": transfer_table(found),
        "text": text_table(found),
        "missing": still_missing(study, found),
    }
    fill(DOCS, parts)
    fill(README, {"evidence": f"{parts['answers']}\n\n{parts['comparisons']}\n\n{parts['settings']}"})
    print(f"written: {DOCS.relative_to(ROOT)}, docs/evidence.png and README.md, from docs/evidence")


def fill(path: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        block = f"<!-- {name} -->\n{part}\n<!-- end of {name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- end of {name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{path}: the part {name!r} is there {count} times, not once")
    path.write_text(text, encoding="utf-8")
