"""Short training runs on the embedded model: their recipes, and what a run leaves behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vkvtrain.training.logs import read_metrics
from vkvtrain.training.loop import train
from vkvtrain.training.settings import Recipe

EVICTED = {"policy": "vase_attnv", "budget": 24, "window": 8}
"""A budget that some rows of `noise` reach."""
DEFAULTS: dict[str, Any] = {
    "model": {"name": "tiny"},
    "data": {"held_out": 0},
    "optim": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "log": {"tracker": "none"},
}


def short_recipe(output: str | Path, *parts: dict[str, Any]) -> Recipe:
    """`DEFAULTS` and the parts, merged section by section; of a setting that stands in several, the last counts."""
    merged: dict[str, Any] = {}
    for part in (DEFAULTS, *parts):
        for name, value in part.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe(**merged, output=Path(output))


def run(settings: Recipe, **flags: bool) -> list[dict[str, Any]]:
    """Train; the rows of the log."""
    train(settings, **flags)
    return metrics(settings.output)


def metrics(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / "metrics.jsonl")


def column(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def adapter_weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def assert_same_adapter(ours: Path, theirs: Path, relative: float) -> None:
    """Adapters equal up to rounding: the norm of the difference against the norm, weight by weight.

    Adam divides a gradient by its own size, so single entries whose gradient is all rounding may move freely.
    """
    mine, other = adapter_weights(ours), adapter_weights(theirs)
    assert mine.keys() == other.keys()
    for name in mine:
        assert (mine[name] - other[name]).norm() <= relative * other[name].norm(), name
