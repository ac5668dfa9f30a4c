"""How many threads a model gets on a CPU, where nobody says."""

import os
from typing import Any

import psutil
import torch

from vkvtrain.training.launch import launcher_arguments, parent_command

SMALL = 20_000_000
"""Parameters up to which one thread is faster than several: operations are too short to be shared, and on a machine
that does other work threads wait for each other (measured on the embedded model: 650 tokens/s with two that spin, 3,900
with one)."""


def choose_threads(model: Any) -> str | None:
    """Give a small model on the CPU one thread, unless OMP_NUM_THREADS says how many; returns what to say of it."""
    parameters = sum(weight.numel() for weight in model.parameters())
    if parameters > SMALL or torch.get_num_threads() == 1 or next(model.parameters()).device.type != "cpu":
        return None
    if _is_chosen():
        return None
    torch.set_num_threads(1)
    return f"one thread, as {parameters:,} parameters are few; OMP_NUM_THREADS sets another number"


def _is_chosen() -> bool:
    """Whether somebody set OMP_NUM_THREADS: `accelerate launch` sets it for its processes without being asked."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if launcher_arguments(parent_command()) is None:
        return True
    try:
        return "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return True
