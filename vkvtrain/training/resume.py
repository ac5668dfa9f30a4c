"""Whether a run continues what its output holds, and how a run is saved and brought back.

The same command continues by itself: an output that holds checkpoints of the same recipe goes on from the newest, one
of another recipe is refused. Where results go, what is logged and how often a checkpoint is written may change.
"""

import hashlib
import json
import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict

from vkvtrain.training.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_files,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from vkvtrain.training.data import TrainingData
from vkvtrain.training.engines import gather_moments, gather_weights, restore_moments
from vkvtrain.training.logs import Log
from vkvtrain.training.run import Run
from vkvtrain.training.run_directory import RECIPE
from vkvtrain.training.settings import Recipe, recipe_values

FREE = ("output", "log", "checkpoint")
"""Settings that may change when a run continues: they do not decide what is trained."""


def fingerprint(data: TrainingData) -> str:
    """Hash of which rows are trained on, their lengths and prompts' lengths."""
    rows = [(row.index, row.length, row.prompt_length) for row in data.train]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def checkpoint_to_continue(
    recipe: Recipe, data: TrainingData, accelerator: Accelerator, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint that the run goes on from, the same in every process; None for a run that starts.

    Raises:
        ValueError: the output holds checkpoints of another recipe or other data, and `overwrite` is not set.
    """
    found: list[Checkpoint | None] = [None]
    if accelerator.is_main_process:
        if overwrite:
            remove_checkpoints(recipe.output)
        elif (path := newest_checkpoint(recipe.output)) is not None:
            _check_recipe(recipe)
            checkpoint = read_checkpoint(path)
            if checkpoint.state["data"] != fingerprint(data):
                raise ValueError(
                    f"output {str(recipe.output)!r} holds checkpoints of a run on other data (data.source has "
                    "changed): choose another output, or pass --overwrite to start afresh"
                )
            found = [checkpoint]
    broadcast_object_list(found)
    return found[0]


def _check_recipe(recipe: Recipe) -> None:
    """Raise ValueError unless the run in the output directory had the same recipe."""
    ours = recipe.model_dump(mode="json")
    theirs = recipe_values(recipe.output / RECIPE)
    different = [name for name in _differences(ours, theirs) if name.partition(".")[0] not in FREE]
    if different:
        raise ValueError(
            f"output {str(recipe.output)!r} holds checkpoints of another recipe (different: {', '.join(different)}): "
            "choose another output, or pass --overwrite to start afresh"
        )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted names of the settings in which two recipes differ."""
    names = []
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name), theirs.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            names += [f"{name}.{inner}" for inner in _differences(here, there)]
        elif here != there:
            names.append(name)
    return names


def save_run(run: Run, log: Log) -> str | None:
    """Write a checkpoint; every process calls it. Returns its name, None (after a warning) if it cannot be written."""
    accelerator, model = run.accelerator, run.adapted
    weights = gather_weights(accelerator, model)
    moments = gather_moments(accelerator, model, run.optimizer)
    name: list[str | None] = [None]
    if accelerator.is_main_process:
        adapter_config = model.peft_config["default"].to_dict() | {"inference_mode": True}
        adapter_config = json.loads(json.dumps(adapter_config, default=_jsonable))
        adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
        state = {
            "step": run.step,
            "scheduler": run.scheduler.state_dict(),
            "data": fingerprint(run.data),
            "processes": accelerator.num_processes,
            "watch": run.watch.state(),
        }
        try:
            log.sync()
            files = checkpoint_files(adapter_config, adapter, weights, moments, state)
            path = write_checkpoint(run.recipe.output, run.step, files, run.recipe.checkpoint.keep)
            name = [f"{CHECKPOINTS}/{path.name}"]
        except OSError as error:
            warnings.warn(
                f"the checkpoint of step {run.step} could not be written ({error.strerror}): the one before it is left "
                "as it is, and training goes on",
                stacklevel=2,
            )
    broadcast_object_list(name)
    return name[0]


def _jsonable(value: Any) -> Any:
    """Sets, enumerations and types in an adapter's configuration."""
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a prepared run, whose weights are the checkpoint's already, to where it was; every process calls it."""
    restore_moments(
        run.accelerator, run.adapted, run.optimizer, checkpoint.weights, checkpoint.moments, checkpoint.step
    )
    run.scheduler.load_state_dict(checkpoint.state["scheduler"])
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    run.step = checkpoint.step
    run.watch.load(checkpoint.state["watch"])
