"""The arms of the evidence on a pretrained model: the base, what is trained on it, and how each is measured.

Every stage is one of the package's own commands, writes to `runs/ledger`, and is skipped where what it makes is there.
What was measured goes to `docs/evidence/MODEL.json`, which is committed: an arm with its record is not trained again.
Knows nothing of tables and figures.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
RECORDS = ROOT / "docs/evidence"
RUNS = Path("runs/ledger")
PRETRAINED, MODEL = Path("runs/smollm2/model"), RUNS / "model"
SHIPPED = HERE / "base"
"""The adapter that makes the base, in bfloat16."""
SWEEP = "eval/sweeps/ledger.yaml"
DIAL = ledger.Dial(people=4, events=6)
BUDGETS, WINDOW = (64, 56), 8
Cells = tuple[tuple[str, int | None], ...]
"""Policies with their budgets."""
POLICY = "vase_attnv"
BASE = "base"

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


def run(command: list[str], log: Path | None = None) -> None:
    """Run a command from the repository's root on one thread; raises CalledProcessError if it fails."""
    print("$ " + " ".join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if log is None:
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=file, stderr=file)


def train(recipe: str, output: Path, seed: int, steps: int | None = None) -> None:
    """Train an adapter, or go on with it, unless it is there."""
    if (ROOT / output / FINISHED).exists():
        return
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "recipes/finetune.py"]
    command += [str(HERE / f"{recipe}.yaml"), "--output", str(output), "--seed", str(seed)]
    if recipe not in (BASE, "dense"):
        command += ["--eviction.seed", str(seed)]
    if steps is not None:
        command += ["--steps", str(steps), "--optim.warmup_steps", str(min(10, steps // 4))]
    run(command, ROOT / RUNS / f"{output.name}.log")


def make_base(afresh: bool = False) -> None:
    """The model that all arms start from: SmolLM2 with the shipped adapter merged into it.

    Args:
        afresh: train the adapter instead, and ship that.
    """
    convert(ROOT / PRETRAINED.parent)
    if afresh or not (ROOT / SHIPPED / FINISHED).exists():
        train(BASE, RUNS / BASE, seed=0)
        ship(RUNS / BASE, SHIPPED)
    if (ROOT / MODEL).exists():
        return
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / PRETRAINED, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(ROOT / SHIPPED)).merge_and_unload(safe_merge=True)
    partial = (ROOT / MODEL).with_name("model.partial")
    merged.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(ROOT / PRETRAINED).save_pretrained(partial)
    partial.rename(ROOT / MODEL)


def ship(source: Path, target: Path) -> None:
    """Copy a finished adapter in bfloat16 with its log, for the repository."""
    (ROOT / target).mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in load_file(ROOT / source / FINISHED).items()
    }
    save_file(weights, ROOT / target / FINISHED, metadata={"format": "pt"})
    for name in ("adapter_config.json", METRICS):
        shutil.copyfile(ROOT / source / name, ROOT / target / name)


def fingerprint(name: str) -> str:
    """Hash of the weights that a model adds to the pretrained one."""
    adapter = SHIPPED if name == BASE else RUNS / name
    return hashlib.blake2b((ROOT / adapter / FINISHED).read_bytes(), digest_size=8).hexdigest()


def record_of(name: str) -> dict[str, Any]:
    """What was measured of a model so far; empty where nothing was."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def write_record(name: str, record: dict[str, Any]) -> None:
    path = RECORDS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def label(policy: str, budget: int | None) -> str:
    """A cell as records name it."""
    return policy if budget is None else f"{policy} {budget}"


def missing(name: str, cells: Cells) -> bool:
    """Whether a model still has to be measured in some of the cells."""
    return not {label(*cell) for cell in cells} <= set(record_of(name).get("cells", {}))


def evaluate(name: str, cells: Cells, problems: int, jobs: int) -> None:
    """Measure a model by its part of the sweep, unless its record has that."""
    if not missing(name, cells):
        return
    policies = [
        {"policy": policy.removesuffix(" + prompt"), "protect_prompt": policy.endswith(" + prompt")}
        for policy in dict.fromkeys(policy for policy, _ in cells)
    ]
    budgets = list(dict.fromkeys(budget for _, budget in cells if budget is not None))
    output = RUNS / "sweeps" / f"{name}-{problems}"
    command = ["vkvtrain", "ablate", SWEEP, "--output", str(output), "--controls", "false", "--limit", str(problems)]
    command += ["--adapters", json.dumps({} if name == BASE else {name: str(RUNS / name)})]
    command += ["--policies", json.dumps(policies), "--budgets", json.dumps(budgets), "--parallel_cells", str(jobs)]
    run(command, ROOT / RUNS / f"{name}.log")
    keep(name, Store.existing(ROOT / output))


def keep(name: str, store: Store) -> None:
    """Add a sweep's finished cells to a model's record."""
    record = record_of(name)
    if record.get("weights") not in (None, fingerprint(name)):
        record = {}  # of an adapter that was trained again
    record |= {"weights": fingerprint(name)}
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
    write_record(name, record)


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


def measure_held(name: str) -> None:
    """How much of what lines need is still held when they need it, by age; on the test problems' own responses."""
    record = record_of(name)
    if "held" in record:
        return
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / MODEL, attn_implementation="vkvtrain")
    if name != BASE:
        model = PeftModel.from_pretrained(model, str(ROOT / RUNS / name))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    problems = list(ledger.problems("test", HELD, DIAL))
    record["held"] = {
        str(budget): held(
            model.eval(), tokenizer, problems, EvictionConfig(policy=POLICY, budget=budget, window=WINDOW)
        )
        for budget in BUDGETS
    }
    write_record(name, record)


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
