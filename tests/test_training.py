"""The training loop against transformers' Trainer, its own equivalence classes, objectives, schedule, run directory."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.events import evictions_by
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import loop, objectives
from vkvtrain.training.data import collate, load_data, sample
from vkvtrain.training.loop import asked_processes, check_world_size, load_model, step_rows, train, train_step
from vkvtrain.training.objectives import forward_kl, response_logits, teacher_logits
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.schedule import is_dense, step_eviction
from vkvtrain.training.settings import Recipe

ROOT = Path(__file__).parents[1]
EVICTED = {"policy": "vase_attnv", "budget": 24, "window": 8}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state in singletons, which a Trainer changes."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def source(tmp_path):
    """Rows of noise, which no model knows, with responses of very different lengths."""
    rng, path = random.Random(0), tmp_path / "rows.jsonl"
    lengths = [(rng.randint(3, 20), rng.choice([1, 4, 15, 60])) for _ in range(48)]
    rows = [
        {
            "prompt": "".join(rng.choices("abcdef", k=prompt)),
            "completion": "".join(rng.choices("0123456789", k=response)),
        }
        for prompt, response in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(source, output, eviction=None, **sections):
    """A short run on the embedded model; sections add to the defaults here."""
    chosen = {
        "model": {"name": "tiny"},
        "data": {"source": str(source), "held_out": 0},
        "training": {"steps": 3, "global_batch": 16},
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    }
    merged = {
        name: {**chosen.get(name, {}), **sections.pop(name, {})} for name in ("model", "data", "training", "optim")
    }
    return Recipe(**merged, eviction=eviction, output=output, **sections)


def run(settings, **flags):
    """Train; the rows of the log."""
    train(settings, **flags)
    return metrics(settings.output)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def column(rows, name):
    return [row[name] for row in rows]


def assert_same_training(ours, theirs, relative):
    """Losses, norms and what was evicted, of two runs' logs."""
    for name in ("loss", "grad_norm"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=relative)
    for name in ("kind", "budget", "evictions"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]


def assert_same_adapter(ours, theirs, relative):
    """Adapters equal up to rounding: the norm of the difference against the norm, weight by weight.

    Adam divides a gradient by its own size, so single entries whose gradient is all rounding may move freely.
    """
    ours, theirs = adapter(ours), adapter(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= relative * theirs[name].norm(), name


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def pad_right(rows):
    """A Trainer's batch: -100 where there is no loss."""
    width = max(len(row["ids"]) for row in rows)
    padded = {
        "input_ids": [row["ids"] + [0] * (width - len(row["ids"])) for row in rows],
        "attention_mask": [[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows],
        "labels": [row["labels"] + [-100] * (width - len(row["ids"])) for row in rows],
    }
    return {name: torch.tensor(values) for name, values in padded.items()}


@pytest.mark.parametrize(("ours", "theirs"), [((8, 8), (8, 1)), ((8, 3), (2, 4))], ids=["whole batch", "accumulated"])
def test_agrees_with_the_trainer_of_transformers(source, tmp_path, ours, theirs):
    """20 float32 steps without eviction: the same data, initial weights and learning rate, stock attention there."""
    (batch, forward), steps = ours, 20
    settings = recipe(
        source, tmp_path / "ours", lora={"r": 8, "alpha": 16},
        training={"steps": steps, "global_batch": batch, "batch_per_device": forward},
    )  # fmt: skip
    logged = run(settings)

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    rows = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"ids": prompt + response, "labels": [-100] * len(prompt) + response})
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=steps, per_device_train_batch_size=theirs[0],
        gradient_accumulation_steps=theirs[1], learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, logging_steps=1, logging_nan_inf_filter=False, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    ordered = [rows[sample(position, len(rows), 0)[0]] for position in range(steps * batch)]
    trainer = InOrder(model, arguments, train_dataset=ordered, data_collator=pad_right)
    trainer.train()
    history = [row for row in trainer.state.log_history if "grad_norm" in row]

    for a, b in zip(logged, history): print(a["loss"], b["loss"], a["loss"]/b["loss"]-1, a["grad_norm"]/b["grad_norm"]-1)
    assert len(history) == len(logged) == steps
    assert column(logged, "loss") == pytest.approx(column(history, "loss"), rel=2e-5)
    assert column(logged, "grad_norm") == pytest.approx(column(history, "grad_norm"), rel=2e-5)
    assert column(logged, "learning_rate") == column(history, "learning_rate")
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5  # it trained, so the later steps compare something
