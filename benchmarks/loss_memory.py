"""Memory of the loss: the head in chunks against logits of all positions, at the vocabulary of Qwen3 and 16k positions.

    python benchmarks/loss_memory.py                                  # about ten minutes on one core
    python benchmarks/loss_memory.py --positions 512 --plain 256 512  # seconds

Each side computes loss and gradient of random hidden states in a process of its own, which reports by how much its peak
resident memory exceeds what it held before. The full logits of 16k positions fit few machines, so the plain side is
measured where it fits (`--plain`) and its line through these points is read at `--positions`.
"""

import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro
from torch import Tensor, nn

from vkvtrain.training.divergences import token_losses
from vkvtrain.training.head import chunked_loss
from vkvtrain.training.settings import TrainingSettings

OBJECTIVES = {
    "sft": TrainingSettings(steps=1),
    "distill": TrainingSettings(steps=1, objective="distill"),
}
GIB = 2**30


@dataclass
class Settings:
    positions: int = 16384
    """Response positions, S."""
    vocabulary: int = 151936
    """Outcomes, V."""
    hidden: int = 64
    """Size of the hidden states. What the logits take does not depend on it; what the products cost does."""
    plain: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    """Positions at which the plain side is measured."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of hidden states and head; losses are float32."""
    output: Path = Path("runs/loss_memory.json")
    """Where the numbers go."""
    one: tuple[str, str, int] | None = None
    """Measure one case in this process: (chunked or plain, objective, positions)."""


def plain_loss(hidden: Tensor, teacher: Tensor | None, head: nn.Module, targets: Tensor, objective: str) -> Tensor:
    """All logits at once."""
    theirs = None
    if teacher is not None:
        with torch.no_grad():
            theirs = head(teacher)
    return token_losses(head(hidden), theirs, targets, OBJECTIVES[objective])[:, 0].sum()


def loss_in_chunks(hidden: Tensor, teacher: Tensor | None, head: nn.Module, targets: Tensor, objective: str) -> Tensor:
    """As training computes it."""

    def losses(part: Tensor, where: slice) -> Tensor:
        theirs = None
        if teacher is not None:
            with torch.no_grad():
                theirs = head(teacher[where])
        return token_losses(head(part), theirs, targets[where], OBJECTIVES[objective])

    weight: Any = head.weight
    return chunked_loss(losses, hidden, head, weight.shape[0])[0]


SIDES = {"plain": plain_loss, "chunked": loss_in_chunks}


def measure_one(settings: Settings, side: str, objective: str, positions: int) -> dict[str, Any]:
    """Bytes above what was held before, and seconds, of one loss with its gradient."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    head = nn.Linear(settings.hidden, settings.vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(positions, settings.hidden, dtype=dtype, requires_grad=True)
    teacher = torch.randn(positions, settings.hidden, dtype=dtype) if objective == "distill" else None
    targets = torch.randint(settings.vocabulary, (positions,))
    few = None if teacher is None else teacher[:1]
    SIDES["chunked"](hidden[:1], few, head, targets[:1], objective)  # what a first call loads is not the loss's
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    loss = SIDES[side](hidden, teacher, head, targets, objective)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    grad = hidden.grad
    assert grad is not None
    return {
        "side": side, "objective": objective, "positions": positions, "bytes": peak - before,
        "seconds": round(time.monotonic() - began, 2), "loss": loss.item(), "gradient_norm": grad.norm().item(),
    }  # fmt: skip


def in_a_process(settings: Settings, side: str, objective: str, positions: int) -> dict[str, Any]:
    """`measure_one` in a process of its own, because a peak is never taken back."""
    command = [sys.executable, __file__, "--one", side, objective, str(positions)]
    for name in ("vocabulary", "hidden", "dtype"):
        command += [f"--{name}", str(getattr(settings, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"loss_memory: {side} {objective} at {positions} positions failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def line_through(points: list[tuple[int, int]], at: int) -> float:
    """The least-squares line through (positions, bytes), read at `at`."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(y.mean() + slope * (at - x.mean()))


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    if settings.one is not None:
        print(json.dumps(measure_one(settings, *settings.one)))
        return
    if len(set(settings.plain)) < 2:
        sys.exit(f"--plain {settings.plain}: give at least two different numbers of positions, for a line through them")
    logits = settings.positions * settings.vocabulary * 4
    print(f"{platform.machine()}, torch {torch.__version__}; one float32 [S, V] is {logits / GIB:.2f} GiB\n")
    print("| loss | plain, GiB | in chunks, GiB | plain / chunks | plain measured at, GiB |")
    print("| --- | --- | --- | --- | --- |")
    results = []
    for objective in OBJECTIVES:
        chunked = in_a_process(settings, "chunked", objective, settings.positions)
        plain = [in_a_process(settings, "plain", objective, positions) for positions in settings.plain]
        expected = line_through([(one["positions"], one["bytes"]) for one in plain], settings.positions)
        results += [chunked, *plain]
        points = ", ".join(f"{one['positions']}: {one['bytes'] / GIB:.2f}" for one in plain)
        print(
            f"| {objective} | {expected / GIB:.1f} (by the line) | {chunked['bytes'] / GIB:.2f} | "
            f"{expected / chunked['bytes']:.0f} | {points} |",
            flush=True,
        )
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": platform.machine(), "torch": torch.__version__, "dtype": settings.dtype}
    about |= {"vocabulary": settings.vocabulary, "hidden": settings.hidden}
    settings.output.write_text(json.dumps({**about, "cases": results}, indent=1) + "\n")
    print(f"\nwritten: {settings.output}")


if __name__ == "__main__":
    main()
