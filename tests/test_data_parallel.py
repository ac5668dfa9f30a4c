"""An evaluation on two processes is the evaluation on one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest

from vkvtrain.tiny import MODEL_PATH

ROOT = Path(__file__).parents[1]
MODEL = f"pretrained={MODEL_PATH},policy=random,budget=32,window=16,sinks=1"
TASKS = {"tiny_keyed_sum": "exact_match", "vkv_passcode_scored": "acc"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def arguments(directory):
    data = json.dumps({"problems": 5, "repeats": 2, "filler_words": 20})
    return [
        "--model_args", MODEL, "--tasks", ",".join(TASKS), "--batch_size", "4", "--metadata", data,
        "--log_samples", "--output_path", str(directory),
        "--gen_kwargs", "do_sample=true", "temperature=0.8", "max_gen_toks=100",
    ]  # fmt: skip


def on_two_processes(directory):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    run = ["-m", "vkvtrain.cli", "lm-eval", "run", "--model", "vkv", "--include_path", "eval/tasks", "--device", "cpu"]
    return [sys.executable, *launch, "--main_process_port", str(free_port()), *run, *arguments(directory)]


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def outcome(directory):
    """What lm-eval wrote: its results, and the samples of each task."""
    (results,) = directory.rglob("results_*.json")  # one rank writes
    samples = {}
    for task in TASKS:
        (path,) = directory.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text()), samples


@pytest.mark.slow
def test_two_processes_evaluate_every_sample_once(tmp_path):
    """Five problems on two ranks: one of them lags, is padded by lm-eval, and must not count anything twice."""
    status, printed = forked.lm_eval(tmp_path / "log", *arguments(tmp_path / "one"))
    assert status == 0, printed[-3000:]
    done = subprocess.run(
        on_two_processes(tmp_path / "two"), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, samples_of_one), (two, samples_of_two) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for task, metric in TASKS.items():
        ours, theirs = (
            sorted(rows, key=lambda row: row["doc_id"]) for rows in (samples_of_one[task], samples_of_two[task])
        )
        assert [row["doc_id"] for row in ours] == [row["doc_id"] for row in theirs] == list(range(5))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["arguments"] == other["arguments"]  # prompts and records, streams among them
            assert mine["filtered_resps"] == other["filtered_resps"] or task == "vkv_passcode_scored"
            assert mine[metric] == other[metric]
            if task == "tiny_keyed_sum":
                assert mine["responses"] == other["responses"]
                assert len(mine["responses"]) == len(mine["filtered_resps"][0]) == 2
                streams = [record["stream"] for record in mine["arguments"]["gen_args_0"]["arg_1"]["vkvtrain"]]
                assert streams == [[mine["doc_id"], 0], [mine["doc_id"], 1]]
        for name, value in one["results"][task].items():
            if isinstance(value, float):
                assert two["results"][task][name] == pytest.approx(value)
    totals = [run["config"]["eviction"] for run in (one, two)]
    for name in ("generations", "scored", "evictions", "tokens", "longest", "by_kind"):
        assert totals[0][name] == totals[1][name]
    assert totals[0]["generations"] == 10
    assert totals[0]["scored"] == 20
    assert totals[0]["evictions"] > 20


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    """Not after lm-eval's 52 weeks: the launcher ends the other rank and says so."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(on_two_processes(tmp_path), cwd=ROOT, env=environment(), **pipes)
    try:
        ranks = ranks_of(running.pid)
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode not in (0, None)
    assert "exitcode" in output
    assert not list(tmp_path.rglob("results_*.json"))


def ranks_of(launcher, count=2):
    """Process ids of a launcher's ranks, once there are as many as there should be."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        children = [
            child for child in psutil.Process(launcher).children() if "vkvtrain.cli" in " ".join(child.cmdline())
        ]
        if len(children) == count:
            return [child.pid for child in children]
        time.sleep(0.2)
    raise AssertionError("the ranks did not start")
