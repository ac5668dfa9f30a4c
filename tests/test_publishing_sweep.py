"""Publishing a run with what a sweep measured of it."""

import json
import random
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_publishing import MODEL_PATH, publish, refused, write_run

from vkvtrain.ablation.grid import Sweep
from vkvtrain.ablation.plan import make_plan, settings_of
from vkvtrain.ablation.store import Store

ROOT = Path(__file__).parents[1]
TASK, POLICY, BUDGET = "tiny_keyed_sum", "vase_attnv", 48
ACCURACY = {
    ("base", "full"): 1.0, ("dense", "full"): 1.0, ("eviction", "full"): 0.95,
    ("base", POLICY): 0.15, ("dense", POLICY): 0.3, ("eviction", POLICY): 0.9,
}  # fmt: skip
"""By model and policy; what is not named is not finished."""


def write_sweep(directory, run, without=()):
    """A sweep that measured the run as `eviction`: its plan is a real one, its samples are drawn."""
    sweep = Sweep(
        model=str(run.parent / "base"), adapters={"eviction": str(run), "dense": str(run.parent / "dense")},
        policies=[POLICY], budgets=[BUDGET], window=16, tasks=[TASK], include_path=str(ROOT / "eval/tasks"),
        output=directory,
    )  # fmt: skip
    store, plan, draw = Store(directory), make_plan(sweep), random.Random(0)
    for planned in plan.cells:
        settings = {"cell": planned.id, **settings_of(planned)}
        accuracy = ACCURACY.get((settings["model"], settings["policy"]))
        if accuracy is None or (settings["model"], settings["policy"]) in without:
            continue
        full = settings["policy"] == "full"
        rows = [
            {
                "doc_id": doc, "repeat": 0, "grade": float(draw.random() < accuracy), "tokens": 130.0,
                "final_length": 120.0, "evictions": 0.0 if full else 5.0, "peak_kv_bytes": 2000.0 if full else 1000.0,
                "looping_or_cut_off": 0.0, "answered": 1.0, "looping": 0.0, "metrics": {}, "prompt": "", "target": "",
                "response": "",
            }
            for doc in range(60)
        ]  # fmt: skip
        store.write(rows, settings, {})
    store.write_plan(plan.record())
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    shutil.copytree(MODEL_PATH, root / "base")
    write_run(root / "mine", root / "base")
    shutil.copytree(root / "mine", root / "dense")
    change(root / "dense", lora_alpha=2)
    (root / "results.json").unlink()
    return root / "mine"


def change(directory, **settings):
    """Make an adapter another one."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


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
    assert "Controls that were not measured" not in card.text
    found = {(r.metric_type, r.metric_args["cache"]) for r in card.data.eval_results}
    assert found == {("exact_match", "full"), ("exact_match", "evicted")}
    assert {r.dataset_type for r in card.data.eval_results} == {TASK}


def test_what_a_sweep_has_not_finished_is_said(run, tmp_path):
    sweep = write_sweep(tmp_path / "sweep", run, without=[("dense", POLICY)])
    publish(*arguments(run, sweep, tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    assert r"**Planned and not measured:** tiny\_keyed\_sum: dense, vase\_attnv 48, seed 0; tiny" in text
    assert "**Controls that were not measured:** a dense-trained adapter on the same data evicted by vase" in text


def test_a_sweep_must_have_measured_these_weights(run, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", run)
    other = tmp_path / "mine"
    shutil.copytree(run, other)
    change(other, lora_alpha=1)
    said = refused(capsys, *arguments(other, sweep, tmp_path / "out"))
    assert "measured other weights than those in" in said
    assert "run the sweep again with this adapter" in said
    assert "measured other weights" in refused(
        capsys, *arguments(run, sweep, tmp_path / "out"), "--results-model", "dense"
    )
    assert "'base' is the model without this adapter" in refused(
        capsys, *arguments(run, sweep, tmp_path / "out"), "--results-model", "base"
    )
    assert "the sweep has no such model (there are: base, eviction, dense)" in refused(
        capsys, *arguments(run, sweep, tmp_path / "out"), "--results-model", "mine"
    )


def test_a_sweep_without_the_evicted_run_is_refused(run, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", run, without=[("eviction", POLICY)])
    assert "with the full cache only" in refused(capsys, *arguments(run, sweep, tmp_path / "out"))
    assert "holds no sweep" in refused(capsys, *arguments(run, tmp_path, tmp_path / "out"))


def test_a_sweep_must_have_measured_the_adapter_on_its_own_base(run, tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", run)
    other = tmp_path / "mine"
    shutil.copytree(run, other)
    base = Store(sweep).plan()["models"]["base"]["fingerprint"]
    for identity, same in (({"base": base}, True), ({}, True), ({"base": "another"}, False)):
        (other / "environment.json").write_text(json.dumps({"torch": "2", "identity": identity}))
        if same:
            publish(*arguments(other, sweep, tmp_path / "out"), "--overwrite")
        else:
            said = refused(capsys, *arguments(other, sweep, tmp_path / "out"), "--overwrite")
            assert f"on another base model than that of its training ({base} instead of another)" in said
