"""The arms of the evidence on a pretrained model: the base, what is trained on it, and how each is measured.

Every stage is one of the package's own commands, writes to `runs/`, and is skipped where what it makes is there. What
was measured is a record in `docs/evidence`, which is committed: an arm with its record is not trained again. Knows
nothing of tables and figures.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import other_text
import torch
from convert import convert
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig, ledger, simulated_eviction
from vkvtrain.ablation.store import Store
from vkvtrain.training.run_directory import FINISHED, METRICS

ROOT = Path(__file__).parents[2]
HERE = Path("recipes/smollm2/ledger")
"""Recipes and the shipped base adapter; relative to `ROOT`, as recipes name paths."""
PRETRAINED, MODEL = Path("runs/smollm2/model"), Path("runs/ledger/model")
SHIPPED = HERE / "base"
"""The adapter that makes the base, in bfloat16."""
SWEEP = "eval/sweeps/ledger.yaml"
DIAL = ledger.Dial(people=4, events=6)
BUDGETS, WINDOW = (64, 56), 8
Cells = tuple[tuple[str, int | None], ...]
"""Policies with their budgets."""
POLICY = "vase_attnv"
BASE, STAGES = "base", ("base", "base_second")
"""The model that all arms start from, and the recipes of its training."""

MAIN: Cells = (("full", None), *((POLICY, budget) for budget in BUDGETS))
"""What every model is measured under."""
TRANSFER: Cells = tuple((policy, BUDGETS[0]) for policy in ("snapkv", "rkv", "random", "random + prompt"))
"""What it was not trained for; those models that `TRANSFERRED` names, on half of the problems."""
TRANSFERRED = (BASE, "vase", "dense", "random", "snapkv", "distill")
HELD = 40
"""Test problems whose lifetimes are looked at."""


@dataclass(frozen=True)
class Arm:
    """A recipe trained with a seed."""

    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return self.recipe if self.seed == 0 else f"{self.recipe}_{self.seed}"


ARMS = (
    *(Arm(recipe, seed) for seed in range(3) for recipe in ("vase", "dense", "random")),
    Arm("distill", 0),
    Arm("snapkv", 0),
)
"""In the order in which they are worth having."""


@dataclass(frozen=True)
class Study:
    """What is trained and measured, and where that is.

    Attributes:
        arms: in their order.
        runs: adapters, sweeps and logs, relative to `ROOT`.
        records: a JSON file for each model.
        problems: test problems of each evaluation.
        steps: of every arm, in the place of the recipe's.
    """

    arms: tuple[Arm, ...] = ARMS
    runs: Path = Path("runs/ledger")
    records: Path = ROOT / "docs/evidence"
    problems: int = 200
    steps: int | None = None

    def record(self, name: str) -> dict[str, Any]:
        """What was measured of a model so far; empty where nothing was."""
        path = self.records / f"{name}.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Replace a model's record."""
        self.records.mkdir(parents=True, exist_ok=True)
        partial = self.records / f"{name}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.records / f"{name}.json")

    def missing(self, name: str, cells: Cells) -> bool:
        """Whether a model still has to be measured in some of the cells."""
        return not {label(*cell) for cell in cells} <= set(self.record(name).get("cells", {}))


def label(policy: str, budget: int | None) -> str:
    """A cell as records name it."""
    return policy if budget is None else f"{policy} {budget}"


def run(command: list[str], log: Path) -> None:
    """Run a command from the repository's root on one thread; raises CalledProcessError if it fails."""
    print(f"$ {' '.join(command)} >> {log}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    (ROOT / log).parent.mkdir(parents=True, exist_ok=True)
    with (ROOT / log).open("ab") as file:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=file, stderr=file)


def train(recipe: str, output: Path, *overrides: str) -> None:
    """Train an adapter, or go on with it, unless it is there."""
    if not (ROOT / output / FINISHED).exists():
        command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "recipes/finetune.py"]
        command += [str(HERE / f"{recipe}.yaml"), "--output", str(output), *overrides]
        run(command, output.with_suffix(".log"))


def train_arm(study: Study, arm: Arm) -> None:
    """Train an arm, with its seed for everything that is drawn."""
    overrides = ["--seed", str(arm.seed)]
    if arm.recipe != "dense":
        overrides += ["--eviction.seed", str(arm.seed)]
    if study.steps is not None:
        overrides += ["--steps", str(study.steps), "--optim.warmup_steps", str(min(10, study.steps // 4))]
    train(arm.recipe, study.runs / arm.name, *overrides)


def make_base(afresh: bool = False) -> None:
    """The model that all arms start from: SmolLM2 with the shipped adapter merged into it.

    Args:
        afresh: train the adapter instead, and ship that.
    """
    convert(ROOT / PRETRAINED.parent)
    if afresh or not (ROOT / SHIPPED / FINISHED).exists():
        for recipe in STAGES:
            train(recipe, MODEL.with_name(recipe))
        ship(MODEL.with_name(STAGES[-1]), SHIPPED)
    if (ROOT / MODEL).exists():
        return
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / PRETRAINED, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(ROOT / SHIPPED)).merge_and_unload(safe_merge=True)
    partial = (ROOT / MODEL).with_name("model.partial")
    merged.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(ROOT / PRETRAINED).save_pretrained(partial)
    partial.rename(ROOT / MODEL)


def ship(source: Path, target: Path) -> None:
    """Copy the finished base adapter in bfloat16, with the log of its stages, for the repository."""
    (ROOT / target).mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in load_file(ROOT / source / FINISHED).items()
    }
    save_file(weights, ROOT / target / FINISHED, metadata={"format": "pt"})
    shutil.copyfile(ROOT / source / "adapter_config.json", ROOT / target / "adapter_config.json")
    logs = [(ROOT / source.with_name(recipe) / METRICS).read_text() for recipe in STAGES]
    (ROOT / target / METRICS).write_text("".join(logs))


def fingerprint(study: Study, name: str) -> str:
    """Hash of the weights that a model adds to the pretrained one."""
    adapter = SHIPPED if name == BASE else study.runs / name
    return hashlib.blake2b((ROOT / adapter / FINISHED).read_bytes(), digest_size=8).hexdigest()


def evaluate(study: Study, name: str, cells: Cells, problems: int, jobs: int) -> None:
    """Measure a model by its part of the sweep, unless its record has that."""
    if not study.missing(name, cells):
        return
    policies = [
        {"policy": policy.removesuffix(" + prompt"), "protect_prompt": policy.endswith(" + prompt")}
        for policy in dict.fromkeys(policy for policy, _ in cells)
    ]
    budgets = list(dict.fromkeys(budget for _, budget in cells if budget is not None))
    output = study.runs / "sweeps" / f"{name}-{problems}"
    command = ["vkvtrain", "ablate", SWEEP, "--output", str(output), "--controls", "false", "--limit", str(problems)]
    command += ["--adapters", json.dumps({} if name == BASE else {name: str(study.runs / name)})]
    command += ["--policies", json.dumps(policies), "--budgets", json.dumps(budgets), "--parallel_cells", str(jobs)]
    run(command, study.runs / f"{name}.log")
    keep(study, name, Store.existing(ROOT / output))


def keep(study: Study, name: str, store: Store) -> None:
    """Add a sweep's finished cells to a model's record."""
    record = study.record(name)
    if record.get("weights") not in (None, fingerprint(study, name)):
        record = {}  # of an adapter that was trained again
    record |= {"weights": fingerprint(study, name)}
    cells = record.setdefault("cells", {})
    finished = store.finished()
    for cell in store.plan()["cells"]:
        if cell["cell"] not in finished:
            continue
        rows = read(store, cell["cell"])
        about = store.about(cell["cell"])
        cells[label(cell["policy"], cell["budget"])] = {
            "seconds": about["seconds"],
            "finished": about["finished"],
            **graded(rows),
        }
    study.write(name, record)


def read(store: Store, cell: str) -> list[dict[str, Any]]:
    """The rows of a finished cell, by problem."""
    with store.connect([cell]) as connection:
        return connection.sql("SELECT * FROM samples ORDER BY doc_id").to_arrow_table().to_pylist()


def graded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The grades of a cell's responses, a character or a word for each problem: `1` right, `0` wrong."""
    grades = [ledger.grade(row["prompt"], row["response"], row["target"]) for row in rows]
    return {
        "exact": bits(grade.answer for grade in grades),
        "trace": bits(grade.trace for grade in grades),
        "ages": " ".join("".join(str(line.age) for line in grade.lines) for grade in grades),
        "right": " ".join(bits(line.right for line in grade.lines) for grade in grades),
        "follows": " ".join(bits(line.follows for line in grade.lines) for grade in grades),
        "looping": bits(row["looping"] for row in rows),
        "tokens": [int(row["tokens"]) for row in rows],
        "final_length": [int(row["final_length"]) for row in rows],
        "peak_kv_bytes": [int(row["peak_kv_bytes"]) for row in rows],
    }


def bits(values: Any) -> str:
    return "".join("1" if value else "0" for value in values)


def look_inside(study: Study, name: str) -> None:
    """What is still held when it is needed, on the test problems' own responses, and the loss on other text."""
    record = study.record(name)
    if "held" in record and "other_text" in record:
        return
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / MODEL, attn_implementation="vkvtrain")
    if name != BASE:
        model = PeftModel.from_pretrained(model, str(ROOT / study.runs / name))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    problems = list(ledger.problems("test", HELD, DIAL))
    configs = [EvictionConfig(policy=POLICY, budget=budget, window=WINDOW) for budget in BUDGETS]
    record["held"] = {str(config.budget): held(model, tokenizer, problems, config) for config in configs}
    rows = list(other_text.texts(tokenizer))
    record["other_text"] = {
        "full": other_text.losses(model, rows, EvictionConfig(policy="full")),
        "evicted": other_text.losses(model, rows, other_text.EVICTED),
    }
    study.write(name, record)


@torch.no_grad()
def held(model: Any, tokenizer: Any, problems: list[ledger.Problem], config: EvictionConfig) -> dict[str, Any]:
    """Share of (layer, KV head) that hold a balance when a line needs it, by age, beside that of all tokens as old.

    Args:
        model: with `attn_implementation="vkvtrain"`.
        tokenizer: the model's.
        problems: whose prompt and response are read in one simulated pass.
        config: the eviction setting.
    """
    needed: dict[int, list[float]] = {}
    others: dict[int, list[float]] = {}
    for index, problem in enumerate(problems):
        prompt = tokenizer(problem.prompt)["input_ids"]
        response = tokenizer(problem.response, add_special_tokens=False, return_offsets_mapping=True)
        shift = len(problem.prompt)
        spans = tokenizer(problem.prompt, return_offsets_mapping=True)["offset_mapping"] + [
            (start + shift, end + shift) for start, end in response["offset_mapping"]
        ]
        ids = torch.tensor([prompt + response["input_ids"]])
        with simulated_eviction(model, config, [len(prompt)], [index]) as trace:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        evict_at = torch.stack(list(trace.evict_at.values()))[:, 0]
        for need in ledger.needs(problem):
            first, *_ = (place for place, (start, end) in enumerate(spans) if start <= need.at < end)
            query = first - 1  # the token that predicts the first digit
            keys = [place for place, span in enumerate(spans) if need.stated[0] <= span[0] < need.stated[1]]
            share = (evict_at > query).float().mean((0, 1))
            needed.setdefault(need.age, []).append(share[keys].mean().item())
            around = slice(max(config.sinks, keys[0] - WINDOW), keys[-1] + WINDOW + 1)
            others.setdefault(need.age, []).append(share[around].mean().item())
    return {
        str(age): {"needs": len(of), "held": sum(of) / len(of), "around": sum(others[age]) / len(of)}
        for age, of in sorted(needed.items())
    }
