"""The plan that a recipe prints before it trains, and the command itself."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_files import EVICTED, ROOT, values, write
from transformers import AutoTokenizer

from vkvtrain.tiny import MODEL_PATH
from vkvtrain.tiny.task import problem
from vkvtrain.training.data import Row
from vkvtrain.training.plan import expected_evictions


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    """Through the real command, with the shipped recipe and overrides."""
    command = [
        "recipes/finetune.py", "recipes/tiny/vase.yaml", "--dry-run", "--rows", "40", "--budget", "64", "--steps", "10",
        "--batch-per-device", "5", "--warmup-steps", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = {line[:17].strip(): line[17:] for line in done.stdout.splitlines()}
    assert plan["processes"] == "1 (asked for 1)"
    problems = [problem("train", 0, index) for index in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    lengths = [
        (len(tokenizer(one.prompt)["input_ids"]), len(tokenizer(one.response, add_special_tokens=False)["input_ids"]))
        for one in problems
    ]
    mean = sum(prompt + response + 1 for prompt, response in lengths) / 40
    assert plan["batch"] == (
        f"5 a forward pass x 4 accumulated x 1 processes = 16 sequences, about {16 * mean:,.0f} tokens a step"
    )
    assert plan["data"] == f"40 rows of {mean:.0f} tokens on average, 0 left out as too long, 4.00 epochs"
    found = re.fullmatch(r"([\d,]+) of ([\d,]+) parameters \(([\d.]+)%\)", plan["trainable"])
    trainable, total, share = (float(group.replace(",", "")) for group in found.groups())
    assert 0 < trainable < total
    assert share == pytest.approx(100 * trainable / total, abs=0.006)
    assert plan["objective"] == "sft, 10 steps, 20% of them dense"
    events = [naive_evictions(prompt, prompt + response, 64, 16) for prompt, response in lengths]
    assert plan["eviction"] == f"vase_attnv, budget 64, window 16: {sum(events) / 40:.1f} evictions a sample"
    assert plan["first sample"] == f"no loss  | <bos>{problems[0].prompt}"
    assert plan[""] == f"loss     | {problems[0].response}<eos>"
    assert plan["output"] == str(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def naive_evictions(prompt, seen, budget, window):
    """Events while a cache decodes a response token by token."""
    live, events = prompt, 0
    for _ in range(prompt, seen):
        live += 1
        if live > budget and live % window == 0:
            live, events = budget, events + 1
    return events


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 120)), min_size=1, max_size=4),
    st.integers(1, 12), st.integers(2, 5),
)  # fmt: skip
def test_expected_evictions_are_those_of_decoding(lengths, window, windows):
    """A response's last token is never given to the cache."""
    rows = [Row(0, [0] * (prompt + response), prompt) for prompt, response in lengths]
    budget = window * windows
    counts = [naive_evictions(prompt, prompt + response - 1, budget, window) for prompt, response in lengths]
    assert expected_evictions(rows, budget, window) == pytest.approx(sum(counts) / len(counts))


def test_the_plan_tells_a_dense_run_and_a_budget_that_nothing_reaches(tmp_path, finetune, capsys):
    path = write(tmp_path / "r.yaml", values(tmp_path, eviction={**EVICTED, "budget": [64, 4096]}))

    def plan(*arguments):
        assert finetune([str(path), "--dry-run", *arguments]) == 0
        return capsys.readouterr().out

    both = plan()
    assert re.search(r"budget 64, window 16: [1-9][\d.]* evictions a sample", both)
    assert "budget 4096, window 16: 0.0 evictions a sample" in both
    assert both.count("WARNING") == 1
    assert "WARNING          no row ever exceeds budget 4096" in both
    for arguments in (["--eviction", "null"], ["--dense_fraction", "1"], ["--eviction", "{policy: full}"]):
        dense = plan(*arguments)
        assert "eviction         none: this is a dense run" in dense
        assert "evictions a sample" not in dense
    assert not (tmp_path / "run").exists()


def test_rows_that_are_too_long_are_counted_in_the_plan(tmp_path, finetune, capsys):
    rows = [{"prompt": "a1?", "completion": "1" * length} for length in (5, 6, 30, 7, 40)]
    source = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    content = values(tmp_path, data={"source": str(source), "held_out": 0, "max_length": 20})
    assert finetune([str(write(tmp_path / "r.yaml", content)), "--dry-run"]) == 0
    assert "3 rows of 11 tokens on average, 2 left out as too long" in capsys.readouterr().out


def test_the_command_trains_and_refuses_to_overwrite(tmp_path, finetune, capsys):
    path = write(tmp_path / "r.yaml", values(tmp_path))
    short = ["--steps", "1", "--warmup_steps", "0", "--global_batch", "2"]
    assert finetune([str(path), *short]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "adapter written to" in capsys.readouterr().out
    assert finetune([str(path), *short]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"finetune: output '.*run' holds a finished run: choose another output, or pass --overwrite", message
    )
    assert finetune([str(path), *short, "--overwrite"]) == 0
