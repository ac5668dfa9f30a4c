"""What the speed benchmarks share: sides timed in turn, peak memory, kernels, and the machine that it was."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median seconds of each side: one run to warm up, then all sides one after another, `rounds` times.

    Returns:
        For each side `seconds` (wall clock) and `cpu_seconds` (of this process: on a machine that others load, the
        number to trust, with one thread).
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            wait()
            started, used = time.perf_counter(), time.process_time()
            side()
            wait()
            if number:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return {
        name: {"seconds": statistics.median(wall[name]), "cpu_seconds": statistics.median(cpu[name])} for name in sides
    }


def peak_bytes(side: Callable[..., Any], *arguments: Any, device: torch.device) -> int:
    """Most memory that `side(*arguments)` held at once beyond what there was before.

    On CUDA what the allocator gave out; on a CPU the resident memory of a fresh process (Linux), in which `side` must
    be importable. Its small first run is not counted: `side` is called with `warm_up=True` first.
    """
    if device.type == "cuda":
        side(*arguments, warm_up=True)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_resident, (side, torch.get_num_threads(), *arguments))


def _peak_resident(side: Callable[..., Any], threads: int, *arguments: Any) -> int:
    torch.set_num_threads(threads)
    side(*arguments, warm_up=True)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    side(*arguments)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


class Kernels(TorchDispatchMode):
    """Counts operator calls that are no views: on a GPU each is a kernel at least, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, date and commit of a measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": name, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": date.today().isoformat(), "commit": commit or "unknown",
    }  # fmt: skip


def write(results: dict[str, Any], path: Path) -> None:
    """Results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {path}")
