"""Several processes: DDP, FSDP2 and DeepSpeed against one process, held-out rows, resuming, and launches gone wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import two_processes
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import reset_accelerator
from safetensors.torch import load_file
from short_runs import EVICTED, adapter_bytes, assert_same_adapter, column, metrics, short_recipe

from vkvtrain.training import loop
from vkvtrain.training.checkpoints import newest_checkpoint
from vkvtrain.training.launch import (
    asked_of_accelerate,
    asked_processes,
    check_engine,
    check_replicated,
    check_world_size,
)
from vkvtrain.training.loop import train

ROOT = Path(__file__).parents[1]


def recipe(source, output, eviction=None, **sections):
    """Sections add to the defaults."""
    training = {"steps": 3, "global_batch": 12, "batch_per_device": 4}
    defaults = {"data": {"source": str(source)}, "training": training}
    return short_recipe(output, defaults, sections, {"eviction": eviction})


def launch(script, *arguments, **environment):
    """Run a script in two processes that know of each other; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CPU_PROCESSES = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def one(noise, tmp_path_factory):
    """A run by one process, with a checkpoint after its second step."""
    settings = recipe(
        noise, tmp_path_factory.mktemp("one") / "run", EVICTED, data={"held_out": 7}, checkpoint={"every": 2},
        training={"objective": "distill", "ce_weight": 0.5, "dense_fraction": 0.34},
    )  # fmt: skip
    train(settings)
    return settings


def cut(one, output):
    """The run of one process as if it had been killed after its checkpoint; the path of a recipe that continues it."""
    shutil.copytree(one.output, output)
    (output / "adapter_model.safetensors").unlink()
    assert newest_checkpoint(output).name == "step-00000002"
    return output / "recipe.yaml"


def assert_same_run(ours, theirs, relative=1e-5):
    """Logs and adapters."""
    two, one = metrics(ours), metrics(theirs)
    for name in ("loss", "grad_norm"):
        assert column(two, name) == pytest.approx(column(one, name), rel=relative)
    assert column(two, "kind") == column(one, "kind") == ["evicted", "evicted", "dense"]
    for name in ("evictions", "live_fraction"):
        assert column(two[:2], name) == pytest.approx(column(one[:2], name), rel=1e-3)
    for name in ("held_out_loss_full", "held_out_loss_evicted_24", "held_out_gap_evicted_24"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-4)
    assert_same_adapter(ours, theirs, 2e-3)


@pytest.mark.slow
def test_two_processes_train_like_one_and_print_once(one, tmp_path):
    printed = launch(["recipes/finetune.py"], one.output / "recipe.yaml", "--output", tmp_path / "two", **CPU_PROCESSES)
    assert_same_run(tmp_path / "two", one.output)
    assert "2 (asked for 2)" in printed
    assert "4 a forward pass x 2 accumulated x 2 processes = 12 sequences" in printed
    assert printed.count("asked for") == printed.count("held_out_loss_full") == 1


@pytest.mark.slow
def test_two_processes_continue_what_one_began(one, tmp_path):
    path = cut(one, tmp_path / "two")
    printed = launch(["recipes/finetune.py"], path, "--output", tmp_path / "two", **CPU_PROCESSES)
    assert printed.count("continues after step 2, from") == 1
    assert_same_run(tmp_path / "two", one.output)


DEEPSPEED = ["tests/deepspeed_cpu.py", "recipes/finetune.py"]


def zero(stage):
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


@pytest.mark.slow
def test_zero_2_trains_like_one_process_which_continues_what_it_began(one, tmp_path):
    launch(DEEPSPEED, one.output / "recipe.yaml", "--output", tmp_path / "zero", **zero(2))
    assert_same_run(tmp_path / "zero", one.output)
    cut(one.model_copy(update={"output": tmp_path / "zero"}), tmp_path / "again")
    train(one.model_copy(update={"output": tmp_path / "again"}))
    assert_same_run(tmp_path / "again", one.output)


@pytest.mark.slow
def test_zero_3_continues_what_one_process_began(one, tmp_path):
    path = cut(one, tmp_path / "zero")
    launch(DEEPSPEED, path, "--output", tmp_path / "zero", **zero(3))
    assert_same_run(tmp_path / "zero", one.output)


@pytest.mark.slow
def test_gradients_of_ddp_and_fsdp2_are_those_of_one_process(noise, tmp_path):
    """In float64: the gradient, the updated adapter, the held-out losses; and which rank saw what."""
    settings = recipe(
        noise, tmp_path / "unused", EVICTED, data={"held_out": 5}, optim={"max_grad_norm": 1000.0},
        training={"global_batch": 6, "batch_per_device": 2},
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    launch(["tests/two_processes.py"], path, tmp_path / "two", **CPU_PROCESSES)
    two_processes.main(path, tmp_path / "one")  # in this one alone
    for ours, theirs in (("gradients", "gradients"), ("weights", "weights"), ("fsdp2", "gradients")):
        two, one = (
            load_file(tmp_path / place / f"{name}.safetensors") for place, name in (("two", ours), ("one", theirs))
        )
        assert two.keys() == one.keys()
        for name in one:
            assert one[name].dtype == torch.float64
            assert one[name].abs().max() > 0
            assert (two[name] - one[name]).abs().max() <= 1e-12 * one[name].abs().max(), (ours, name)
    first, second = (json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    alone = json.loads((tmp_path / "one" / "rank0.json").read_text())
    assert len(first["streams"]) == len(second["streams"]) == 3
    assert sorted(first["streams"] + second["streams"]) == sorted(alone["streams"])
    assert not {map(tuple, first["streams"])} & {map(tuple, second["streams"])}
    assert first["held_out"] == second["held_out"] == alone["held_out"]


def test_an_engine_that_accelerate_drops_silently_is_noticed(monkeypatch):
    accelerator = Accelerator(cpu=True)
    check_engine(accelerator)
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            with pytest.raises(ValueError, match=rf"asked for {name} but this run has NO .*multi_gpu.yaml"):
                check_engine(accelerator)


AMBIENT = {
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
}


@pytest.mark.parametrize("variable", AMBIENT)
def test_a_variable_that_would_change_what_is_trained_is_refused_by_name(noise, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, AMBIENT[variable])
    monkeypatch.setattr(loop, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"sets {variable}={AMBIENT[variable]}: .*supported"):
        train(recipe(noise, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_gradients_switched_off_and_another_default_dtype_are_refused(noise, tmp_path):
    settings = recipe(noise, tmp_path / "run")
    for switched_off in (torch.no_grad(), torch.inference_mode(), torch.set_grad_enabled(False)):
        with switched_off, pytest.raises(ValueError, match="gradients are switched off"):
            train(settings)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"torch's default dtype is torch.float64.*model.dtype"):
            train(settings)
    finally:
        torch.set_default_dtype(torch.float32)


HARMLESS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DEBUG_MODE": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "PYTHONHASHSEED": "7",
}


def test_other_variables_and_switches_change_nothing(noise, tmp_path, monkeypatch):
    sections = {"training": {"steps": 2, "batch_per_device": 4}, "seed": 3}
    train(recipe(noise, tmp_path / "plain", EVICTED, **sections))
    reset_accelerator()
    for variable, value in HARMLESS.items():
        monkeypatch.setenv(variable, value)
    torch.use_deterministic_algorithms(True)
    try:
        train(recipe(noise, tmp_path / "ambient", EVICTED, **sections))
    finally:
        torch.use_deterministic_algorithms(False)
    plain, ambient = metrics(tmp_path / "plain"), metrics(tmp_path / "ambient")
    assert column(ambient, "loss") == column(plain, "loss")
    assert column(ambient, "grad_norm") == column(plain, "grad_norm")
    assert adapter_bytes(tmp_path / "ambient") == adapter_bytes(tmp_path / "plain")


def test_evaluation_refuses_sharded_weights(monkeypatch):
    check_replicated()
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "True")
            with pytest.raises(ValueError, match=f"sets {variable}, by which weights are sharded"):
                check_replicated()


def test_precision_and_checkpointing_of_an_engine_s_own_configuration_are_refused():
    def accelerator(kind, **state):
        plugins = {"deepspeed_plugin": None, "fsdp_plugin": None} | state
        return SimpleNamespace(
            distributed_type=kind, mixed_precision="no", is_fsdp2=True, state=SimpleNamespace(**plugins)
        )

    halved = SimpleNamespace(deepspeed_config={"fp16": {"enabled": True}})
    with pytest.raises(ValueError, match="mixed_precision fp16 is not supported"):
        check_engine(accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=halved))
    check_engine(accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(deepspeed_config={})))
    for checkpointing in (True, False):
        given = accelerator(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(activation_checkpointing=checkpointing))
        expected = (
            pytest.raises(ValueError, match=r"set model.gradient_checkpointing") if checkpointing else nullcontext()
        )
        with expected:
            check_engine(given)


def launched(noise, tmp_path, launcher, *arguments, **environment):
    """The training command as `launcher` starts it with further arguments; the process that has ended."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(noise, tmp_path / "run").model_dump(mode="json")))
    return subprocess.run(
        [sys.executable, "-m", *launcher, "recipes/finetune.py", str(path), *arguments], cwd=ROOT, text=True,
        capture_output=True, timeout=300, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_fsdp_on_cpu_processes_is_refused_before_any_model(noise, tmp_path):
    """accelerate 1.15 gives DDP instead, without a word."""
    fsdp = {**CPU_PROCESSES, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = launched(noise, tmp_path, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], **fsdp)
    assert done.returncode != 0
    assert "the launcher was asked for FSDP but this run has MULTI_CPU" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_launch_is_checked(noise, tmp_path, monkeypatch):
    settings = recipe(noise, tmp_path, training={"global_batch": 16})

    def check(got, asked):
        if asked is None:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("WORLD_SIZE", asked)
        check_world_size(settings, got)

    for got, asked in ((1, None), (1, ""), (1, "1"), (2, "2"), (16, "16")):
        check(got, asked)
        assert asked_processes() == got
    for got, asked in ((1, "2"), (2, None), (2, "4")):
        with pytest.raises(ValueError, match=rf"asked for {asked or 1} processes but this run has {got}.*torchrun"):
            check(got, asked)
    with pytest.raises(ValueError, match=r"global_batch \(16\) must be a multiple of the 3 processes"):
        check(3, "3")


def test_a_launch_that_lost_its_processes_stops_before_any_model(noise, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(loop, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="asked for 2 processes but this run has 1"):
        train(recipe(noise, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_accelerate_was_asked_for(tmp_path):
    config = tmp_path / "launch.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\n")
    for command, asked in (
        (["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "train.py", "--num_processes", "9"], 2),
        (["python", "-m", "accelerate.commands.launch", "--num_processes=4", "train.py"], 4),
        (["accelerate", "launch", "--config_file", str(config), "train.py"], 3),
        (["accelerate", "launch", "--config_file", str(config), "--num_processes", "1", "train.py"], 1),
        (["accelerate", "launch", "train.py"], 1),
        (["/opt/env/bin/python", "/opt/env/bin/accelerate-launch", "--num_processes", "2", "train.py"], 2),
        (["bash", "-c", "cd accelerate_experiments && python train.py"], 1),
        (["python", "runs/accelerate/start.py", "--num_processes", "2"], 1),
        (["bash"], 1),
        ([], 1),
    ):
        assert asked_of_accelerate(command) == asked


@pytest.mark.slow
def test_two_cpu_processes_that_accelerate_drops_silently_are_noticed(noise, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process and sets no WORLD_SIZE (accelerate 1.15)."""
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = launched(noise, tmp_path, launcher, "--dry-run")
    assert done.returncode != 0
    assert "asked for" in done.stderr


LAUNCHERS = {
    "plain": ([], {}),
    "accelerate": (["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"], {}),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], CPU_PROCESSES),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seconds", "told", "signum", "status"),
    [
        ("plain", 3, "launcher", signal.SIGTERM, 143),
        ("plain", 100, "launcher", signal.SIGTERM, 143),
        ("plain", 3, "launcher", signal.SIGINT, 130),
        ("accelerate", 3, "launcher", signal.SIGTERM, -signal.SIGTERM),
        ("accelerate", 100, "all", signal.SIGTERM, -signal.SIGTERM),
        ("accelerate", 3, "trainer", signal.SIGTERM, 1),
        ("torchrun", 3, "launcher", signal.SIGTERM, 1),
        ("torchrun", 100, "launcher", signal.SIGTERM, 1),
        ("torchrun", 3, "all", signal.SIGINT, 1),
        ("torchrun", 3, "launcher", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_slow_run_ends_in_time_with_its_last_finished_step(tmp_path, launcher, seconds, told, signum, status):
    """Torch elastic kills its processes 30 s after a signal; `accelerate launch` of one process leaves it behind."""
    given, environment = LAUNCHERS[launcher]
    settings = short_recipe(
        tmp_path / "run",
        {"data": {"source": "tiny:keyed_sum", "rows": 8}, "training": {"steps": 4, "global_batch": 8}},
        {"training": {"batch_per_device": 2}, "eviction": {"policy": "vase_attnv", "budget": 64, "window": 16}},
    )
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    own = {**os.environ, **environment, "SECONDS_A_PASS": str(seconds), "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *given, "tests/slow_steps.py", str(path)], cwd=ROOT, env=own, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    trainers = []
    try:
        wait_until(lambda: "SLOW PASS" in log.read_text() or process.poll() is not None, 200)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        trainers = [one for one in family if "tests/slow_steps.py" in one.cmdline()[1:3]]
        began = time.time()
        if told == "all":
            os.killpg(process.pid, signum)
        else:
            os.kill(trainers[0].pid if told == "trainer" else process.pid, signum)
        assert process.wait(timeout=60) == status, log.read_text()[-3000:]
        _, alive = psutil.wait_procs(trainers, timeout=60)
        assert not alive
    finally:
        for one in trainers:
            if one.is_running():
                one.kill()
    stopped = "stopped by SIGINT" if signum == signal.SIGINT else "stopped by SIGTERM"
    assert f"{stopped} after step 1; checkpoint checkpoints/step-00000001 is written" in log.read_text()
    kept = newest_checkpoint(tmp_path / "run")
    assert kept.name == "step-00000001"
    assert (kept / "manifest.json").stat().st_mtime - began < 27  # 20, and what a loaded machine adds
    assert len(metrics(tmp_path / "run")) == 1


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
