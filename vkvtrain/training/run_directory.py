"""The run directory: adapter, eviction setting, resolved recipe, log and environment. A directory is evidence."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from torch import Tensor

from vkvtrain.outputs import check_directory
from vkvtrain.training.checkpoints import sync
from vkvtrain.training.settings import Recipe

FINISHED = "adapter_model.safetensors"
GENERATION = "generation_config.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"


class Incomplete(Exception):
    """A run that is trained and of which something could not be written."""


def check_output(directory: Path, overwrite: bool) -> None:
    """Raise ValueError if the directory cannot be written, or holds a finished run that may not be overwritten."""
    check_directory(directory, "output")
    if (directory / FINISHED).exists() and not overwrite:
        raise ValueError(f"output {str(directory)!r} holds a finished run: choose another output, or pass --overwrite")


def environment() -> dict[str, Any]:
    """Versions that a number depends on."""
    names = ("vkvtrain", "torch", "transformers", "peft", "accelerate")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: importlib.metadata.version(name) for name in names},
        "git": git.stdout.strip() or None,
    }


def changed_versions(directory: Path) -> list[str]:
    """What differs between the environment that a run began in and this one, in words."""
    path = directory / "environment.json"
    now = environment()
    before = json.loads(path.read_bytes()) if path.is_file() else now
    return [f"{name} {value} instead of {before.get(name)}" for name, value in now.items() if before.get(name) != value]


def base_identity(directory: Path) -> str | None:
    """What the base model was that a run trained on, by its files or its commit; None where that was not written."""
    path = directory / "environment.json"
    written = json.loads(path.read_bytes()) if path.is_file() else {}
    return written.get("identity", {}).get("base")


def start_run(recipe: Recipe, identity: Mapping[str, str]) -> None:
    """Write what is known before training.

    Args:
        recipe: of the run, with all that was decided when it began.
        identity: of its data and its base model.
    """
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / FINISHED).unlink(missing_ok=True)
    (recipe.output / RECIPE).write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    (recipe.output / "environment.json").write_text(
        json.dumps({**environment(), "identity": dict(identity)}, indent=2) + "\n"
    )


def finish_run(recipe: Recipe, model: Any, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Write the adapter, its tokenizer, where it stops and the eviction setting that it was trained for.

    The weights come last.

    Args:
        recipe: of the run.
        model: the adapted model.
        weights: its trained weights by parameter, whole.
        tokenizer: of the base model.

    Raises:
        Incomplete: a full disk, among others; the weights are not there then, and what was half written is gone.
    """
    # the weights say that the run is finished, so they appear whole or not at all
    beside = recipe.output / ".unfinished"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        recipe.trained_for().save_pretrained(recipe.output)
        tokenizer.save_pretrained(recipe.output)
        model.generation_config.to_json_file(recipe.output / GENERATION)  # unchecked: base models hold odd ones
        model.save_pretrained(beside, safe_serialization=True, state_dict=weights, save_embedding_layers=False)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == FINISHED):
            sync(path)
            path.replace(recipe.output / path.name)
        sync(recipe.output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Incomplete(
            f"the adapter could not be written to {recipe.output} ({reason}): mend that, or make room, and the same "
            "command finishes the run"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
