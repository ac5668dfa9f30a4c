"""Sweeps that run: shares of the machine, processes that fail, die and are interrupted, and the commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import GRID, ROOT, adapter, logged, plan_of, record, rows, settings, sweep

from vkvtrain import EvictionConfig, cli
from vkvtrain.ablation import runner as runner_module
from vkvtrain.ablation.command import parse_ablate
from vkvtrain.ablation.export import cells_table, samples_table, statuses
from vkvtrain.ablation.grid import Sweep
from vkvtrain.ablation.plan import make_plan
from vkvtrain.ablation.runner import Runner, Slot, command_of, last_lines, slots
from vkvtrain.ablation.store import Store


def test_the_machine_is_shared():
    cpu = sweep(parallel_cells=2, processes=2)
    assert slots(cpu, []) == [Slot(2, max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // 4))] * 2
    gpu = Sweep(**{**GRID, "device": None, "parallel_cells": 2})
    assert [slot.gpus for slot in slots(gpu, ["4", "5", "6", "7"])] == [("4", "5"), ("6", "7")]
    assert [slot.processes for slot in slots(gpu, ["4", "5", "6", "7"])] == [2, 2]
    with pytest.raises(ValueError, match=r"parallel_cells \(2\) is more than the 1 GPUs"):
        slots(gpu, ["0"])
    with pytest.raises(ValueError, match=r"processes \(3\) is more than the 2 GPUs"):
        slots(Sweep(**{**GRID, "device": None, "processes": 3}), ["0", "1"])


def test_the_command_of_a_cell(tmp_path):
    given = sweep(
        adapters={"x": adapter(tmp_path / "a, b")}, limit=7, model_args={"dtype": "float32"}, apply_chat_template=True,
        tasks=[{"task": "tiny_keyed_sum", "gen_kwargs": {"max_gen_toks": 9}, "num_fewshot": 0}],
    )  # fmt: skip
    planned = next(cell for cell in make_plan(given).cells if cell.cell.model == "x" and cell.cell.config.budget == 64)
    command = command_of(planned, given, Slot(1, 1), tmp_path)
    arguments = json.loads(command[command.index("--model_args") + 1])
    assert arguments["peft"] == str(tmp_path / "a, b")
    assert (arguments["eviction_config"], arguments["dtype"]) == (str(tmp_path), "float32")
    assert command[command.index("--limit") + 1] == "7"
    assert json.loads(command[command.index("--gen_kwargs") + 1]) == {"max_gen_toks": 9}
    assert command[-1] == "--apply_chat_template"
    two = command_of(planned, given, Slot(2, 1), tmp_path)
    assert two[1:3] == ["-m", "accelerate.commands.launch"]
    assert two[two.index("--num_processes") + 1] == "2"


class Diary:
    """A watcher that remembers."""

    def __init__(self):
        self.lines = []

    def started(self, planned):
        self.lines.append(("started", planned.id))

    def finished(self, planned, rows, seconds):
        self.lines.append(("finished", planned.id))

    def failed(self, planned, failure, again):
        self.lines.append(("failed", planned.id, failure.reason, again))


WORKER = """
import json, os, pathlib, signal, sys, time
directory, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
print("loading", flush=True)
first = not (directory / "tried").exists()
(directory / "tried").touch()
if behaviour == "wait":
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(60)
if behaviour == "killed" or (behaviour == "killed once" and first):
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "broken" or behaviour == "refused":
    print("progress 10%\\rprogress 90%\\nRuntimeError: CUDA out of memory", file=sys.stderr)
    sys.exit(1 if behaviour == "broken" else 2)
out = directory / "lm-eval" / "model"
out.mkdir(parents=True)
if behaviour != "silent":
    sample = json.loads(sys.argv[3])
    (out / "samples_tiny_keyed_sum_now.jsonl").write_text(json.dumps(sample))
"""


def play(tmp_path, monkeypatch, behaviours, retries=1):
    """Run a plan whose cells behave as told; returns what the watcher saw, the failures, the plan and the store."""
    given = sweep(
        policies=["snapkv", "tova"], budgets=[64], controls=False, retries=retries, output=str(tmp_path / "out")
    )
    plan = make_plan(given)
    sample = json.dumps(logged(0, [record("7")], exact_match=1.0))
    told = dict(zip((planned.id for planned in plan.cells), behaviours, strict=False))

    def command(planned, sweep, slot, directory):
        return [sys.executable, "-c", WORKER, str(directory), told[planned.id], sample]

    monkeypatch.setattr(runner_module, "command_of", command)
    store, diary = Store(given.output), Diary()
    store.write_plan(plan.record())
    todo = [planned for planned in plan.cells if planned.id in told and planned.id not in store.finished()]
    with store.lock() as lock:
        failures = Runner(plan, store, [Slot(1, 1)] * 2, diary, lock).run(todo)
    return diary.lines, failures, plan, store


def test_finished_cells_are_kept_and_not_run_again(tmp_path, monkeypatch):
    lines, failures, plan, store = play(tmp_path, monkeypatch, ["well", "well"])
    ids = [planned.id for planned in plan.cells]
    assert not failures
    assert set(store.finished()) == set(ids)
    assert [line[0] for line in sorted(lines)] == ["finished", "finished", "started", "started"]
    about = store.about(ids[0])
    assert about["versions"]["transformers"]
    assert about["eviction"]["policy"] == "snapkv"
    assert EvictionConfig.from_pretrained(store.work / ids[0]).policy == "snapkv"
    again, *_ = play(tmp_path, monkeypatch, ["broken", "broken"])
    assert again == []


def test_a_cell_whose_model_changed_while_it_ran_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "what_changed", lambda planned, sweep: "the files of model base")
    _, failures, _, store = play(tmp_path, monkeypatch, ["well", "well"])
    assert not store.finished()
    said = "the files of model base changed after the sweep began, so run the sweep again"
    assert [(failure.reason, failure.attempts) for failure in failures] == [(said, 1)] * 2


def test_a_dead_worker_is_noticed_and_costs_only_its_own_cell(tmp_path, monkeypatch):
    lines, failures, plan, store = play(tmp_path, monkeypatch, ["killed", "well"])
    dead, well = (planned.id for planned in plan.cells)
    assert [(failure.reason, failure.attempts) for failure in failures] == [("killed by SIGKILL", 2)]
    assert ("failed", dead, "killed by SIGKILL", True) in lines
    assert ("failed", dead, "killed by SIGKILL", False) in lines
    assert set(store.finished()) == {well}
    states = {status.cell: status.state for status in statuses(store)}
    assert states == {dead: "failed after 2 attempts: killed by SIGKILL", well: "finished"}
    _, failures, _, store = play(tmp_path, monkeypatch, ["well"])
    assert not failures
    assert {status.state for status in statuses(store)} == {"finished"}
    assert not store.failures()


def test_a_cell_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    lines, failures, _, store = play(tmp_path, monkeypatch, ["killed once"])
    assert not failures
    assert [line[0] for line in lines] == ["started", "failed", "started", "finished"]
    assert len(store.finished()) == 1


@pytest.mark.parametrize(
    ("behaviour", "reason", "attempts"),
    [("broken", "exit status 1", 2), ("refused", "exit status 2", 1), ("silent", "lm-eval left no samples", 2)],
)
def test_failures_say_why(tmp_path, monkeypatch, behaviour, reason, attempts):
    _, (failure,), _, store = play(tmp_path, monkeypatch, [behaviour])
    assert failure.reason.startswith(reason)
    assert failure.attempts == attempts
    if behaviour != "silent":
        assert failure.last_lines[-2:] == ["progress 90%", "RuntimeError: CUDA out of memory"]
    assert "loading" in Path(failure.log).read_text()
    assert not store.finished()


def test_last_lines_of_no_log(tmp_path):
    assert last_lines(tmp_path / "nothing") == []


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
import test_ablation_runs, pathlib
class Patch:
    def setattr(self, owner, name, value):
        setattr(owner, name, value)
try:
    test_ablation_runs.play(pathlib.Path({directory!r}), Patch(), ["well", "wait"])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_children_and_keeps_what_is_finished(tmp_path, number):
    code = INTERRUPTED.format(tests=str(ROOT / "tests"), directory=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    store = Store(tmp_path / "out")
    deadline = time.monotonic() + 90
    while not (list(store.work.glob("*/pid")) and list(store.cells.glob("*.parquet"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    (file,) = store.work.glob("*/pid")
    child = int(file.read_text())
    process.send_signal(number)
    assert process.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert sorted(status.state for status in statuses(store)) == ["finished", "not run"]
    with store.lock():  # nothing that the sweep left holds the directory
        pass


def test_the_command_line(tmp_path, capsys):
    assert parse_ablate(["a.yaml", "--limit", "5", "--budgets=[64, 80]", "--dry-run"]) == (
        Path("a.yaml"), {"limit": 5, "budgets": [64, 80]}, True,
    )  # fmt: skip
    for arguments, says in (
        ([], "give exactly one sweep"),
        (["a.yaml", "--limt", "5"], "did you mean 'limit'"),
        (["a.yaml", "--limit"], "--limit needs a value"),
        (["a.yaml", "--limit", "[", "--dry-run"], "is not a YAML value"),
        (["missing.yaml"], "there is no sweep 'missing.yaml'"),
    ):
        assert cli.main(["ablate", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["results", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert cli.main(["ablate", "--help"]) == 0
    assert "--parallel_cells [1]" in capsys.readouterr().out


def test_what_is_missing_is_shown_beside_the_results(tmp_path, capsys):
    store = Store(tmp_path)
    store.write(rows([1, 0]), settings("a"), {})
    store.write(rows([1, 1]), settings("old", limit=3), {})
    store.write_plan(plan_of([settings("a"), settings("b", seed=1)]))
    assert cli.main(["results", str(tmp_path), "--where", "budget = 64"]) == 0
    shown = capsys.readouterr().out
    assert "MISSING name of b: not run" in shown
    assert "old" not in shown
    assert cli.main(["results", str(tmp_path), "--every", "--samples", "--export", str(tmp_path / "all.csv")]) == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_sweep_of_the_embedded_model(tmp_path, capsys):
    """The real processes, from the sweep to the report; a second run has nothing to do."""
    command = ["ablate", str(ROOT / "eval/sweeps/quickstart.yaml"), "--limit", "3", "--budgets", "64", "--seeds", "0"]
    command += ["--adapters", "{}", "--policies", "[vase_attnv]", "--include_path", str(ROOT / "eval/tasks")]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("done    tiny_keyed_sum") == 3
    store = Store(tmp_path)
    assert {row["model"] for row in cells_table(store).to_pylist()} == {"base"}
    assert samples_table(store).num_rows == 9
    assert samples_table(store, where="budget = 64 AND evictions > 0").num_rows == 6
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    assert "3 cells, 3 finished" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report/report.html").stat().st_size > 20_000
