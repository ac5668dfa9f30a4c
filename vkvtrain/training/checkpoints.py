"""Checkpoints: what a run needs to go on, bit for bit, from the step after which it was written.

    output/checkpoints/step-00000100/
        adapter_config.json, adapter_model.safetensors   an adapter as peft loads it
        training_state.safetensors                       trained weights and AdamW's moments by parameter, float32
        training_state.json                              step, learning rate, hashes of the data and of the base
        manifest.json                                    size and SHA-256 of each file; written last

Order of data, eviction, noise and dropout are functions of the recipe and the step, so there is no state of random
generators to keep. A checkpoint is written beside its place, synced, and renamed: at its place there is a whole one or
none. What is not whole all the same (a crash of the machine, a full disk, a copy cut short) fails its manifest.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
TENSORS, STATE = "training_state.safetensors", "training_state.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read."""

    path: Path
    step: int
    """Finished optimiser steps."""
    weights: dict[str, Tensor]
    """By parameter, what is trained."""
    moments: dict[str, Tensor]
    """By `{moment}/{parameter}`."""
    state: dict[str, Any]
    """What else the loop needs."""


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write and sync."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_checkpoint(output: Path, step: int, files: Mapping[str, bytes], keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`; returns its path.

    Raises:
        OSError: a full disk, among others; the whole checkpoints that were there are left as they were.
    """
    parent = output / CHECKPOINTS
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step-{step:08d}"
    for left in parent.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(left)
    beside = final.with_name(final.name + _UNFINISHED)
    try:
        beside.mkdir()
        for name, content in files.items():
            write_file(beside / name, content)
        sizes = {name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in files.items()}
        write_file(beside / MANIFEST, json.dumps({"step": step, "files": sizes}, indent=2).encode())
        sync(beside)
        _remove([path for path in _places(parent) if path >= final])  # not whole, or the run would be there already
        beside.rename(final)
        sync(parent)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _remove(_places(parent)[:-keep])
    return final


def _places(parent: Path) -> list[Path]:
    """Where checkpoints are, whole or not, oldest first."""
    return sorted(parent.glob("step-*[0-9]"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        (path / MANIFEST).unlink(missing_ok=True)  # a run that is cut here does not take it for whole
        shutil.rmtree(path)


def what_is_wrong(path: Path) -> str | None:
    """Why a directory is no whole checkpoint; None if it is one."""
    if path.name.endswith(_UNFINISHED):
        return "it was being written when the run stopped"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = manifest["files"].items()
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files:
        if not (path / name).is_file():
            return f"{name} is missing"
        content = (path / name).read_bytes()
        if len(content) != expected["bytes"]:
            return f"{name} has {len(content)} bytes instead of {expected['bytes']}"
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            return f"{name} is damaged"
    return None


def newest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run; warns about each newer one that is not."""
    for path in sorted((output / CHECKPOINTS).glob("step-*"), reverse=True):
        problem = what_is_wrong(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is skipped: {problem}", stacklevel=2)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint."""
    state = json.loads((path / STATE).read_text())
    tensors = load_file(path / TENSORS)
    weights = {name.removeprefix("weight/"): tensors.pop(name) for name in list(tensors) if name.startswith("weight/")}
    return Checkpoint(path, state["step"], weights, tensors, state)


def remove_all_but_newest(output: Path) -> None:
    """Make room: only the newest whole checkpoint is left."""
    newest = newest_checkpoint(output)
    _remove([path for path in _places(output / CHECKPOINTS) if path != newest])


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def checkpoint_files(
    adapter_config: Mapping[str, Any], adapter: dict[str, Tensor], weights: dict[str, Tensor],
    moments: dict[str, Tensor], state: dict[str, Any],
) -> dict[str, bytes]:  # fmt: skip
    """The files of a checkpoint; `adapter` is what peft stores of `weights`."""
    return {
        "adapter_config.json": json.dumps(adapter_config, indent=2, sort_keys=True).encode(),
        ADAPTER: save(adapter, metadata={"format": "pt"}),
        TENSORS: save({**{f"weight/{name}": weight for name, weight in weights.items()}, **moments}),
        STATE: json.dumps(state, indent=2).encode(),
    }
