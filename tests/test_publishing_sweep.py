"""Publishing a run with what a sweep measured of it."""

import json
import random
import shutil

import pytest
from huggingface_hub import ModelCard
from test_publishing import MODEL_PATH, publish, refused, write_run

from vkvtrain.ablation.plan import ADAPTER, hash_of
from vkvtrain.ablation.store import Store

TASK, POLICY, BUDGET = "tiny_keyed_sum", "vase_attnv", 48
ACCURACY = {
    ("base", "full"): 1.0, ("dense", "full"): 1.0, ("eviction", "full"): 0.95,
    ("base", POLICY): 0.15, ("dense", POLICY): 0.3, ("eviction", POLICY): 0.9,
}  # fmt: skip


def write_sweep(directory, run, without=()):
    """A finished sweep that measured the run as `eviction`, without some of its cells."""
    store, cells = Store(directory), []
    draw = random.Random(0)
    for number, ((model, policy), accuracy) in enumerate(ACCURACY.items()):
        full = policy == "full"
        settings = {
            "cell": f"cell{number}", "model": model, "policy": policy, "budget": None if full else BUDGET,
            "window": None if full else 16, "sinks": None if full else 4, "protect_prompt": False,
            "control": model != "eviction", "task": TASK, "limit": None, "seed": 0,
        }  # fmt: skip
        cells.append({**settings, "name": f"{model} {policy}"})
        rows = [
            {
                "doc_id": doc, "repeat": 0, "grade": float(draw.random() < accuracy), "tokens": 130.0,
                "final_length": 120.0, "evictions": 0.0 if full else 5.0, "peak_kv_bytes": 2000.0 if full else 1000.0,
                "looping_or_cut_off": 0.0, "answered": 1.0, "looping": 0.0, "metrics": {}, "prompt": "", "target": "",
                "response": "",
            }
            for doc in range(60)
        ]  # fmt: skip
        if (model, policy) not in without:
            store.write(rows, settings, {})
    adapter = hash_of([run / part for part in ADAPTER], run)
    fingerprints = {"base": {}, "dense": {"adapter": "of another"}, "eviction": {"adapter": adapter}}
    store.write_plan(
        {
            "models": {name: {"fingerprint": json.dumps(value)} for name, value in fingerprints.items()},
            "tasks": {TASK: {"metric": "exact_match"}},
            "cells": cells,
        }
    )
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    shutil.copytree(MODEL_PATH, root / "base")
    write_run(root / "mine", root / "base")
    (root / "results.json").unlink()
    return root / "mine"


def arguments(run, sweep, out):
    return [run, "--to", out, "--base-name", "acme/tiny", "--results", sweep]


def test_a_sweep_gives_the_table_the_gap_and_the_comparisons(run, tmp_path):
    publish(*arguments(run, write_sweep(tmp_path / "sweep", run), tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out/README.md")
    (own,) = [
        line for line in card.text.splitlines() if line.startswith(r"| eviction (this model) | tiny\_keyed\_sum | ev")
    ]
    cells = own.split(" | ")
    assert cells[3:6] == ["48", "2.50x", "2.00x"]
    assert cells[7].startswith(("8", "9"))  # the gap, about (0.9 - 0.15) / (1 - 0.15)
    assert "Gap closed is the share" in card.text
    compared = [line for line in card.text.splitlines() if "dense-trained, evicted alike" in line]
    assert len(compared) == 1
    assert compared[0].endswith("| 60 |")
    assert "not measured" not in card.text
    found = {(r.metric_type, r.metric_args["cache"]) for r in card.data.eval_results}
    assert found == {("exact_match", "full"), ("exact_match", "evicted")}
    assert {r.dataset_type for r in card.data.eval_results} == {TASK}


def test_what_a_sweep_has_not_finished_is_said(run, tmp_path):
    sweep = write_sweep(tmp_path / "sweep", run, without=[("dense", POLICY)])
    publish(*arguments(run, sweep, tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    assert r"**Planned and not measured:** dense vase\_attnv." in text
    assert "**Controls that were not measured:** a dense-trained adapter on the same data evicted by vase" in text


def test_a_sweep_must_have_measured_these_weights(run, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", run)
    other = tmp_path / "mine"
    shutil.copytree(run, other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    said = refused(capsys, *arguments(other, sweep, tmp_path / "out"))
    assert "measured other weights than those in" in said
    assert "run the sweep again with this adapter" in said
    assert "measured other weights" in refused(
        capsys, *arguments(run, sweep, tmp_path / "out"), "--results-model", "dense"
    )
    assert "the sweep has no such model (there are: base, dense, eviction)" in refused(
        capsys, *arguments(run, sweep, tmp_path / "out"), "--results-model", "mine"
    )


def test_a_sweep_without_the_evicted_run_is_refused(run, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", run, without=[("eviction", POLICY)])
    assert "with the full cache only" in refused(capsys, *arguments(run, sweep, tmp_path / "out"))
    assert "holds no sweep" in refused(capsys, *arguments(run, tmp_path, tmp_path / "out"))
