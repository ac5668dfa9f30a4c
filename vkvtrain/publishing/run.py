"""A finished training run, as publishing sees it: what is there, and what can be said of its base model."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from vkvtrain.adapters import read_adapter
from vkvtrain.config import EvictionConfig
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.run_directory import FINISHED
from vkvtrain.training.settings import recipe_values

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DATA_FILES = (".json", ".jsonl", ".parquet")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The base model: where it is loaded from, and what others call it."""

    source: str
    """Directory or Hub name that the run was trained on."""
    revision: str | None
    name: str | None
    """Hub name for others; None for the embedded model."""
    licence: Mapping[str, str]
    """The keys `license`, `license_name` and `license_link` of its card, as far as they are there."""
    licence_given: bool = False
    """Whether it was given by the publisher and not read from the base model's card."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run and its base model."""

    directory: Path
    recipe: dict[str, Any]
    eviction: EvictionConfig
    base: Base

    @property
    def quantization(self) -> str:
        """How the base weights were quantized in training, or `none`."""
        return self.recipe["model"].get("quantization", "none")

    @property
    def hub_dataset(self) -> str | None:
        """The data set on the Hub that it was trained on, if it was one."""
        source = str((self.recipe.get("data") or {}).get("source", ""))
        return source if source.count("/") == 1 and ":" not in source and not is_path(source) else None


def read_run(directory: Path, base_name: str | None, licence: str | None, merge: bool) -> FinishedRun:
    """What is to be published.

    Args:
        directory: a run's output directory.
        base_name: Hub name of a base model that was loaded from a directory.
        licence: of what is published, where the base model's card does not tell.
        merge: whether whole weights will be written.

    Raises:
        ValueError: no finished run, pickled weights in it, or a base model that others cannot find.
    """
    if not (directory / FINISHED).is_file():
        raise ValueError(f"{str(directory)!r} holds no finished run ({FINISHED} is missing): give a recipe's output")
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{str(directory)!r} holds {pickled[0]}, which is a pickle: only safetensors are published, remove it"
        )
    try:
        recipe = recipe_values(directory / "recipe.yaml")
        eviction = EvictionConfig.from_pretrained(directory)
    except OSError as error:
        raise ValueError(str(error)) from None
    model = recipe.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise ValueError(f"{str(directory / 'recipe.yaml')!r} names no model (model.name): is it a run's own recipe?")
    return FinishedRun(directory, recipe, eviction, _base(directory, recipe, base_name, licence, merge))


def _base(directory: Path, recipe: dict[str, Any], base_name: str | None, licence: str | None, merge: bool) -> Base:
    settings = recipe["model"]
    source, revision = settings["name"], settings.get("revision")
    embedded = source == "tiny"
    if not embedded and not Path(source).is_absolute():
        # the recipe names a directory relative to where it was launched, the adapter names it in full
        source = read_adapter(directory, "adapter").config.base_model_name_or_path or source
    if base_name is not None:
        validate_repo_id(base_name)
    elif embedded and not merge:
        raise ValueError(
            "the base model is the one embedded in vkvtrain, which is not on the Hub, so nobody could load this "
            "adapter: pass --merge to publish whole weights"
        )
    elif not embedded and is_local(source):
        raise ValueError(
            f"the base model was loaded from the directory {source!r}, which others do not have: say what it is on "
            "the Hub with --base-name, for example --base-name Qwen/Qwen3-1.7B"
        )
    elif not embedded:
        base_name = source
        _check_on_hub(source, revision)
    source = str(MODEL_PATH) if embedded else source
    found = {"license": licence} if licence else _licence_of(source, revision)
    if "license" not in found:
        raise ValueError(
            f"the licence of the base model {base_name or source!r} could not be read from its card: pass --license "
            "as its page on the Hub says, for example --license apache-2.0"
        )
    return Base(source, revision, base_name, found, licence_given=bool(licence))


def _check_on_hub(name: str, revision: str | None) -> None:
    """Raise ValueError unless a base model is a repository on the Hub, or was downloaded from there."""
    try:
        cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(
            f"the base model {name!r} is not to be had from the Hub ({' '.join(str(error).split())}): others could not "
            "load this adapter; say what it is on the Hub with --base-name, for example --base-name Qwen/Qwen3-1.7B"
        ) from None


def is_local(name: str) -> bool:
    """Whether a model name is a directory of this machine and not a Hub repository."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_path(text: str) -> bool:
    """Whether a setting is the path of a file or directory, which a publication must not tell."""
    if text.startswith(("~", "./", "../")) or Path(text).suffix in _DATA_FILES:
        return True
    return (
        "/" in text
        and (text.startswith("/") or not re.search(r"\s", text))
        and (text.count("/") > 1 or os.path.exists(text))
    )


def _licence_of(source: str, revision: str | None) -> dict[str, str]:
    """The licence in the metadata of a model's card; empty where there is none or it cannot be had."""
    try:
        card = cached_file(source, "README.md", revision=revision)
        metadata = metadata_load(card) if card else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: str((metadata or {})[key]) for key in _LICENCE_KEYS if (metadata or {}).get(key)}
