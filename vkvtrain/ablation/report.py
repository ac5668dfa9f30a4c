"""The report of a sweep: Markdown, and one self-contained HTML page. All text from data is escaped."""

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from vkvtrain.ablation import figures
from vkvtrain.ablation.grid import BASE, DENSE, FULL
from vkvtrain.ablation.statistics import POWER, RESAMPLES
from vkvtrain.ablation.store import Store
from vkvtrain.ablation.summary import Key, Summary, summarise
from vkvtrain.ablation.wording import comparison_row, headlines, name_of, resolution_notes, setting_row, unit_of

PAIRS = 12
"""Most side-by-side samples of a task and a trained model."""
COSTS = [
    {"name": name, "title": title}
    for name, title in (
        ("tokens", "tokens"), ("looping_or_cut_off", "looping or cut off"), ("looping", "looping"),
        ("answered", "answered"), ("evictions", "evictions"), ("peak", "peak cache"),
        ("peak_ratio", "peak bytes full / evicted"), ("compression", "final length / budget"),
    )
]  # fmt: skip
"""The columns of the second table; those that nothing was recorded for are left out."""
SHOWN = 3000
"""Characters of a response that are shown: its first and last halves."""


def sample_pairs(store: Store, summary: Summary, task: str) -> list[dict[str, Any]]:
    """Samples that a trained and the untrained model, evicted alike, grade differently; gains and losses in turn."""
    cells = [cell["cell"] for cell in summary.plan["cells"] if cell["task"] == task]
    query = """
        SELECT ours.model, ours.policy, ours.budget, ours.seed, ours.doc_id, ours.repeat, ours.prompt, ours.target,
               ours.response AS ours, base.response AS theirs, ours.grade AS our_grade, base.grade AS their_grade
        FROM samples ours JOIN samples base
          ON base.model = ? AND base.policy = ours.policy AND base.budget IS NOT DISTINCT FROM ours.budget
         AND base.seed IS NOT DISTINCT FROM ours.seed AND base.doc_id = ours.doc_id AND base.repeat = ours.repeat
        WHERE ours.model NOT IN (?, ?) AND ours.budget IS NOT NULL AND ours.grade <> base.grade
        QUALIFY row_number() OVER (
            PARTITION BY ours.model, ours.policy, ours.budget, ours.grade > base.grade
            ORDER BY ours.doc_id, ours.seed, ours.repeat) = 1
    """
    with store.connect(cells) as connection:
        rows = connection.sql(query, params=[BASE, BASE, DENSE]).to_arrow_table().to_pylist()
    order = {setting.key: place for place, setting in enumerate(summary.settings)}
    rows.sort(
        key=lambda row: (
            order[Key(task, row["model"], row["policy"], row["budget"])], row["our_grade"] < row["their_grade"]
        )
    )  # fmt: skip
    kept = [[row for row in rows if row["model"] == model][:PAIRS] for model in models_of(summary)]
    rows = [row for several in kept for row in several]
    return [
        {
            **{name: row[name] for name in ("model", "policy", "budget", "doc_id", "repeat", "prompt", "target")},
            "seed": "" if row["seed"] is None else f", seed {row['seed']}",
            "ours": shortened(row["ours"]),
            "theirs": shortened(row["theirs"]),
            "our_grade": f"{row['our_grade']:g}",
            "their_grade": f"{row['their_grade']:g}",
            "better": row["our_grade"] > row["their_grade"],
        }
        for row in rows
    ]


def shortened(text: str) -> str:
    """A long text without its middle, and how much that was."""
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - SHOWN:,} characters ...]\n{text[-half:]}"


def memory_rows(summary: Summary, task: str) -> tuple[list[tuple[str, float, float, float]], str]:
    """Peak bytes by budget, (name, mean, least, most) over models and policies, and their unit."""
    by_budget: dict[int | None, list[float]] = {}
    for setting in summary.settings:
        value = setting.means.get("peak_kv_bytes")
        if setting.key.task == task and value:
            by_budget.setdefault(setting.key.budget, []).append(value)
    if not by_budget:
        return [], ""
    size, unit = unit_of(max(max(values) for values in by_budget.values()))
    order = sorted(by_budget, key=lambda budget: (budget is not None, -(budget or 0)))
    return [
        (
            "full cache" if budget is None else f"budget {budget}",
            sum(by_budget[budget]) / len(by_budget[budget]) / size,
            min(by_budget[budget]) / size,
            max(by_budget[budget]) / size,
        )
        for budget in order
    ], unit


def task_figures(summary: Summary, task: str) -> dict[str, list[tuple[str, Figure]]]:
    """The figures of a task by section, each with its caption."""
    models = models_of(summary)
    policies = [p for p in dict.fromkeys(s.key.policy for s in summary.settings if s.key.task == task) if p != FULL]

    def small(value: figures.Value, label: str, percent: bool) -> list[tuple[str, Figure]]:
        drawn = ((p, figures.curves(summary, task, p, models, value, label, percent)) for p in policies)
        return [(policy, figure) for policy, figure in drawn if figure is not None]

    gap = figures.gaps(summary, task, models)
    rows, unit = memory_rows(summary, task)
    return {
        "accuracy": small(lambda s: s.grade, "accuracy (%)", True),
        "looping": small(lambda s: s.means.get("looping_or_cut_off"), "looping or cut off (%)", True),
        "tokens": small(lambda s: s.means.get("tokens"), "tokens", False),
        "gap": [("gap closed", gap)] if gap is not None else [],
        "memory": [("peak cache", figures.memory(rows, unit))] if rows else [],
    }


def models_of(summary: Summary) -> list[str]:
    """The models in the order of the tables: untrained, dense-trained, the rest as the sweep has them."""
    names = list(dict.fromkeys(setting.key.model for setting in summary.settings))
    return sorted(names, key=lambda name: (name != BASE, name != DENSE))


def context(store: Store, summary: Summary) -> dict[str, Any]:
    """Everything that both templates show, figures left out."""
    plan, sweep = summary.plan, summary.plan["sweep"]
    abouts = [store.about(cell["cell"]) for cell in plan["cells"] if cell["cell"] in store.finished()]
    order = models_of(summary)
    tasks = []
    for task, info in plan["tasks"].items():
        rows = [setting for setting in summary.settings if setting.key.task == task]
        policies = list(dict.fromkeys(setting.key.policy for setting in rows))
        rows.sort(key=lambda s: (-(s.key.budget or 2**62), policies.index(s.key.policy), order.index(s.key.model)))
        shown = [setting_row(setting, summary) for setting in rows]
        comparisons = [one for one in summary.comparisons if one.ours.task == task]
        tasks.append(
            {
                "name": task,
                "metric": info["metric"],
                "sampled": info["sampled"],
                "settings": json.dumps(info["settings"], ensure_ascii=False),
                "rows": shown,
                "notes": any(row["notes"] for row in shown),
                "columns": [column for column in COSTS if any(row[column["name"]] for row in shown)],
                "comparisons": [comparison_row(one) for one in comparisons],
                "resolution": resolution_notes(comparisons),
                "headlines": headlines(summary, task),
                "pairs": sample_pairs(store, summary, task),
            }
        )
    warnings = []
    if not sweep["controls"]:
        warnings.append("Controls were switched off (controls: false): these numbers stand alone and are no result.")
    if plan["misses_dense_control"]:
        warnings.append(
            f"No adapter is called '{DENSE}': without one that was trained on the same data and steps without "
            "eviction, a gain may come from the data alone."
        )
    if summary.missing:
        warnings.append(f"{len(summary.missing)} of {len(plan['cells'])} cells are missing; they are listed below.")
    never = [name_of(setting.key) for setting in summary.settings if setting.never_evicted]
    if never:
        warnings.append(f"Nothing was ever evicted, because no sequence exceeded the budget: {'; '.join(never)}.")
    return {
        "title": Path(sweep["output"]).name,
        "sweep": sweep,
        "plan": plan,
        "models": [{"colour": colour, "name": name} for name, colour in figures.colours(order).items()],
        "tasks": tasks,
        "warnings": warnings,
        "missing": summary.missing,
        "count": len(summary.comparisons),
        "resamples": RESAMPLES,
        "power": f"{POWER:.0%}",
        "machines": sorted({about["machine"] for about in abouts}),
        "minutes": sum(about["seconds"] for about in abouts) / 60,
        "finished": max((about["finished"] for about in abouts), default="never"),
        "written": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "versions": plan["versions"],
        "other_versions": any(about["versions"] != plan["versions"] for about in abouts),
        "sweep_json": json.dumps(sweep, indent=1, ensure_ascii=False),
        "commands": [{"name": about["name"], "command": json.dumps(about["command"])} for about in abouts[:1]],
    }


def markdown_text(value: Any) -> Markup:
    """Text inside a line or a table cell of Markdown."""
    text = html.escape(str(value), quote=False)
    return Markup(re.sub(r"\s+", " ", re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)))


def fenced(value: Any) -> Markup:
    """Text as a block of code, behind a fence that it does not contain."""
    text = str(value)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}text\n{text}\n{fence}")


def write_report(store: Store, output: Path) -> list[Path]:
    """Write `report.md`, its figures, and `report.html` into a directory; returns what was written.

    Raises:
        ValueError: no cell is finished.
    """
    summary = summarise(store)
    if not any(setting.finished for setting in summary.settings):
        raise ValueError(f"no cell of {str(store.directory)!r} is finished: run vkvtrain ablate first")
    given = context(store, summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vkvtrain.ablation", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(md=markdown_text, fenced=fenced)
    inline: dict[str, Any] = {}
    linked: dict[str, Any] = {}
    written = []
    output.mkdir(parents=True, exist_ok=True)
    for index, task in enumerate(given["tasks"]):
        inline[task["name"]], linked[task["name"]] = {}, {}
        for section, drawn in task_figures(summary, task["name"]).items():
            inline[task["name"]][section] = [
                {"caption": caption, "svg": Markup(figures.svg(figure, figures.PAGE, f"{index}-{section}-{place}"))}
                for place, (caption, figure) in enumerate(drawn)
            ]
            linked[task["name"]][section] = []
            for place, (caption, figure) in enumerate(drawn):
                path = output / "figures" / f"{section}-{index}-{place}.svg"
                path.parent.mkdir(exist_ok=True)
                path.write_text(figures.svg(figure, figures.PAPER, section), encoding="utf-8")
                written.append(path)
                linked[task["name"]][section].append({"caption": caption, "path": f"figures/{path.name}"})
    for name, drawn in (("report.md", linked), ("report.html", inline)):
        text = environment.get_template(f"{name}.jinja").render(**given, figures=drawn)
        (output / name).write_text(text, encoding="utf-8")
    return [output / "report.md", output / "report.html", *written]
