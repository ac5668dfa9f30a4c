"""The report of a finished run: `report.md` and `training.png`, made from `metrics.jsonl` and the recipe alone."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import yaml
from matplotlib.figure import Figure

from vkvtrain.training.logs import read_metrics
from vkvtrain.training.run_directory import METRICS, RECIPE
from vkvtrain.training.settings import Recipe

REPORT, PLOT = "report.md", "training.png"

Rows = Sequence[dict[str, Any]]


def write_report(recipe: Recipe) -> None:
    """Write the report of the run in `recipe.output`."""
    rows = read_metrics(recipe.output / METRICS)
    if not rows:
        return
    plot(rows, recipe).savefig(recipe.output / PLOT, dpi=130)
    (recipe.output / REPORT).write_text(report(rows, recipe))


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a value."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def names(rows: Rows, *prefixes: str) -> list[str]:
    """Names of the log that begin in one of the prefixes, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefixes)))


def plot(rows: Rows, recipe: Recipe) -> Figure:
    """Loss of each step, held-out losses, gradient norm, and what was evicted."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (loss, held_out), (norm, live) = figure.subplots(2, 2)
    for kind, colour in (("evicted", "#e45756"), ("dense", "#4c78a8")):
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            loss.plot(*series(chosen, "loss"), ".", markersize=3, color=colour, label=f"{kind} steps")
    loss.set_title(f"training loss ({recipe.training.objective})")
    loss.legend(frameon=False)
    for name in names(rows, "held_out_loss_"):
        held_out.plot(*series(rows, name), "o-", markersize=3, label=name.removeprefix("held_out_loss_"))
    held_out.set_title("held-out loss per token")
    if held_out.lines:
        held_out.legend(frameon=False)
    else:
        held_out.text(0.5, 0.5, "no held-out rows", ha="center", transform=held_out.transAxes)
    norm.plot(*series(rows, "grad_norm"), linewidth=0.8, color="#4c78a8")
    norm.axhline(recipe.optim.max_grad_norm, color="#8c8c8c", linewidth=0.8, linestyle="--")
    norm.set_yscale("log")
    norm.set_title("gradient norm (dashed: clipped above)")
    live.plot(*series(rows, "live_fraction"), ".", markersize=3, color="#e45756")
    live.set_ylim(0, 1.02)
    live.set_title("share of keys still held at the end")
    for axes in (loss, held_out, norm, live):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def report(rows: Rows, recipe: Recipe) -> str:
    """The report as Markdown."""
    evicted = [row for row in rows if row["kind"] == "evicted"]
    tail = rows[-max(1, len(rows) // 10) :]
    memory = max((row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row), default=None)
    facts = [
        ("steps", f"{len(rows)}, {len(rows) - len(evicted)} of them dense"),
        ("loss", f"{rows[0]['loss']:.4f} at first, {mean(row['loss'] for row in tail):.4f} over the last {len(tail)}"),
        ("speed", f"{mean(row['tokens_per_second'] for row in rows):,.0f} tokens/s on average"),
        ("peak memory", "not measured" if memory is None else f"{memory:.2f} GiB on the main process"),
    ]
    if evicted:
        facts += [
            ("evictions", f"{mean(row['evictions'] for row in evicted):.2f} a sample on average"),
            ("live at the end", f"{mean(row['live_fraction'] for row in evicted):.1%} of keys"),
        ]
    lines = [f"# Training report: {recipe.output.name}", "", f"![training]({PLOT})", ""]
    lines += [f"- {name}: {value}" for name, value in facts]
    seldom = names(rows, "held_out_", "train_", "generated_")
    told = [row for row in rows if any(name in row for name in seldom)]
    if told:
        first, last = told[0], told[-1]
        lines += ["", f"| measured | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        lines += [f"| {name} | {first.get(name, '')} | {last.get(name, '')} |" for name in seldom]
    if evicted and not any(row["evictions"] for row in evicted):
        lines += ["", "**No sequence ever exceeded the budget: nothing was evicted, and this was a dense run.**"]
    if recipe.data.held_out:
        lines += ["", "Held-out losses are per response token, teacher-forced; no claim about generated answers."]
    lines += ["", f"Every step is in `{METRICS}`, the settings are in `{RECIPE}`:", "", "```yaml"]
    return "\n".join([*lines, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip(), "```", ""])
