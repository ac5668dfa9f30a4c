"""What to train by: the objectives of the recipe, compared by generation under eviction on the embedded model.

    python benchmarks/objectives.py                     # trains and measures what is missing, prints the table
    python benchmarks/objectives.py --part 0 2          # of two processes: every second (seed, objective)
    python benchmarks/objectives.py --write             # and writes the table into docs/objectives.md

Every objective trains `recipes/tiny/vase.yaml` (VaSE-AttnV, window 16, budgets 64 and 80) with three seeds on the same
data and steps, beside the dense control. Then each adapter, and the base model, answers test problems, which
no recipe sees, with the full cache, with the policy that it was trained for, and with others that it was not. Every
adapter and every cell is kept as it is made; a rerun continues. About 40 minutes of one core; `--steps 400 --batch 16`,
the size of `make demo`, takes three hours.
"""

import json
import platform
import re
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig
from vkvtrain.ablation.statistics import paired_interval, problem_means
from vkvtrain.generation import Request, generate
from vkvtrain.tiny import MODEL_PATH, task
from vkvtrain.training.loop import train
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.run_directory import FINISHED

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny" / "vase.yaml"
DOCUMENT = ROOT / "docs" / "objectives.md"
WINDOW, LIMIT, SLOTS = 16, 192, 64

DISTILL = {"training.objective": "distill", "training.ce_weight": 0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dense sft (control)": {"eviction": None},
    "sft": {},
    "sft, never dense": {"training.dense_fraction": 0},
    "forward KL": DISTILL,
    "reverse KL": {**DISTILL, "training.divergence": "reverse_kl"},
    "JSD": {**DISTILL, "training.divergence": "jsd"},
    "sft + forward KL": {"training.objective": "distill", "training.ce_weight": 1},
    "on policy, reverse KL": {
        "training.objective": "on_policy", "training.divergence": "reverse_kl", "training.rollout_tokens": 160,
    },
    "sft, three policies": {"eviction.policy": ["vase_attnv", "rkv", "snapkv"]},
}  # fmt: skip
"""By name, what is changed of the recipe; a fifth of the steps is dense unless it says otherwise."""

CACHES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "vase_attnv 80": {"policy": "vase_attnv", "budget": 80},
    "vase_attnv 64": {"policy": "vase_attnv", "budget": 64},
    "rkv 64": {"policy": "rkv", "budget": 64},
    "snapkv 64": {"policy": "snapkv", "budget": 64},
    "random + prompt 64": {"policy": "random", "budget": 64, "protect_prompt": True},
}
"""Columns: what decodes. The last three were never trained for, but R-KV and SnapKV by `sft, three policies`."""


@dataclass
class Settings:
    output: Path = Path("runs/objectives")
    """Directory of the adapters and cells."""
    steps: int = 120
    """Optimiser steps."""
    batch: int = 8
    """Sequences of a step."""
    problems: int = 100
    """Test problems; every cell answers the same ones."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of training; evaluation under eviction draws its noise with the same seed."""
    part: tuple[int, int] = (0, 1)
    """Which share of the work this process does: (number, of how many)."""
    report_only: bool = False
    """Measure nothing: the table of what is there."""
    write: bool = False
    """Write the table into docs/objectives.md."""


def overrides(settings: Settings, name: str, seed: int) -> list[tuple[str, Any]]:
    """What a run changes of the recipe, as its command line would."""
    common = {
        "training.steps": settings.steps, "training.global_batch": settings.batch, "optim.warmup_steps": 10,
        "data.rows": settings.steps * settings.batch, "data.held_out": 0, "seed": seed,
        "output": str(settings.output / "adapters" / f"{slug(name)}-{seed}"),
    }  # fmt: skip
    return list({**common, **OBJECTIVES[name]}.items())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def trained(settings: Settings, name: str, seed: int) -> Path:
    """The directory of an adapter; trained unless it is there."""
    recipe = load_recipe(RECIPE, overrides(settings, name, seed))
    if not (recipe.output / FINISHED).exists():
        train(recipe)
    return recipe.output


@torch.no_grad()
def answers(model: Any, tokenizer: Any, config: EvictionConfig, problems: int) -> dict[str, Any]:
    """Grades of the first test problems by greedy generation: [exact match, passcode], evictions and tokens of each."""
    asked = list(task.problems("test", 0, problems))
    requests = [Request(tuple(tokenizer(one.prompt)["input_ids"]), LIMIT, (place,)) for place, one in enumerate(asked)]
    done = generate(model, config, requests, slots=SLOTS, end_tokens=[tokenizer.eos_token_id])
    texts = [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in done]
    grades = [task.grade(text, one.answer, one.passcode) for text, one in zip(texts, asked, strict=True)]
    return {
        "exact_match": [int(exact) for exact, _ in grades],
        "passcode": [int(fact) for _, fact in grades],
        "evictions": [one.evictions for one in done],
        "tokens": [len(one.tokens) for one in done],
    }


def cells(settings: Settings) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What has been measured: by (objective, seed, cache)."""
    found = {}
    for path in sorted((settings.output / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        if cell["about"] != about(settings):
            sys.exit(f"{path} was measured with other settings: choose another --output, or delete it")
        found[cell["objective"], cell["seed"], cell["cache"]] = cell
    return found


def about(settings: Settings) -> dict[str, Any]:
    """What cells must agree on to stand in one table."""
    return {"steps": settings.steps, "batch": settings.batch, "problems": settings.problems}


def measure(settings: Settings) -> None:
    """Train and evaluate what is missing of this process's part."""
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    directory = settings.output / "cells"
    directory.mkdir(parents=True, exist_ok=True)
    work = [(seed, name) for seed in settings.seeds for name in ("base", *OBJECTIVES)]
    number, of = settings.part
    for seed, name in tqdm(work[number::of], desc="objectives"):
        missing = [cache for cache in CACHES if (name, seed, cache) not in cells(settings)]
        if not missing:
            continue
        adapter = None if name == "base" else trained(settings, name, seed)
        model: Any = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        model.eval()
        for cache in missing:
            config = EvictionConfig(**CACHES[cache], window=WINDOW, seed=seed)
            cell = {"objective": name, "seed": seed, "cache": cache, "about": about(settings)}
            cell |= answers(model, tokenizer, config, settings.problems)
            path = directory / f"{slug(name)}-{seed}-{slug(cache)}.json"
            path.with_suffix(".part").write_text(json.dumps(cell) + "\n")
            path.with_suffix(".part").rename(path)


def share(values: list[float]) -> str:
    """Mean over seeds, and the lowest and highest seed, in percent."""
    mean, low, high = (100 * value for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]" if len(values) > 1 else f"{mean:.0f}"


def table(settings: Settings, metric: str) -> list[str]:
    """Rows of a Markdown table: objectives by caches."""
    found = cells(settings)
    lines = [f"| trained by | {' | '.join(CACHES)} |", f"| --- |{' --- |' * len(CACHES)}"]
    for name in ("base", *OBJECTIVES):
        row = []
        for cache in CACHES:
            values = [
                sum(found[name, seed, cache][metric]) / settings.problems
                for seed in settings.seeds
                if (name, seed, cache) in found
            ]
            missing = "" if len(values) in (0, len(settings.seeds)) else f" ({len(values)} seeds)"
            row.append(share(values) + missing if values else "-")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def differences(settings: Settings) -> list[str]:
    """Rows of a Markdown table: exact match minus that of `sft`, paired by problem."""
    found, columns = cells(settings), [cache for cache in CACHES if cache != "full"]
    lines = [f"| trained by | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name in OBJECTIVES:
        row = []
        for cache in columns:
            seeds = [seed for seed in settings.seeds if {(name, seed, cache), ("sft", seed, cache)} <= found.keys()]
            if name == "sft" or not seeds:
                row.append("-")
                continue
            ours, theirs = (
                list(
                    problem_means(
                        (place, grade)
                        for seed in seeds
                        for place, grade in enumerate(found[side, seed, cache]["exact_match"])
                    ).values()
                )
                for side in (name, "sft")
            )
            estimate = paired_interval(ours, theirs)
            value, low, high = (round(100 * estimate[end]) for end in ("value", "low", "high"))
            row.append(f"{value:+d} [{low:+d}, {high:+d}]")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def log_ratios(settings: Settings) -> list[str]:
    """The largest log-ratio between simulation and rollout of the runs that generated."""
    found = []
    for path in sorted((settings.output / "adapters").glob("on-policy-*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        tokens = sum(row["rollout_tokens"] * settings.batch for row in rows)
        found.append((max(row["log_ratio_max"] for row in rows), max(row["log_ratio_mean"] for row in rows), tokens))
    if not found:
        return []
    largest, mean, tokens = max(one[0] for one in found), max(one[1] for one in found), sum(one[2] for one in found)
    return [
        f"On policy, float32: |log p under simulation - log p when generated| is at most {largest:.1e} over "
        f"{tokens:,.0f} generated tokens (largest mean of a step: {mean:.1e})."
    ]


def report(settings: Settings) -> str:
    """The tables as Markdown."""
    lines = [
        f"{settings.steps} steps of {settings.batch} sequences, {settings.problems} test problems, "
        f"{len(settings.seeds)} seeds; two CPU cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}, {date.today().isoformat()}.",
        "",
        "Exact match in percent, mean over seeds and [lowest, highest seed]; the number behind a policy is its budget:",
        "",
        *table(settings, "exact_match"),
        "",
        "The passcode that the prompt states once, in percent, likewise:",
        "",
        *table(settings, "passcode"),
        "",
        "Exact match minus that of `sft`, in points, with paired 95% bootstrap intervals over problems (each problem's "
        "mean over the seeds, so they do not cover what another training seed would change; the ranges above do):",
        "",
        *differences(settings),
        "",
        *log_ratios(settings),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    number, of = settings.part
    if not 0 <= number < of:
        sys.exit(f"--part {number} {of}: the first number goes from 0 to {of - 1}")
    torch.set_num_threads(1)
    if not settings.report_only:
        measure(settings)
    text = report(settings)
    print(text)
    if settings.write:
        before, _, rest = DOCUMENT.read_text().partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end of table -->\n")
        DOCUMENT.write_text(f"{before}<!-- table -->\n{text}<!-- end of table -->\n{after}")
        print(f"written: {DOCUMENT}")


if __name__ == "__main__":
    main()
