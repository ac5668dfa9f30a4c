"""What `pip install` brings: a wheel, installed outside of the repository, does all that a checkout does."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "2", "--rows", "8", "--held_out", "2", "--global_batch", "2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the wheel is built by hatchling, of the extra `dev`")
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    done = subprocess.run([*command, str(directory), str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = directory.glob("vkvtrain-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of an environment that has the wheel, and this one's other packages, in a directory of its own."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory / "env", with_pip=True)
    python = directory / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (directory / "env/lib").glob("python*/site-packages")
    # a path file in a path file is not read: what is installed editable here stays out
    (site / "of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (directory / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*command):
        program = directory / "env/bin" / command[0]
        done = subprocess.run(
            [program, *command[1:]],
            cwd=directory / "work",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run.directory = directory / "work"
    return run


@pytest.mark.slow
def test_the_wheel_holds_what_is_shipped(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "eval", "accelerate_configs"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {f"vkvtrain/shipped/{name}" for name in tracked.stdout.split()} <= names
    assert {"vkvtrain_cli.py", "vkvtrain/tiny/model/model.safetensors"} <= names
    assert not any(name.startswith(("tests/", "runs/")) or "__pycache__" in name for name in names)


@pytest.mark.slow
def test_an_installed_wheel_trains_evaluates_and_shows(installed):
    assert (
        installed.directory.parent
        in Path(installed("python", "-c", "import vkvtrain; print(vkvtrain.__file__)")).parents
    )
    assert "quickstart" in installed("vkvtrain", "--help")
    for recipe, name in (("tiny", "eviction_lora"), ("tiny/dense", "dense_lora")):
        out = installed("vkvtrain", "train", recipe, *SHORT, "--output", f"runs/{name}")
        assert "instead of 20" in out
    out = installed("vkvtrain", "train", "tiny", *SHORT, "--config_file", "cpu", "--output", "runs/launched")
    assert "accelerate.commands.launch" in out
    assert (installed.directory / "runs/launched/adapter_model.safetensors").exists()
    arguments = "pretrained=tiny,peft=runs/eviction_lora,policy=vase_attnv,budget=64,window=16"
    evaluate = ["--tasks", "tiny_keyed_sum", "--limit", "2", "--batch_size", "2", "--device", "cpu"]
    out = installed("vkvtrain", "lm-eval", "run", "--model", "vkv", "--model_args", arguments, *evaluate)
    assert "tiny_keyed_sum" in out
    out = installed("vkvtrain", "ablate", "quickstart", "--dry-run", "--adapters", "{dense: runs/dense_lora}")
    assert "to run" in out
    installed("vkvtrain", "recipes", "copy", "qwen3-0.6b")
    assert "16,384 tokens" in installed("vkvtrain", "plan", "qwen3-0.6b.yaml")
    out = installed("vkvtrain", "quickstart", "--problems", "2", "--shown", "1", "--adapters", "runs")
    assert "one time in ten by chance" in out
