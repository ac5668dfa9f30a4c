"""Small sweeps, logged samples and rows of results, for the tests of the ablation."""

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from vkvtrain.ablation.grid import Sweep
from vkvtrain.ablation.tasks import TaskInfo
from vkvtrain.adapters import ADAPTER_WEIGHTS, expected_shapes, skeleton
from vkvtrain.tiny import MODEL_PATH

ROOT = Path(__file__).parents[1]
GRID = {
    "model": "tiny", "policies": ["vase_attnv", "snapkv"], "budgets": [64, 80], "window": 16,
    "tasks": ["tiny_keyed_sum"], "include_path": str(ROOT / "eval/tasks"), "device": "cpu", "output": "unused",
}  # fmt: skip
TASK = TaskInfo("t", "exact_match", "none", 2, True, {}, "")


def adapter(directory, weight=0.0):
    """A directory with an adapter of the embedded model, of the smallest rank."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(MODEL_PATH))
    config.save_pretrained(directory)
    shapes = expected_shapes(skeleton(AutoConfig.from_pretrained(MODEL_PATH)), config)
    save_file({name: torch.full(shape, weight) for name, shape in shapes.items()}, directory / ADAPTER_WEIGHTS)
    return str(directory)


def sweep(**changes):
    return Sweep(**{**GRID, **changes})


def logged(doc, records, responses=None, **metrics):
    """A logged sample as lm-eval writes it."""
    found = {
        "doc_id": doc, "target": "7", "filter": "none", "resps": [[record["text"] for record in records]],
        "filtered_resps": [record["text"] for record in records], "metrics": list(metrics),
        "arguments": {"gen_args_0": {"arg_0": f"prompt {doc}", "arg_1": {"until": [], "vkvtrain": records}}}, **metrics,
    }  # fmt: skip
    return found if responses is None else {**found, "responses": responses}


def record(text, **measured):
    return {"text": text, "tokens": 5, "final_length": 9, "evictions": 1, "peak_kv_bytes": 64, **measured}


def settings(cell, **changes):
    return {
        "cell": cell, "model": "base", "policy": "snapkv", "budget": 64, "window": 16, "sinks": 4,
        "protect_prompt": False, "control": True, "task": "t", "limit": None, "seed": 0, **changes,
    }  # fmt: skip


def rows(grades, **measured):
    return [
        {
            "doc_id": doc, "repeat": 0, "grade": float(grade), "tokens": 5.0, "final_length": 160.0, "evictions": 2.0,
            "peak_kv_bytes": 640.0, "looping_or_cut_off": 0.0, "answered": None, "looping": None,
            "metrics": {"exact_match": float(grade)}, "prompt": f"p{doc}", "target": "t", "response": f"r{doc}",
            **measured,
        }
        for doc, grade in enumerate(grades)
    ]  # fmt: skip


def plan_of(cells):
    return {"cells": [{"name": f"name of {cell['cell']}", **cell} for cell in cells]}
