"""The report's figures as SVG. Colours of text and lines are left to the page, which may be light or dark."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from vkvtrain.ablation.grid import BASE, DENSE, FULL
from vkvtrain.ablation.statistics import Estimate
from vkvtrain.ablation.summary import Key, Setting, Summary

INK, FAINT, LINE = "#010203", "#040506", "#070809"
"""Stand for the page's own colours; nothing else is drawn in them."""
PAGE = {INK: "var(--ink)", FAINT: "var(--faint)", LINE: "var(--line)"}
PAPER = {INK: "#1d1d1b", FAINT: "#8b8b86", LINE: "#dcdcd7"}
OTHERS = ("#2a9d8f", "#e76f51", "#9c6ade", "#d9a520", "#c2487e", "#5a8f29")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is no formula
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour for each model: grey for the untrained, blue for the dense-trained."""
    found, others = {BASE: "#8b8b86", DENSE: "#4c78a8"}, iter(OTHERS * (len(models) // len(OTHERS) + 1))
    for model in models:
        if model not in found:
            found[model] = next(others)
    return {model: found[model] for model in models}


def svg(figure: Figure, colour: Mapping[str, str], salt: str) -> str:
    """A figure as an SVG element without a document around it.

    Args:
        figure: drawn under `_STYLE`.
        colour: what the stand-in colours become, `PAGE` or `PAPER`.
        salt: tells the identifiers of several figures on a page apart.
    """
    out = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, own in colour.items():
        text = text.replace(stand_in, own)
    return text


Value = Callable[[Setting], Estimate | float | None]


def curves(
    summary: Summary, task: str, policy: str, models: Sequence[str], value: Value, label: str, percent: bool
) -> Figure | None:
    """A measure against the budget under one policy, a line for each model; dashed: the untrained model's full cache.

    None where nothing was measured.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.5, 2.6), layout="constrained")
        axes = figure.subplots()
        budgets = sorted({s.key.budget for s in summary.settings if s.key.budget is not None and s.key.task == task})
        scale = 100 if percent else 1
        drawn = 0
        full = summary.setting(Key(task, BASE, FULL, None))
        best = _parts(value(full)) if full is not None and full.finished else None
        if best is not None:
            axes.axhline(best[0] * scale, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        for place, (model, colour) in enumerate(colours(models).items()):
            points = []
            for index, budget in enumerate(budgets):
                setting = summary.setting(Key(task, model, policy, budget))
                parts = _parts(value(setting)) if setting is not None and setting.finished else None
                if parts is not None:
                    points.append((index + (place - (len(models) - 1) / 2) * 0.07, *parts))
            if not points:
                continue
            drawn += 1
            x, middle, low, high = (list(column) for column in zip(*points, strict=True))
            below = [scale * max(0.0, m - lo) for m, lo in zip(middle, low, strict=True)]
            above = [scale * max(0.0, hi - m) for m, hi in zip(middle, high, strict=True)]
            axes.errorbar(
                x, [scale * m for m in middle], yerr=[below, above], color=colour, marker="o", capsize=2.5,
                elinewidth=1.1, label=model, linestyle="-" if len(x) > 1 else "none",
            )  # fmt: skip
        axes.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        axes.set_xlim(-0.4, len(budgets) - 0.6)
        axes.set_xlabel("budget")
        axes.set_ylabel(label)
        if percent:
            axes.set_ylim(-3, 106)
            axes.set_yticks(range(0, 101, 25))
        else:
            every = [_parts(value(one)) for one in summary.settings if one.key.task == task and one.finished]
            axes.set_ylim(0, 1.12 * max(parts[2] for parts in every if parts is not None))
        return figure if drawn else None


def gaps(summary: Summary, task: str, models: Sequence[str]) -> Figure | None:
    """Gap closed: a bar with its interval for each policy, budget and trained model. None where it is not defined."""
    colour = colours(models)
    rows = [s for s in summary.settings if s.key.task == task and (s.gap is not None or s.gap_undefined)]
    if not any(row.gap is not None for row in rows):
        return None
    groups = list(dict.fromkeys((row.key.policy, row.key.budget) for row in rows))
    trained = [model for model in models if any(row.key.model == model for row in rows)]
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.4, 0.7 + len(groups) * (0.2 + 0.2 * len(trained))), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(trained)
        for row in rows:
            group, model = groups.index((row.key.policy, row.key.budget)), trained.index(row.key.model)
            y = group + (model - (len(trained) - 1) / 2) * height
            if row.gap is None:
                axes.text(1, y, "undefined: eviction cost too little", va="center", fontsize=7.5, color=FAINT)
                continue
            middle, low, high = (100 * part for part in (row.gap["value"], row.gap["low"], row.gap["high"]))
            axes.barh(y, middle, height * 0.86, color=colour[row.key.model])
            axes.plot([low, high], [y, y], color=INK, linewidth=1.1)
        axes.set_yticks(range(len(groups)), [f"{policy}, {budget}" for policy, budget in groups])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.axvline(100, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        ends = [100 * end for row in rows if row.gap is not None for end in (row.gap["low"], row.gap["high"])]
        axes.set_xlim(max(-100, min(-8, *ends) - 4), min(200, max(108, *ends) + 4))
        axes.set_xlabel("gap closed (%)")
        axes.spines["left"].set_visible(False)
        return figure


def memory(rows: Sequence[tuple[str, float, float, float]], unit: str) -> Figure:
    """Peak bytes of a sequence by what the cache may hold: bars of (name, mean, least, most)."""
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.4, 0.7 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, middle, low, high) in enumerate(rows):
            axes.barh(place, middle, 0.6, color="#2a9d8f" if place else "#8b8b86")
            if high > low:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.1)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"peak cache of a sequence ({unit})")
        axes.spines["left"].set_visible(False)
        return figure


def _parts(value: Estimate | float | None) -> tuple[float, float, float] | None:
    """(value, low, high) of an estimate, or of a number without an interval."""
    if value is None:
        return None
    if isinstance(value, dict):
        return value["value"], value["low"], value["high"]
    return value, value, value
