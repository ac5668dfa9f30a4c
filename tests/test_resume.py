"""Runs that are killed, told to stop, or run out of disk, and go on: the same adapter as without."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import reset_accelerator
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from short_runs import adapter_bytes, metrics, short_recipe
from transformers import AutoModelForCausalLM

from vkvtrain import locking
from vkvtrain.identity import model_identity
from vkvtrain.locking import locked
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import checkpoints, interrupts, loop, resume
from vkvtrain.training.checkpoints import CHECKPOINTS, MANIFEST, newest_checkpoint, what_is_wrong, write_checkpoint
from vkvtrain.training.fit import fitting_data
from vkvtrain.training.interrupts import Interrupted, interruptible
from vkvtrain.training.logs import MetricsFile, read_metrics
from vkvtrain.training.loop import train
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.run_directory import FINISHED, Incomplete
from vkvtrain.training.settings import Recipe
from vkvtrain.training.watch import PATIENCE, Failed, Watch

ROOT = Path(__file__).parents[1]
STEPS = 6


def recipe(output, **sections):
    """Dropout, two budgets, a dense step, accumulation, a second epoch: all that depends on the step."""
    defaults = {
        "data": {"source": "tiny:keyed_sum", "rows": 10},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "eviction": {"policy": "vase_attnv", "budget": [48, 64], "window": 16},
        "training": {"steps": STEPS, "global_batch": 3, "batch_per_device": 2, "dense_fraction": 0.2},
        "optim": {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
        "checkpoint": {"every": 1},
    }
    return short_recipe(output, defaults, sections)


def logged(output):
    """Rows of the log without what the clock and the machine say."""
    timed = ("tokens_per_second", "peak_memory_gib")
    return [{name: row[name] for name in row if name not in timed} for row in metrics(output)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(output))
    return output


def in_another_process(settings, before):
    """Train in a fork after `before()`; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            before()
            train(settings)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(module, name, count):
    """SIGKILL in the middle of the run, at call `count` of a function."""

    def patch():
        inner, calls = getattr(module, name), iter(range(1, 10**6))

        def counted(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        setattr(module, name, counted)

    return patch


def test_a_run_that_is_killed_again_and_again_gives_the_same_adapter(whole, tmp_path):
    """At random places in steps, in files of a checkpoint, before and after it is renamed."""
    settings, rng, killed = recipe(tmp_path / "run"), random.Random(0), []
    for module, name, calls in (
        (loop, "over_processes", 5),
        (checkpoints, "write_file", 9),
        (checkpoints, "sync", 3),
        (checkpoints.shutil, "rmtree", 4),
        (loop, "save_run", 2),
        (checkpoints, "write_file", 4),
    ):
        count = rng.randint(1, calls)
        status = in_another_process(settings, kill_at(module, name, count))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed.append((name, count, newest_checkpoint(settings.output)))
    assert len(killed) >= 4
    if not (settings.output / "adapter_model.safetensors").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was being written when it was killed
            train(settings)
    assert adapter_bytes(settings.output) == adapter_bytes(whole)
    assert logged(settings.output) == logged(whole)


def test_a_run_without_checkpoints_in_between_gives_the_same_adapter(whole, tmp_path):
    settings = recipe(tmp_path / "run", checkpoint={"every": 100})
    train(settings)
    assert not (settings.output / CHECKPOINTS).exists()
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """The settings of a run that SIGTERM stopped after step 3; the adapter of an earlier attempt is not there."""
    return stop_after(recipe(tmp_path_factory.mktemp("stopped") / "run"), 3)


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The settings of a copy of it."""
    shutil.copytree(stopped_once.output, tmp_path / "run")
    return stopped_once.model_copy(update={"output": tmp_path / "run"})


def stop_after(settings, step, signum=signal.SIGTERM):
    inner = loop.next_step

    def signalled(run):
        row = inner(run)
        if run.step == step:
            os.kill(os.getpid(), signum)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "next_step", signalled)
        with pytest.raises(Interrupted, match=rf"after step {step}; checkpoint checkpoints/step-0+{step} is written"):
            train(settings)
    return settings


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on(whole, tmp_path, capsys, signum):
    settings = stop_after(recipe(tmp_path / "run", checkpoint={"every": 4}), 3, signum)
    assert newest_checkpoint(settings.output).name == "step-00000003"
    assert len(logged(settings.output)) == 3
    assert not (settings.output / "adapter_model.safetensors").exists()
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
    train(settings)
    assert "continues after step 3, from" in capsys.readouterr().out
    assert adapter_bytes(settings.output) == adapter_bytes(whole)
    assert logged(settings.output) == logged(whole)


def test_the_statuses_of_signals():
    for signum, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert Interrupted(signum, 3, "checkpoints/x").status == status
    assert "NO checkpoint could be written" in str(Interrupted(signal.SIGTERM, 3, None))


def test_a_second_ctrl_c_does_not_wait():
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_the_command_is_stopped_by_sigterm_and_continues(whole, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(tmp_path / "run").model_dump(mode="json")))
    command = [sys.executable, "recipes/finetune.py", str(path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (tmp_path / "run" / CHECKPOINTS / "step-00000001").exists():
            time.sleep(0.05)
        process.terminate()
        _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "finetune: stopped by SIGTERM after step" in error
    assert "the same command continues" in error
    again = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "continues after step" in again.stdout
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)


def damage(path, how):
    """A checkpoint that is not whole."""
    state = path / "training_state.safetensors"
    if how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "manifest cut":
        (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:40])
    elif how == "file missing":
        state.unlink()
    elif how == "file cut":
        state.write_bytes(state.read_bytes()[:-100])
    else:
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)


DAMAGE = {
    "no manifest": "it has no manifest.json",
    "manifest cut": "its manifest.json cannot be read",
    "file missing": "training_state.safetensors is missing",
    "file cut": r"training_state.safetensors has \d+ bytes instead of \d+",
    "one bit": "training_state.safetensors is damaged",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_skipped_with_the_reason(tmp_path, how):
    files = {"training_state.safetensors": bytes(1000), "training_state.json": b"{}"}
    older, newer = (write_checkpoint(tmp_path, step, files, keep=3) for step in (10, 20))
    assert newest_checkpoint(tmp_path) == newer
    damage(newer, how)
    with pytest.warns(UserWarning, match=rf"checkpoint .*step-00000020 is skipped: {DAMAGE[how]}"):
        assert newest_checkpoint(tmp_path) == older
    write_checkpoint(tmp_path, 15, files, keep=1)  # the damaged one does not count as one that is kept
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000015"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, stopped):
    damage(stopped.output / CHECKPOINTS / "step-00000003", "one bit")
    with pytest.warns(UserWarning, match="step-00000003 is skipped: .* is damaged"):
        train(stopped)
    assert adapter_bytes(stopped.output) == adapter_bytes(whole)
    assert logged(stopped.output) == logged(whole)


def test_the_newest_are_kept_and_none_when_all_are_damaged(tmp_path):
    for step in range(1, 6):
        write_checkpoint(tmp_path, step, {"training_state.json": b"{}"}, keep=2)
    kept = sorted((tmp_path / CHECKPOINTS).iterdir())
    assert [path.name for path in kept] == ["step-00000004", "step-00000005"]
    assert [what_is_wrong(path) for path in kept] == [None, None]
    for path in kept:
        damage(path, "no manifest")
    with pytest.warns(UserWarning, match="skipped"):
        assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(whole, tmp_path, monkeypatch):
    """A limit on the size of files fails writes as a full disk does, at any byte; from step 3 to step 5."""
    settings, inner, seen = recipe(tmp_path / "run"), loop.save_run, {}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limited(run, log):
        if run.step in (3, 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            saved = inner(run, log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        seen[run.step] = (saved, newest_checkpoint(run.recipe.output).name)
        return saved

    monkeypatch.setattr(loop, "save_run", limited)
    with pytest.warns(UserWarning, match=r"checkpoint of step [34] could not be written \(File too large\).*goes on"):
        train(settings)
    assert [seen[step][0] for step in (3, 4)] == [None, None]
    assert [seen[step][1] for step in range(1, 6)] == [f"step-{step:08d}" for step in (1, 2, 2, 2, 5)]
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


def test_rows_of_the_log_wait_while_the_disk_is_full(tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    log = MetricsFile(tmp_path / "metrics.jsonl", 0)
    log.append({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # a row and a half
    try:
        for step in (2, 3):
            with pytest.warns(UserWarning, match=r"metrics.jsonl could not be written \(File too large\)"):
                log.append({"step": step})
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.append({"step": 4})
    assert read_metrics(log.path) == [{"step": step} for step in (1, 2, 3, 4)]


def test_a_log_goes_on_without_missing_or_repeated_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path, 2).append({"step": 3, "new": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]
    MetricsFile(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("optim", {"learning_rate": 1e-2}, "optim.learning_rate"),
        ("eviction", {"budget": [48, 80]}, "eviction.budget"),
        ("training", {"steps": 9}, "training.steps"),
    ],
)
def test_another_recipe_does_not_continue_a_run(stopped, section, changes, says):
    other = stopped.model_dump()
    other[section] |= changes
    with pytest.raises(ValueError, match=rf"holds checkpoints of another recipe \(different: {says}\).*--overwrite"):
        train(Recipe(**other))
    assert newest_checkpoint(stopped.output).name == "step-00000003"


def test_other_data_do_not_continue_a_run(stopped, monkeypatch):
    monkeypatch.setattr(resume, "fingerprint", lambda data: "another")
    with pytest.raises(ValueError, match=r"holds checkpoints of a run on other data \(data.source has changed\)"):
        train(stopped)


def edited(part, change):
    """`fitting_data` with a change to the rows of one part, as if their file had been edited."""

    def load(*args, **kwargs):
        data = fitting_data(*args, **kwargs)
        rows = getattr(data, part)
        change(rows)
        return data

    return load


def other_label(rows):
    rows[1].input_ids[-2] ^= 1


def other_loss_mask(rows):
    rows[1].prompt_length += 1


def exchanged(rows):
    rows[0].input_ids, rows[1].input_ids = rows[1].input_ids, rows[0].input_ids


@pytest.mark.parametrize("change", [other_label, other_loss_mask, exchanged, list.pop])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_edited_rows_do_not_continue_a_run(tmp_path, monkeypatch, part, change):
    """Labels under the same lengths, where the loss begins, held-out rows."""
    settings = stop_after(recipe(tmp_path / "run", data={"held_out": 2}), 1)
    monkeypatch.setattr(loop, "fitting_data", edited(part, change))
    with pytest.raises(ValueError, match=r"on other data \(data.source has changed\)"):
        train(settings)
    monkeypatch.setattr(loop, "fitting_data", fitting_data)
    train(settings)


def test_a_base_model_that_was_overwritten_does_not_continue_a_run(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(MODEL_PATH, base)
    settings = stop_after(recipe(tmp_path / "run", model={"name": str(base)}), 1)
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).view(-1)[5] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"on another base model \(what '.*base' names has changed\).*--overwrite"):
        train(settings)


def test_a_checkpoint_says_which_commit_of_the_hub_it_was_trained_on():
    config = SimpleNamespace(_commit_hash="abc")
    assert model_identity("org/name", config, None) == "org/name@abc"
    assert model_identity("org/name", SimpleNamespace(), "main") == "org/name@main"


def test_two_runs_in_one_output_at_once_are_refused(stopped):
    """A run in another process holds the output as long as it lives, also one that was killed."""
    with locked(stopped.output, "somebody"), pytest.raises(ValueError, match=r"output .* is in use by another run"):
        train(stopped)
    seen = []

    def second(run):
        reset_accelerator()
        with pytest.raises(ValueError, match="in use by another run"):
            train(stopped)
        seen.append(run.step)
        raise Failed("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "next_step", second)
        with pytest.raises(Failed, match="seen"):
            train(stopped)
    assert seen == [3]
    assert len(logged(stopped.output)) == 3
    train(stopped)


def test_a_directory_that_was_made_for_its_lock_alone_goes_with_it(tmp_path):
    with pytest.raises(ValueError, match="refused"), locked(tmp_path / "new", "x"):
        raise ValueError("refused")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty", "x"):
        pass
    assert (tmp_path / "empty").is_dir()
    with locked(tmp_path / "used", "x"):
        (tmp_path / "used" / "file").touch()
    assert (tmp_path / "used" / "file").exists()


def test_a_lock_whose_file_was_removed_by_its_last_holder_is_taken_again(tmp_path, monkeypatch):
    """Removed between opening and locking: a lock on what has no name would keep nobody out."""
    inner, calls = locking.fcntl.flock, []

    def late(file, operation):
        calls.append(None)
        if len(calls) == 1:
            (tmp_path / "run" / "lock").unlink()
        inner(file, operation)

    monkeypatch.setattr(locking.fcntl, "flock", late)
    with locked(tmp_path / "run", "x"):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use by y"), locked(tmp_path / "run", "y"):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("vkvtrain.locking.fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), locked(tmp_path, "x"):
        pass


def test_other_versions_are_said_where_a_run_continues(stopped, capsys):
    path = stopped.output / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    train(stopped)
    assert f"(torch {version('torch')} instead of 1.0)" in capsys.readouterr().out


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unwritable(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def broken(*_, **__):
    raise TypeError("a tokenizer that cannot be saved")


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        ("vkvtrain.config.EvictionConfig.save_pretrained", full),
        ("peft.PeftModel.save_pretrained", full),
        ("peft.PeftModel.save_pretrained", unwritable),
        ("vkvtrain.training.run_directory.sync", full),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", broken),
    ],
)
def test_what_fails_at_the_final_save_does_not_lose_the_last_step(whole, tmp_path, monkeypatch, capsys, place, failure):
    settings = recipe(tmp_path / "run", checkpoint={"every": 4})
    with monkeypatch.context() as patch:
        patch.setattr(place, failure)
        says = "cannot be saved" if failure is broken else r"could not be written.*No space left.*finishes the run"
        with pytest.raises(TypeError if failure is broken else Incomplete, match=says):
            train(settings)
    assert f"the last step is kept: checkpoints/step-0000000{STEPS}" in capsys.readouterr().out
    assert not (settings.output / FINISHED).exists()
    assert not (settings.output / ".unfinished").exists()
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was taken"))
    train(settings)
    assert adapter_bytes(settings.output) == adapter_bytes(whole)
    assert logged(settings.output) == logged(whole)


def test_a_full_disk_at_the_end_gives_up_older_checkpoints_before_the_last_step(whole, tmp_path, monkeypatch, capsys):
    """No room for another checkpoint beside the two that are there, until one of them is removed."""
    settings, inner = recipe(tmp_path / "run", checkpoint={"every": 2}), checkpoints.write_file

    def limited(path, content):
        if len(list(path.parents[1].glob("step-*[0-9]"))) > 1 and path.parent.name.startswith("step-00000006"):
            full()
        inner(path, content)

    monkeypatch.setattr(checkpoints, "write_file", limited)
    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", full)
        with pytest.warns(UserWarning, match="step 6 could not be written"), pytest.raises(Incomplete):
            train(settings)
    assert "the last step is kept: checkpoints/step-00000006" in capsys.readouterr().out
    train(settings)
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


@pytest.mark.parametrize("place", ["vkvtrain.training.ending.write_report", "matplotlib.figure.Figure.savefig"])
def test_a_report_that_fails_leaves_a_finished_run(whole, tmp_path, monkeypatch, finetune, capsys, place):
    settings = recipe(tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    monkeypatch.setattr(place, broken)
    assert finetune([str(path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("finetune: the run is finished and its adapter is in ")
    assert "report.md could not be written (a tokenizer that cannot be saved)" in said
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


def test_a_tracker_that_fails_takes_nothing_along(whole, tmp_path, monkeypatch):
    settings = recipe(tmp_path / "run", log={"tracker": "tensorboard"})
    monkeypatch.setattr("accelerate.Accelerator.log", full)
    monkeypatch.setattr("accelerate.Accelerator.end_training", broken)
    with pytest.warns(UserWarning, match=r"the tracker failed \(.*No space left.*metrics.jsonl goes on"):
        train(settings)
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


def test_a_step_is_given_up_between_two_forward_passes(whole, tmp_path):
    """At the signal weights are those of the last finished step, and nothing of the abandoned one is left."""
    settings, inner = recipe(tmp_path / "run"), ModelWithLoss.forward
    passes = []

    def signalled(self, *args, **kwargs):
        passes.append(None)
        if len(passes) == 7:  # the first of two passes of step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelWithLoss, "forward", signalled)
        with pytest.raises(Interrupted, match="after step 3; checkpoint checkpoints/step-00000003 is written"):
            train(settings)
    assert len(passes) == 7
    train(settings)
    assert adapter_bytes(settings.output) == adapter_bytes(whole)


def test_before_its_first_step_is_finished_nothing_is_kept(tmp_path):
    settings, inner = recipe(tmp_path / "run"), ModelWithLoss.forward

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelWithLoss, "forward", signalled)
        with pytest.raises(Interrupted, match="before its first step was finished; the same command begins again"):
            train(settings)
    assert newest_checkpoint(settings.output) is None


@pytest.mark.parametrize("where", ["evaluation", "step"])
def test_a_run_that_does_not_get_on_is_ended_from_outside(whole, tmp_path, where):
    """In a step, or in the evaluation after it, whose step is finished: its row is logged, and it is kept."""
    settings = recipe(tmp_path / "run", checkpoint={"every": 100}, data={"held_out": 2})

    def stuck(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)

    def before():
        interrupts.PATIENCE = 1.0
        if where == "evaluation":
            loop.held_out_losses = stuck
        else:
            inner = loop.train_step
            loop.train_step = lambda run: stuck() if run.step == 2 else inner(run)

    settings = settings.model_copy(update={"log": settings.log.model_copy(update={"evaluate_every": 2})})
    if where == "step":
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"held_out": 0})})
    assert in_another_process(settings, before) == 143
    assert newest_checkpoint(settings.output).name == "step-00000002"
    assert [row["step"] for row in logged(settings.output)] == [1, 2]
    train(settings)
    assert [row["step"] for row in logged(settings.output)] == list(range(1, STEPS + 1))
    if where == "step":
        assert adapter_bytes(settings.output) == adapter_bytes(whole)


def test_a_launcher_that_is_gone_counts_as_sigterm():
    with interruptible(lambda: 1, launcher=os.getppid() + 1) as interrupt:
        deadline = time.monotonic() + 20
        while not interrupt.signum and time.monotonic() < deadline:
            time.sleep(0.05)
        assert interrupt.signum == signal.SIGTERM


def test_one_ctrl_c_that_a_launcher_passes_on_is_not_two(monkeypatch):
    with interruptible(launcher=os.getppid()) as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signum == signal.SIGINT
        monkeypatch.setattr(interrupts, "ONE_PRESS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_where_it_goes_and_what_is_logged_may_change(whole, stopped, tmp_path):
    stopped.output.rename(tmp_path / "moved")
    changed = {"output": tmp_path / "moved", "checkpoint": {"every": 5, "keep": 1}, "log": {"tracker": "none"}}
    train(Recipe(**{**stopped.model_dump(), **changed}))
    assert adapter_bytes(tmp_path / "moved") == adapter_bytes(whole)
    assert [path.name for path in (tmp_path / "moved" / CHECKPOINTS).iterdir()] == ["step-00000005"]


def test_overwriting_starts_afresh(stopped):
    other = stopped.model_copy(update={"seed": 1})
    train(other, overwrite=True)
    assert len(logged(other.output)) == STEPS
    assert newest_checkpoint(other.output).name == "step-00000005"


def test_a_checkpoint_is_an_adapter_that_peft_loads(stopped):
    path = newest_checkpoint(stopped.output)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(MODEL_PATH)), path)
    state = load_file(path / "training_state.safetensors")
    loaded = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * 28
    for name, weight in loaded.items():
        assert torch.equal(weight, state[f"weight/{name}"])


def test_a_failed_run_names_its_samples_and_saves_the_state_before(tmp_path, monkeypatch):
    settings = recipe(tmp_path / "run", checkpoint={"every": 100})
    inner, eviction, steps = ModelWithLoss.forward, loop.step_eviction, []

    def broken(self, batch, trace=None, cross_entropy_only=False):
        losses = inner(self, batch, trace, cross_entropy_only)
        return losses | {"loss": losses["loss"] * (float("nan") if steps[-1] == 3 else 1)}

    def noted(chosen, step):
        steps.append(step)
        return eviction(chosen, step)

    monkeypatch.setattr(ModelWithLoss, "forward", broken)
    monkeypatch.setattr(loop, "step_eviction", noted)
    with pytest.raises(
        Failed, match=r"step 4: the loss is nan; samples \[\d+, \d+, \d+\].*state before it: checkpoints/step-0+3$"
    ):
        train(settings)
    assert newest_checkpoint(settings.output).name == "step-00000003"
    assert len(logged(settings.output)) == 3


def test_what_divergence_is():
    watch = Watch(vocabulary=100)
    assert [watch.problem(loss, 1.0) for loss in [1.0, 20.0] + [9.0] * 50] == [None] * 52  # twice guessing is 9.21
    assert [watch.problem(9.3, 1.0) for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    again = Watch(vocabulary=100)
    again.load(watch.state())
    for one in (watch, again):
        assert f"above 9.21 for {PATIENCE} steps" in one.problem(9.3, 1.0)
    assert Watch(100).problem(float("inf"), 1.0) == "the loss is inf"
    assert Watch(100).problem(1.0, float("nan")) == "the gradient norm is nan"
    high = Watch(100)
    assert all(high.problem(20.0, 1.0) is None for _ in range(50))  # it began there
