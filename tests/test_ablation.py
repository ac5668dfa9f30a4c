"""Sweeps: the grid, the identity of cells, the store, and processes that fail, die and are interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from passes import tiny_model
from safetensors.torch import save_file

from vkvtrain import EvictionConfig, cli, simulated_eviction
from vkvtrain.ablation import runner as runner_module
from vkvtrain.ablation.command import parse_ablate
from vkvtrain.ablation.export import cells_table, export, samples_table, statuses
from vkvtrain.ablation.grid import Sweep, draws, load_sweep, without_repeats
from vkvtrain.ablation.plan import make_plan
from vkvtrain.ablation.runner import Runner, Slot, command_of, last_lines, slots
from vkvtrain.ablation.samples import read_rows, rows_of
from vkvtrain.ablation.store import Store
from vkvtrain.ablation.tasks import TaskInfo, fingerprint
from vkvtrain.policies import POLICIES

ROOT = Path(__file__).parents[1]
GRID = {
    "model": "tiny", "policies": ["vase_attnv", "snapkv"], "budgets": [64, 80], "window": 16,
    "tasks": ["tiny_keyed_sum"], "include_path": str(ROOT / "eval/tasks"), "device": "cpu", "output": "unused",
}  # fmt: skip


def adapter(directory, weight=0.0):
    """A directory that looks like a finished adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    save_file({"w": torch.full((2,), weight)}, directory / "adapter_model.safetensors")
    return str(directory)


def sweep(**changes):
    return Sweep(**{**GRID, **changes})


def names(cells):
    return {(cell.model, cell.label, cell.config.budget, cell.seed) for cell in cells}


def test_every_shipped_sweep_parses():
    files = list((ROOT / "eval/sweeps").glob("*.yaml"))
    assert files
    for file in files:
        assert list(load_sweep(file).cells())


def test_controls_are_part_of_the_grid(tmp_path):
    adapters = {"ours": "a", "dense": "b"}
    cells = list(sweep(adapters=adapters, budgets=64, policies=["vase_attnv"]).cells())
    assert names(cells) == {
        *((model, "full", None, 0) for model in ("base", "ours", "dense")),
        *((model, "vase_attnv", 64, 0) for model in ("base", "ours", "dense")),
        ("base", "random + prompt", 64, 0),
    }
    assert [cell.model for cell in cells if not cell.control] == ["ours"]
    bare = sweep(adapters=adapters, budgets=64, policies=["vase_attnv"], controls=False)
    assert names(bare.cells()) == {("ours", "vase_attnv", 64, 0), ("dense", "vase_attnv", 64, 0)}
    assert sweep(adapters={"ours": "a"}).misses_dense_control
    assert not sweep(adapters=adapters).misses_dense_control
    assert not sweep().misses_dense_control


def test_a_policy_keeps_its_protections_and_shows_them():
    entry = {"policy": "random", "protect_prompt": True, "sinks": 0, "protected_fraction": 0.1}
    (cell, *_) = [c for c in sweep(policies=[entry], budgets=64).cells() if c.label.startswith("random + prompt (")]
    assert cell.label == "random + prompt (protected=0.1, sinks=0)"
    assert (cell.config.protect_prompt, cell.config.sinks, cell.config.protected_fraction) == (True, 0, 0.1)
    rkv = next(iter(sweep(policies=[{"policy": "rkv", "policy_args": {"lam": 0.3}}], controls=False).cells()))
    assert rkv.label == "rkv (lam=0.3)"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_a_seed_matters_exactly_where_it_is_said_to(name):
    model = tiny_model(vocab=40)
    ids = torch.randint(1, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    kept = []
    for seed in (0, 1):
        config = EvictionConfig(policy=name, budget=24, window=8, sinks=2, seed=seed)
        with torch.no_grad(), simulated_eviction(model, config, [9]) as trace:
            model(input_ids=ids, use_cache=False)
        kept.append(torch.stack([trace.evict_at[layer] for layer in sorted(trace.evict_at)]))
    assert draws(config) != torch.equal(*kept)


def test_what_draws_nothing_runs_once_for_all_seeds():
    grid = sweep(seeds=[3, 5], budgets=64, controls=False)
    assert names(without_repeats(list(grid.cells()), {"tiny_keyed_sum": False})) == {
        ("base", "vase_attnv", 64, 3), ("base", "vase_attnv", 64, 5), ("base", "snapkv", 64, None),
    }  # fmt: skip
    assert len(without_repeats(list(grid.cells()), {"tiny_keyed_sum": True})) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"polices": ["snapkv"]}, "unknown setting 'polices' (did you mean 'policies'?)"),
        ({"policies": [{"policy": "random", "protect_promt": True}]}, "did you mean 'protect_prompt'"),
        ({"policies": ["vase_atnv"]}, "did you mean 'vase_attnv'"),
        ({"policies": ["full"]}, "'full' alone is no ablation"),
        ({"policies": ["snapkv", "snapkv"]}, "'snapkv' is there twice"),
        ({"budgets": [64, 70]}, "policy 'vase_attnv' at budget 70: budget (70) must be a multiple of window (16)"),
        ({"budgets": []}, "budgets"),
        ({"adapters": {"base": "x"}}, "'base' is the untrained model"),
        ({"adapters": {"x": {"pef": "y"}}}, "did you mean 'peft'"),
        ({"adapters": {"x": {"peft": "y", "pretrained": "z"}}}, "either peft"),
        ({"model_args": {"budget": 64}}, "model_args: budget is a setting of the sweep itself"),
        ({"tasks": [{"task": "a", "limits": 3}]}, "did you mean 'limit'"),
        ({"tasks": ["a", {"task": "a", "limit": 3}]}, "same task"),
        ({"retries": -1}, "retries"),
    ],
)
def test_bad_sweeps_are_one_sentence(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        sweep(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["tiny_keyed_sun"], "include_path": "no/where"}, "include_path: there is no directory 'no/where'"),
        ({"model": "no/where/at/all"}, "model: 'no/where/at/all' cannot be loaded"),
        ({"adapters": {"x": "runs/no/adapter"}}, "adapters.x: there is no directory 'runs/no/adapter'"),
        ({"policies": [{"policy": "snapkv", "skip_layers": [9]}]}, "skip_layers names layer 9"),
        ({"tasks": [{"task": "tiny_keyed_sum", "metric": "accuracy"}]}, "needs metric: one of exact_match"),
        ({"tasks": [{"task": "tiny_keyed_sum", "filter": "x"}]}, "needs filter: one of none"),
        ({"tasks": [{"task": "tiny_keyed_sum", "metadata": {"data": "no.jsonl"}}]}, "there is no file 'no.jsonl'"),
    ],
)
def test_models_and_tasks_are_checked_before_anything_runs(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        make_plan(sweep(**changes))
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_weights_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        make_plan(sweep(adapters={"x": str(tmp_path)}))


def identities(**changes):
    return {planned.cell.name: planned.id for planned in make_plan(sweep(**changes)).cells}


def test_a_changed_setting_makes_a_new_cell_and_speed_does_not(tmp_path):
    base = {"adapters": {"x": adapter(tmp_path / "x")}, "budgets": [64], "policies": ["snapkv"]}
    before = identities(**base)
    assert len(set(before.values())) == len(before)
    assert identities(**base, batch_size=7, parallel_cells=2, processes=3, retries=9, output="else") == before
    moved = {**base, "adapters": {"x": adapter(tmp_path / "moved")}}
    assert identities(**moved) == before  # what counts is what is in the files
    for change in (
        {"limit": 5}, {"sinks": 3}, {"model_args": {"dtype": "bfloat16"}}, {"apply_chat_template": True},
        {"tasks": [{"task": "tiny_keyed_sum", "gen_kwargs": {"max_gen_toks": 99}}]},
        {"tasks": [{"task": "tiny_keyed_sum", "metadata": {"data_seed": 1}}]},
    ):  # fmt: skip
        after = identities(**base, **change)
        changed = {name for name, value in after.items() if before[name] != value}
        assert changed == (set(after) if "sinks" not in change else {n for n in after if "full" not in n} | changed), (
            change
        )
    after = identities(**{**base, "adapters": {"x": adapter(tmp_path / "x", weight=1.0)}})
    assert {name for name, value in after.items() if before[name] != value} == {n for n in before if ": x," in n}


def test_a_task_is_known_by_its_functions_source_and_not_by_its_place(tmp_path):
    prints = []
    for place, source in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "grade.py").write_text(source)
        prints.append(fingerprint({"task": "t", "process_results": str(tmp_path / place / "grade.best")}))
    assert prints[0] == prints[1] != prints[2]


TASK = TaskInfo("t", "exact_match", "none", 2, True, {}, "")


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


def test_a_row_for_each_problem_and_repeat():
    graded = [{"answer": "7", "exact_match": 1.0}, {"answer": None, "exact_match": 0.0}]
    records = [record("seven", answered=True, looping=False), record("loop", answered=False, looping=True, tokens=8)]
    rows = list(rows_of(logged(4, records, graded, exact_match=0.5, fact=0.25), TASK))
    assert [(row["doc_id"], row["repeat"], row["grade"]) for row in rows] == [(4, 0, 1.0), (4, 1, 0.0)]
    assert [row["response"] for row in rows] == ["seven", "loop"]
    assert [(row["answered"], row["looping"], row["tokens"]) for row in rows] == [(1, 0, 5), (0, 1, 8)]
    assert rows[0]["looping_or_cut_off"] is None
    assert rows[0]["metrics"] == {"exact_match": 1.0, "fact": 0.25}
    assert rows[0]["prompt"] == "prompt 4"
    plain = list(rows_of(logged(4, records, exact_match=0.5), TASK))  # a task that knows no repeats
    assert [row["grade"] for row in plain] == [0.5, 0.5]
    listed = list(rows_of(logged(4, records, exact_match=[0.0, 1.0]), TASK))
    assert [row["grade"] for row in listed] == [0.0, 1.0]
    more = list(rows_of(logged(4, [*records, record("padding")], exact_match=1.0), TASK))
    assert len(more) == 2  # a lagging rank's extra response is no repeat
    with pytest.raises(ValueError, match="no metric 'exact_match'"):
        list(rows_of(logged(4, records, other=1.0), TASK))
    with pytest.raises(ValueError, match="no grade from 0 to 1"):
        list(rows_of(logged(4, records, exact_match=3.5), TASK))


def test_choices_are_one_response(tmp_path):
    arguments = {
        f"gen_args_{choice}": {
            "arg_0": "question",
            "arg_1": "ab"[choice],
            "arg_2": {"vkvtrain": [{"evictions": choice}]},
        }
        for choice in range(2)
    }
    sample = {
        "doc_id": 0, "target": "1", "filter": "none", "resps": [[[-1.0, False]], [[-2.0, False]]],
        "filtered_resps": [[-1.0, False], [-2.0, False]], "metrics": ["acc"], "acc": 1.0, "arguments": arguments,
    }  # fmt: skip
    (row,) = rows_of(sample, TaskInfo("t", "acc", "none", 1, False, {}, ""))
    assert (row["grade"], row["evictions"], row["tokens"]) == (1.0, 1.0, None)
    assert json.loads(row["response"]) == [[-1.0, False], [-2.0, False]]
    with pytest.raises(ValueError, match="no samples of t"):
        read_rows(tmp_path, TASK)


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


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path)
    store.write(rows([1, 0, 1]), settings("a"), {"seconds": 3})
    store.write(rows([0, 0, 1]), settings("b", budget=80, seed=None), {"seconds": 4})
    assert set(store.finished()) == {"a", "b"}
    assert store.about("b") == {"seconds": 4}
    table = samples_table(store)
    assert table.num_rows == 6
    first = table.to_pylist()[0]
    assert {**first, "metrics": dict(first["metrics"])} == {**settings("a"), **rows([1, 0, 1])[0]}
    listed = cells_table(store, where="budget = 64 AND grade > 0").to_pylist()
    assert [(row["cell"], row["problems"], row["grade"]) for row in listed] == [("a", 2, 1.0)]
    assert [row["cell"] for row in cells_table(store, ["b"]).to_pylist()] == ["b"]
    assert cells_table(store, where="metrics['exact_match'] = 0 AND seed IS NULL").to_pylist()[0]["problems"] == 2


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("budgt = 64", "budgt"),
        ("1 = 1; DROP VIEW samples", "no condition"),
        ("true) OR (true", "no condition"),
        ("true UNION SELECT 1", "no condition"),
        ("doc_id IN (SELECT 1 FROM read_csv('/etc/passwd'))", "file system operations are disabled"),
        ("doc_id IN (SELECT 1 FROM read_text('OUTSIDE'))", "file system operations are disabled"),
        ("", "no condition"),
    ],
)
def test_a_condition_looks_at_samples_and_no_further(tmp_path, where, says):
    store = Store(tmp_path / "store")
    store.write(rows([1]), settings("a"), {})
    (tmp_path / "outside").write_text("secret")
    with pytest.raises(ValueError, match="--where") as error:
        samples_table(store, where=where.replace("OUTSIDE", str(tmp_path / "outside")))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_store_has_an_empty_table(tmp_path):
    assert samples_table(Store(tmp_path)).num_rows == 0


def test_many_writers_and_a_reader_never_meet_half_a_file(tmp_path):
    store, wrong = Store(tmp_path), []

    def write(worker):
        for turn in range(8):
            store.write(rows([turn % 2] * 50), settings(f"{worker}-{turn % 3}"), {})

    def read():
        while any(writer.is_alive() for writer in writers):
            if cells_table(store).num_rows and {row["samples"] for row in cells_table(store).to_pylist()} != {50}:
                wrong.append("half a cell")

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in (*writers, reader):
        thread.join()
    assert not wrong
    assert len(store.finished()) == 9
    assert not [path for path in store.cells.iterdir() if path.name.startswith(".")]


def test_a_damaged_file_is_named(tmp_path):
    store = Store(tmp_path)
    path = store.write(rows([1]), settings("a"), {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged .* delete it"):
        store.finished()


def test_one_sweep_at_a_time_in_a_directory(tmp_path):
    store = Store(tmp_path)
    with store.lock(), pytest.raises(ValueError, match="in use by another sweep"), Store(tmp_path).lock():
        pass
    with store.lock():
        pass


def test_exports(tmp_path):
    store = Store(tmp_path)
    store.write(rows([1, 0]), settings("a"), {})
    table = samples_table(store)
    for ending in ("csv", "json", "parquet"):
        export(table, tmp_path / f"out.{ending}")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2
    assert json.loads((tmp_path / "out.json").read_text())[1]["metrics"] == {"exact_match": 0.0}
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0].startswith('"cell","model"')
    assert '{""exact_match"": 1.0}' in lines[1]
    with pytest.raises(ValueError, match="must end in"):
        export(table, tmp_path / "out.xlsx")


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
import test_ablation, pathlib
class Patch:
    def setattr(self, owner, name, value):
        setattr(owner, name, value)
try:
    test_ablation.play(pathlib.Path({directory!r}), Patch(), ["well", "wait"])
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
