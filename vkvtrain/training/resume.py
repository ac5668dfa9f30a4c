"""Whether a run continues what its output holds, and how a run is saved and brought back.

The same command continues by itself: an output that holds checkpoints of the same recipe goes on from the newest, one
of another recipe is refused. Where results go, what is logged and how often a checkpoint is written may change.
"""

import hashlib
import json
import warnings
from array import array
from collections.abc import Mapping
from datetime import date
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig

from vkvtrain.clock import reads_clock
from vkvtrain.identity import model_identity
from vkvtrain.training.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_files,
    newest_checkpoint,
    read_checkpoint,
    remove_all_but_newest,
    remove_checkpoints,
    write_checkpoint,
)
from vkvtrain.training.data import TrainingData
from vkvtrain.training.engines import gather_moments, gather_weights, is_deepspeed, restore_moments, shards_weights
from vkvtrain.training.logs import Log
from vkvtrain.training.models import model_name
from vkvtrain.training.run import Run
from vkvtrain.training.run_directory import RECIPE
from vkvtrain.training.settings import Recipe, recipe_values

FREE = ("output", "log", "checkpoint")
"""Settings that may change when a run continues: they do not decide what is trained."""


def fingerprint(data: TrainingData) -> str:
    """Hash of all that a run takes from its rows, training and held-out: tokens, and which of them have a loss."""
    total = hashlib.sha256()
    for part in (data.train, data.held_out):
        total.update(f"{len(part)} rows\n".encode())
        for row in part:
            for name in row.__slots__:
                value = getattr(row, name)
                total.update(f"{name} {value.typecode if isinstance(value, array) else repr(value)}\n".encode())
                total.update(value.tobytes() if isinstance(value, array) else b"")
    return total.hexdigest()


def identity_of(recipe: Recipe, data: TrainingData) -> dict[str, str]:
    """What decides a run and is not written in its recipe: the rows, and the base model behind its name."""
    name = model_name(recipe)
    config = AutoConfig.from_pretrained(name, revision=recipe.model.revision or "main")
    return {"data": fingerprint(data), "base": model_identity(name, config, recipe.model.revision)}


def with_date(recipe: Recipe, tokenizer: Any, overwrite: bool) -> Recipe:
    """The recipe with the day that its chat template writes: its own, the one that the run began on, or today.

    Every process calls it.

    Raises:
        ValueError: a `data.date` that changes nothing.
    """
    if not reads_clock(tokenizer):
        if recipe.data.date is not None:
            raise ValueError("data.date fixes the day that a chat template writes, and this one writes none: remove it")
        return recipe
    if recipe.data.date is not None:
        return recipe
    began = None
    if not overwrite and (recipe.output / CHECKPOINTS).is_dir():
        began = recipe_values(recipe.output / RECIPE)["data"].get("date")
    day = [date.fromisoformat(str(began)) if began else date.today()]
    broadcast_object_list(day)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": day[0]})})


def checkpoint_to_continue(
    recipe: Recipe, identity: Mapping[str, str], accelerator: Accelerator, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint that the run goes on from, the same in every process; None for a run that starts.

    Args:
        recipe: of the run.
        identity: see `identity_of`; empty in processes that are not the main one.
        accelerator: of the run.
        overwrite: remove what checkpoints there are.

    Raises:
        ValueError: the output holds checkpoints of another recipe, other data or another base model, and `overwrite`
            is not set.
    """
    found: list[Checkpoint | None] = [None]
    if accelerator.is_main_process:
        if overwrite:
            remove_checkpoints(recipe.output)
        elif (path := newest_checkpoint(recipe.output)) is not None:
            _check_recipe(recipe)
            checkpoint = read_checkpoint(path)
            _check_identity(recipe, identity, checkpoint.state)
            found = [checkpoint]
    broadcast_object_list(found)
    return found[0]


def _check_identity(recipe: Recipe, ours: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint is of a run on the same rows and the same base model."""
    for name, other, reason in (
        ("data", "other data", "data.source has changed"),
        ("base", "another base model", f"what {recipe.model.name!r} names has changed"),
    ):
        if state.get(name) != ours[name]:
            raise ValueError(
                f"output {str(recipe.output)!r} holds checkpoints of a run on {other} ({reason}): choose another "
                "output, or pass --overwrite to start afresh"
            )


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
    if run.saved is not None:
        return run.saved
    state = gather_state(run)
    name = [_write(run, log, *state) if run.accelerator.is_main_process else None]
    broadcast_object_list(name)
    run.saved = name[0]
    return name[0]


def gather_state(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained weights and their moments, whole; every process calls it."""
    weights = gather_weights(run.accelerator, run.adapted)
    return weights, gather_moments(run.accelerator, run.adapted, run.optimizer)


def save_alone(run: Run, log: Log) -> str | None:
    """Write a checkpoint from the main process, which asks no other one; None if it cannot be written.

    Under engines that shard weights or moments no process holds all of them.
    """
    sharded = is_deepspeed(run.accelerator) or shards_weights(run.accelerator)
    if run.saved is not None or sharded or not run.step:
        return run.saved
    if run.row is not None:
        log.add(run.row)
    return _write(run, log, *gather_state(run))


def save_last(run: Run, log: Log, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Write a checkpoint of the last step, on the main process; where it does not fit, in the place of older ones."""
    saved = run.saved or _write(run, log, weights, moments)
    if saved is None:
        remove_all_but_newest(run.recipe.output)
        saved = _write(run, log, weights, moments)
    print("the last step is lost" if saved is None else f"the last step is kept: {saved}", flush=True)


def _write(run: Run, log: Log, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> str | None:
    """Write a checkpoint on the main process: its name, or None after a warning."""
    model = run.adapted
    adapter_config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    adapter_config = json.loads(json.dumps(adapter_config, default=_jsonable))
    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    state = {
        "step": run.step,
        "scheduler": run.scheduler.state_dict(),
        **run.identity,
        "processes": run.accelerator.num_processes,
        "watch": run.watch.state(),
    }
    try:
        log.sync()
        files = checkpoint_files(adapter_config, adapter, weights, moments, state)
        path = write_checkpoint(run.recipe.output, run.step, files, run.recipe.checkpoint.keep)
    except OSError as error:
        warnings.warn(
            f"the checkpoint of step {run.step} could not be written ({error.strerror}): the one before it is left "
            "as it is" + (", and training goes on" if run.step < run.recipe.training.steps else ""),
            stacklevel=2,
        )
        return None
    return f"{CHECKPOINTS}/{path.name}"


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
    run.saved = f"{CHECKPOINTS}/{checkpoint.path.name}"
    run.watch.load(checkpoint.state["watch"])
