"""The main job, end to end, on the embedded tiny model (`make demo`).

    python recipes/tiny/demo.py

Trains two adapters through `accelerate launch` with the recipe that a real model would be trained with: one under
simulated eviction, one dense, on the same data and steps. Then generates the answers to the test problems through
`vkvtrain lm-eval`, with the full and with the evicting cache, and writes a table (results.json, results.md) and a plot
(results.png) to `runs/demo`. Two processes run at once, of one thread each; what they print is in `runs/demo/logs`.
Finished adapters found there are kept: delete the directory to start over.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vkvtrain.ablation.statistics import interval, paired_interval
from vkvtrain.identity import adapter_hash
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.run_directory import FINISHED, RECIPE
from vkvtrain.training.settings import recipe_values

ROOT = Path(__file__).parents[2]
RECIPES = {"eviction_lora": "recipes/tiny/vase.yaml", "dense_lora": "recipes/tiny/dense.yaml"}
POLICY, WINDOW, BUDGETS = "vase_attnv", 16, (80, 64)
"""Final length is about 171 tokens: 2.1x and 2.7x compression."""
PROBLEMS = 400
"""Of the task (eval/tasks/tiny/keyed_sum.yaml)."""
AT_ONCE = 2
"""Processes; each has one thread, unless OMP_NUM_THREADS says otherwise, which is faster than two for this model."""
MODELS = ("base", "dense_lora", "eviction_lora")
CELLS = [
    ("base", None),
    ("base", 80),
    ("dense_lora", None),
    ("dense_lora", 80),
    ("eviction_lora", 80),
    ("eviction_lora", None),
    *((model, 64) for model in MODELS),
]
"""(model, budget); None is the full cache."""

Samples = list[dict[str, Any]]


@dataclass
class Settings:
    output: Path = ROOT / "runs/demo"
    """Directory to write."""
    problems: int = PROBLEMS
    """Test problems of each evaluation, at most all of them."""
    steps: int | None = None
    """Training steps of both adapters instead of the recipe's, for a quick look."""
    seed: int = 0
    """Seed of the adapters, the data order and the policy's noise."""


def train(settings: Settings, model: str) -> Path:
    """Train an adapter unless it is there; returns its directory."""
    directory = settings.output / model
    if (directory / FINISHED).exists():
        recipe = recipe_values(directory / RECIPE)
        if recipe["seed"] != settings.seed or settings.steps not in (None, recipe["training"]["steps"]):
            sys.exit(f"demo: {directory} holds a run of another seed or other steps: choose another --output")
        print(f"{directory} is finished and kept")
        return directory
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "recipes/finetune.py"]
    command += [RECIPES[model], "--output", str(directory), "--seed", str(settings.seed)]
    if settings.steps is not None:
        command += ["--steps", str(settings.steps)]
    if model == "eviction_lora":
        command += ["--eviction.seed", str(settings.seed)]
    run(command, settings.output / "logs" / f"train-{model}.log")
    return directory


def evaluate(settings: Settings, model: str, budget: int | None) -> Samples:
    """Generate the answers to the test problems through lm-eval; returns its samples, by problem."""
    arguments = f"pretrained={MODEL_PATH}"
    if model != "base":
        arguments += f",peft={settings.output / model}"
    if budget is not None:
        arguments += f",policy={POLICY},budget={budget},window={WINDOW},seed={settings.seed}"
    directory = settings.output / "lm-eval" / f"{model}-{budget or 'full'}"
    command = ["vkvtrain", "lm-eval", "run", "--model", "vkv", "--model_args", arguments]
    command += ["--include_path", "eval/tasks", "--tasks", "tiny_keyed_sum"]
    command += ["--batch_size", "100", "--device", "cpu", "--output_path", str(directory), "--log_samples"]
    if settings.problems < PROBLEMS:
        command += ["--limit", str(settings.problems)]
    run(command, settings.output / "logs" / f"evaluate-{directory.name}.log")
    newest = max(directory.rglob("samples_*.jsonl"), key=lambda path: path.stat().st_mtime)
    return sorted(map(json.loads, newest.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def run(command: list[str], log: Path) -> None:
    """Run a command from the repository's root; what it prints goes to `log`, whose end is shown if it fails."""
    print("$ " + " ".join(command), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    began = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=output, stderr=output, env=environment)
    if done.returncode:
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
        sys.exit(f"demo: stopped, because this command failed ({log}): {' '.join(command)}")
    print(f"{log.stem}: {time.monotonic() - began:.0f} s", flush=True)


def at_once(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """The results of several calls, `AT_ONCE` of them at a time; the first failure leaves out what has not begun."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda call: function(*call), calls))


def result(settings: Settings, model: str, budget: int | None, samples: Samples, adapter: str | None) -> dict[str, Any]:
    """A row of results.json; `adapter` is the hash of what was measured."""

    def average(name: str) -> float:
        return mean(sample[name] for sample in samples)

    return {
        "model": model,
        "cache": "full" if budget is None else "evicted",
        "policy": "full" if budget is None else POLICY,
        "budget": budget,
        "compression": 1.0 if budget is None else round(average("final_length") / budget, 3),
        "n": len(samples),
        "seed": settings.seed,
        "adapter": adapter,
        "exact_match": interval([sample["exact_match"] for sample in samples]),
        "fact_match": average("fact_match"),
        "tokens": round(average("tokens"), 1),
        "looping_or_cut_off": average("looping_or_cut_off"),
        "peak_kv_bytes": round(average("peak_kv_bytes")),
        "evictions": round(average("evictions"), 2),
    }


def percent(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"


def cells(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows as text, its header first."""
    yield [
        *("model", "cache", "budget", "final length / budget", "peak bytes full / evicted", "exact match [95%]"),
        *("fact match", "tokens", "looping or cut off", "evictions"),
    ]
    full = {row["model"]: row["peak_kv_bytes"] for row in results if row["cache"] == "full"}
    for row in results:
        evicted = row["cache"] == "evicted"
        yield [
            row["model"],
            row["cache"],
            str(row["budget"]) if evicted else "-",
            f"{row['compression']:.2f}x" if evicted else "-",
            f"{full[row['model']] / row['peak_kv_bytes']:.2f}x" if evicted else "-",
            percent(row["exact_match"]),
            f"{row['fact_match']:.1%}",
            f"{row['tokens']:.0f}",
            f"{row['looping_or_cut_off']:.1%}",
            f"{row['evictions']:.1f}",
        ]


def differences(samples: dict[tuple[str, int | None], Samples]) -> list[str]:
    """eviction_lora minus dense_lora, both evicted, on the same problems."""
    lines = []
    for budget in BUDGETS:
        ours, theirs = ([s["exact_match"] for s in samples[model, budget]] for model in ("eviction_lora", "dense_lora"))
        estimate = percent(paired_interval(ours, theirs))
        lines.append(f"eviction_lora - dense_lora, exact match at budget {budget}, paired 95% interval: {estimate}")
    return lines


def markdown(results: list[dict[str, Any]], notes: list[str]) -> str:
    header, *rows = cells(results)
    lines = [header, ["---"] * len(header), *rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in notes), ""])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Exact match by cache, one bar a model, with 95% intervals."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    caches = [None, *BUDGETS]
    colours = {"base": "#8c8c8c", "dense_lora": "#4c78a8", "eviction_lora": "#e45756"}
    for place, model in enumerate(MODELS):
        rows = [next(row for row in results if row["model"] == model and row["budget"] == budget) for budget in caches]
        x = [cache + (place - 1) * 0.27 for cache in range(len(caches))]
        values = [100 * row["exact_match"]["value"] for row in rows]
        spread = [
            [value - 100 * row["exact_match"]["low"] for value, row in zip(values, rows, strict=True)],
            [100 * row["exact_match"]["high"] - value for value, row in zip(values, rows, strict=True)],
        ]
        bars = axes.bar(x, values, 0.25, yerr=spread, capsize=3, color=colours[model], label=model.replace("_", "-"))
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    evicted = {row["budget"]: row["compression"] for row in results}
    names = ["full cache", *(f"budget {budget} ({evicted[budget]:.1f}x)" for budget in BUDGETS)]
    axes.set_xticks(range(len(caches)), names)
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("exact match (%), 95% interval")
    axes.set_title(f"Embedded tiny model, {POLICY}, {results[0]['n']} test problems", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, frameon=False, loc="upper center", fontsize=9)
    figure.savefig(path, dpi=160)


def main(settings: Settings) -> None:
    if not 1 <= settings.problems <= PROBLEMS:
        sys.exit(f"demo: problems must be from 1 to {PROBLEMS}, got {settings.problems}")
    settings.output = settings.output.absolute()
    began = time.monotonic()
    at_once(train, [(settings, model) for model in RECIPES])
    trained = time.monotonic()
    adapters = {model: adapter_hash(settings.output / model) for model in RECIPES}
    evaluated = at_once(evaluate, [(settings, *cell) for cell in CELLS])
    samples: dict[tuple[str, int | None], Samples] = dict(zip(CELLS, evaluated, strict=True))
    results = [result(settings, model, budget, samples[model, budget], adapters.get(model)) for model, budget in CELLS]
    notes = differences(samples)
    notes.append(f"training took {trained - began:.0f} s, the evaluations {time.monotonic() - trained:.0f} s")
    (settings.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (settings.output / "results.md").write_text(markdown(results, notes))
    plot(results, settings.output / "results.png")
    header, *rows = cells(results)
    table = Table(*header, title=f"tiny_keyed_sum, {POLICY}, window {WINDOW}, {results[0]['n']} test problems")
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(Console().width, 150))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"written: {settings.output}/results.json, results.md, results.png", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
