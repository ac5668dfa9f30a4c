"""From a sweep to what will run: models checked and fingerprinted, cells with their identity.

A cell's identity is a hash of everything that decides it, so a changed setting makes a new cell and an unchanged one is
never run twice.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from vkvtrain.ablation.grid import BASE, DENSE, Cell, ModelEntry, Sweep, without_repeats
from vkvtrain.ablation.tasks import TaskInfo, find_tasks
from vkvtrain.adapters import check_fits, read_adapter, tensor_shapes
from vkvtrain.config import CONFIG_NAME, EvictionConfig, nearest
from vkvtrain.identity import ADAPTER, adapter_hash, commit_of, decisive_files, model_identity, stamp_of
from vkvtrain.loading import load_tokenizer, read_config
from vkvtrain.support import layer_kinds
from vkvtrain.tiny import embedded


@dataclass(frozen=True)
class Model:
    """A model of the sweep as lm-eval is given it.

    Attributes:
        name: `base`, or the adapter's name.
        given: weights as the sweep names them.
        pretrained: directory or Hub name of the weights.
        revision: commit on the Hub; None for a directory.
        peft: directory of the adapter.
        fingerprint: hash of the files in a directory, or name and commit on the Hub; `+` the adapter's hash.
        stamp: sizes and times of change of those files.
    """

    name: str
    given: str
    pretrained: str
    revision: str | None
    peft: str | None
    fingerprint: str
    stamp: str


@dataclass(frozen=True)
class PlannedCell:
    """A cell with all that it takes to run it."""

    id: str
    cell: Cell
    model: Model
    task: TaskInfo
    limit: int | None


@dataclass(frozen=True)
class Plan:
    """A sweep, ready to run."""

    sweep: Sweep
    cells: list[PlannedCell]

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for the results' directory."""
        models = {planned.model.name: planned.model for planned in self.cells}
        tasks = {planned.task.name: planned.task for planned in self.cells}
        return {
            "sweep": self.sweep.model_dump(mode="json"),
            "versions": versions(),
            "misses_dense_control": self.sweep.misses_dense_control,
            "models": {name: asdict(model) for name, model in models.items()},
            "tasks": {name: asdict(task) for name, task in tasks.items()},
            "cells": [
                {"cell": planned.id, "name": planned.cell.name, **settings_of(planned)} for planned in self.cells
            ],
        }


def settings_of(planned: PlannedCell) -> dict[str, Any]:
    """What a cell is, in columns."""
    cell, config = planned.cell, planned.cell.config
    return {
        "model": cell.model,
        "policy": cell.label,
        "budget": config.budget,
        "window": config.window if config.evicts else None,
        "sinks": config.sinks if config.evicts else None,
        "protect_prompt": config.protect_prompt,
        "control": cell.control,
        "task": planned.task.name,
        "limit": planned.limit,
        "seed": cell.seed,
    }


def versions() -> dict[str, str]:
    """Versions that a number depends on."""
    return {name: version(name) for name in ("vkvtrain", "torch", "transformers", "peft", "lm_eval")}


def make_plan(sweep: Sweep) -> Plan:
    """Check a sweep against the models and tasks that it names, and give its cells their identity.

    Raises:
        ValueError: one sentence about a model, adapter or task that cannot be used.
    """
    check_arguments(sweep)
    tasks = find_tasks(sweep)
    cells = without_repeats(list(sweep.cells()), {name: task.sampled for name, task in tasks.items()})
    models = resolve_models(sweep, {cell.model for cell in cells})
    check_models(models.values(), cells, bool(sweep.model_args.get("trust_remote_code", False)))
    planned = []
    for cell in cells:
        task, model = tasks[cell.task.task], models[cell.model]
        limit = sweep.limit_of(cell.task)
        planned.append(PlannedCell(identity(sweep, cell, model, task, limit), cell, model, task, limit))
    return Plan(sweep, planned)


def check_arguments(sweep: Sweep) -> None:
    """Raise ValueError for a device or dtype that is none, which every cell would fail at."""
    try:
        torch.device(sweep.device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {sweep.device!r} is none: {str(error).splitlines()[0]}") from None
    dtype = sweep.model_args.get("dtype", "auto")
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(
            f"model_args: dtype {dtype!r} is none{nearest(str(dtype), ['float32', 'bfloat16', 'float16'])}"
        )


def identity(sweep: Sweep, cell: Cell, model: Model, task: TaskInfo, limit: int | None) -> str:
    """Hash of everything that decides the cell's numbers; what only decides speed (batch, processes) is left out."""
    decisive = {
        "model": model.fingerprint,
        "eviction": cell.config.model_dump(mode="json"),
        "task": {**cell.task.model_dump(mode="json", exclude={"limit"}), **asdict(task)},
        "limit": limit,
        "model_args": sweep.model_args,
        "apply_chat_template": sweep.apply_chat_template,
        "vkvtrain": version("vkvtrain"),
        "lm_eval": version("lm_eval"),
    }
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:12]


def resolve_models(sweep: Sweep, wanted: Iterable[str]) -> dict[str, Model]:
    """The models that cells name, with directories checked and Hub names pinned to a commit."""
    wanted = set(wanted)
    entries = {BASE: ModelEntry(pretrained=sweep.model, revision=sweep.revision), **sweep.adapters}
    return {name: resolve_model(name, entry, sweep) for name, entry in entries.items() if name in wanted}


def resolve_model(name: str, entry: ModelEntry, sweep: Sweep) -> Model:
    """One model of the sweep; raises ValueError where its files are not there."""
    where = "model" if name == BASE else f"adapters.{name}"
    given, revision = (entry.pretrained, entry.revision) if entry.pretrained else (sweep.model, sweep.revision)
    pretrained = embedded(given)
    trust = bool(sweep.model_args.get("trust_remote_code", False))
    try:
        config = transformers.AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {given!r} cannot be loaded: {' '.join(str(error).split())}") from None
    commit = None if Path(pretrained).is_dir() else commit_of(config) or revision
    stamp = stamp_of(model_files(pretrained, None))  # before the hash: what changes while it is computed is noticed
    base = model_identity(pretrained, config, revision)
    if entry.peft is None:
        return Model(name, given, pretrained, commit, None, base, stamp)
    directory = adapter_directory(where, entry.peft)
    stamp = stamp_of(model_files(pretrained, str(directory)))
    return Model(name, given, pretrained, commit, str(directory), f"{base}+{adapter_hash(directory)}", stamp)


def model_files(pretrained: str, peft: str | None) -> list[Path]:
    """The files on this machine that decide what a model of the sweep computes."""
    base = decisive_files(Path(pretrained)) if Path(pretrained).is_dir() else []
    return base + ([] if peft is None else [Path(peft) / part for part in ADAPTER])


def what_changed(planned: PlannedCell, sweep: Sweep) -> str | None:
    """What of a cell's model or task is no longer what the plan identified it by; None if nothing is."""
    model, entry = planned.model, planned.cell.task
    if stamp_of(model_files(model.pretrained, model.peft)) != model.stamp:
        return f"the files of model {model.name}"
    now = find_tasks(sweep.model_copy(update={"tasks": [entry]}))[entry.task]
    return None if now.fingerprint == planned.task.fingerprint else f"the task {entry.task}, or its data,"


def adapter_directory(where: str, peft: str) -> Path:
    """The directory of an adapter, downloaded if it is a Hub name; raises ValueError if it holds none."""
    directory = Path(embedded(peft))
    if not directory.is_dir():
        if peft.startswith((".", "/")) or peft.count("/") != 1 or (directory.parent.is_dir()):
            raise ValueError(f"{where}: there is no directory {peft!r}; train the adapter first, or correct the path")
        try:
            directory = Path(snapshot_download(peft, allow_patterns=list(ADAPTER)))
        except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise ValueError(
                f"{where}: {peft!r} is no directory and cannot be had from the Hub: {' '.join(str(error).split())}"
            ) from None
    missing = [part for part in ADAPTER if not (directory / part).is_file()]
    if missing:
        raise ValueError(f"{where}: {peft!r} has no {missing[0]}; is it the directory of a finished adapter?")
    return directory


def check_models(models: Iterable[Model], cells: Sequence[Cell], trust: bool) -> None:
    """Raise ValueError for a model that cannot evict under a cell's setting, or whose files are damaged."""
    for model in models:
        where = "model" if model.name == BASE else f"adapters.{model.name}"
        config = read_config(model.pretrained, where, model.revision, trust)
        for cell in cells:
            if cell.model == model.name:
                layer_kinds(config, cell.config)
        if not trust:
            load_tokenizer(model.pretrained, where, model.revision)
        for file in sorted(Path(model.pretrained).glob("*.safetensors")):  # none where it is a Hub name
            tensor_shapes(file, f"{where} {model.given!r}")
        if model.peft is not None:
            check_fits(read_adapter(model.peft, where), config, where, trust)
        if model.name == DENSE:
            check_dense(model)


def check_dense(model: Model) -> None:
    """Warn if the control without eviction says that it was trained under eviction."""
    directory = Path(model.peft or model.pretrained)
    if (directory / CONFIG_NAME).is_file() and (eviction := EvictionConfig.from_pretrained(directory)).evicts:
        warnings.warn(
            f"adapters.{DENSE}: {str(directory)!r} was trained under eviction ({eviction.policy}, budget "
            f"{eviction.budget}), so it is no control without eviction: call it something else",
            stacklevel=2,
        )
