"""Decoding under SnapKV eviction: vkvtrain against kvpress's `DecodingPress(SnapKVPress)`.

    python benchmarks/against_kvpress.py

SmolLM2-135M-Instruct (downloaded and converted into runs/smollm2), one row, equal budget and interval. kvpress 0.5.5
needs transformers below 5.3, so it gets a virtual environment of its own, runs/kvpress, which takes torch from this
one. The sides, ours step by step and compiled, run in processes of their own, in turn; decoding is timed, loading,
prefill and compiling are not. Prints medians of tokens/s and the ratios, writes JSON.
"""

import json
import statistics
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measure import ROOT, machine, write

ENVIRONMENT = ROOT / "runs/kvpress"
PACKAGES = ("kvpress==0.5.5", "transformers<5.3")


@dataclass
class Settings:
    model: str | None = None
    """Directory or Hub name; by default SmolLM2-135M-Instruct."""
    prompt: int = 64
    """Tokens of the prompt, a multiple of the window, so that both sides evict at the same tokens."""
    tokens: int = 512
    """Tokens decoded."""
    budget: int = 256
    """Entries kept."""
    window: int = 64
    """Tokens between evictions; ours keeps as many newest entries."""
    rounds: int = 3
    """Rounds of which the median is taken."""
    threads: int = 1
    """Threads of each side."""
    output: Path = ROOT / "runs/benchmarks/against_kvpress.json"
    """Where the results go."""


def environment() -> Path:
    """The Python of kvpress's environment, made unless it is there."""
    python = ENVIRONMENT / "bin/python"
    marker = ENVIRONMENT / "installed"
    if not marker.exists():
        print(f"making {ENVIRONMENT} for {' and '.join(PACKAGES)}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        (packages,) = (ENVIRONMENT / "lib").glob("python3*/site-packages")
        # its own packages come first; what it lacks, torch above all, is this environment's
        (packages / "caller.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES, f"torch=={torch.__version__}"]
        if subprocess.run(install, check=False).returncode:
            raise ValueError(f"{' '.join(PACKAGES)} could not be installed: is a package index within reach?")
        marker.touch()
    return python


def measure(python: str, side: str, settings: Settings, model: str) -> dict[str, Any]:
    """What a side's process measured."""
    sizes = (settings.prompt, settings.tokens, settings.budget, settings.window, settings.threads)
    command = [python, str(ROOT / "benchmarks/kvpress_worker.py"), side, model, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the {side} side failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(settings: Settings) -> None:
    if settings.prompt % settings.window or settings.budget % settings.window:
        raise ValueError(f"prompt and budget must be multiples of window ({settings.window})")
    model = settings.model
    if model is None:
        convert = [sys.executable, str(ROOT / "recipes/smollm2/convert.py"), str(ROOT / "runs/smollm2")]
        subprocess.run(convert, check=True)
        model = str(ROOT / "runs/smollm2/model")
    pythons = {"vkvtrain": sys.executable, "compiled": sys.executable, "kvpress": str(environment())}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for number in range(settings.rounds):
        for side, python in pythons.items():
            found[side].append(measure(python, side, settings, model))
            rate = settings.tokens / found[side][-1]["seconds"]
            print(f"round {number + 1}: {side:10s}{rate:8.1f} tokens/s", flush=True)
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds")}
        for side, runs in found.items()
    }
    theirs = medians["kvpress"]
    results = {
        "settings": asdict(settings) | {"output": str(settings.output), "model": Path(model).name},
        "medians": medians,
        "ratios": {side: {name: theirs[name] / its[name] for name in its} for side, its in medians.items()},
        "runs": found,
        "machine": machine(torch.device("cpu")) | {"threads": settings.threads},
    }
    for side, runs in found.items():
        seconds, cpu = medians[side]["seconds"], medians[side]["cpu_seconds"]
        print(
            f"{side:10s}{settings.tokens / seconds:8.1f} tokens/s {cpu:8.1f} CPU seconds {runs[0]['held']:6d} entries "
            f"held; kvpress, times: {theirs['seconds'] / seconds:.2f} (CPU seconds {theirs['cpu_seconds'] / cpu:.2f})"
        )
    write(results, settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
