"""LoRA adapters as files: read, and compared with the shapes of a base model, before any weights are loaded.

Knows files and shapes; knows nothing of what an adapter was trained for.
"""

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import cached_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What the files of an adapter say.

    Attributes:
        name: directory or Hub name.
        config: how it changes its base model.
        shapes: of its weights by name, as they are stored.
    """

    name: str
    config: PeftConfig
    shapes: Mapping[str, tuple[int, ...]]


def read_adapter(name: str | os.PathLike[str], where: str, revision: str | None = None) -> Adapter:
    """The description of an adapter in a directory or on the Hub.

    Args:
        name: directory or Hub name.
        where: the setting that names it, for errors.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: no adapter there, or files that are broken or cut short.
    """
    name = os.fspath(name)
    description, weights = (_file(name, part, where, revision) for part in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    config = _read_config(description, f"{where} {name!r}", name, revision)
    return Adapter(name, config, tensor_shapes(weights, f"{where} {name!r}"))


def _file(name: str, part: str, where: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        if not (Path(name) / part).is_file():
            raise ValueError(f"{where} {name!r} holds no adapter: it has no {part} (only safetensors are read)")
        return Path(name) / part
    try:
        found = cached_file(name, part, revision=revision)
    except OSError as error:
        raise ValueError(f"{where} {name!r} holds no adapter ({part}): {' '.join(str(error).split())}") from None
    return Path(str(found))


def _read_config(path: Path, where: str, name: str, revision: str | None) -> PeftConfig:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{where}: {ADAPTER_CONFIG} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise ValueError(f"{where}: {ADAPTER_CONFIG} does not describe a PEFT adapter (peft_type is missing)")
    try:
        return PeftConfig.from_pretrained(name, revision=revision)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {ADAPTER_CONFIG} cannot be read by peft: {' '.join(str(error).split())}") from None


def tensor_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by name, from the header alone.

    Raises:
        ValueError: a file that is no safetensors file, or one that was cut short.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{where}: {path.name} is damaged or was cut short ({' '.join(str(error).split())}): copy or download it "
            "again"
        ) from None


def skeleton(base: Any, trust_remote_code: bool = False) -> Any:
    """The modules of a base model without weights (on the meta device), from its configuration."""
    with torch.device("meta"):
        if type(base) in MODEL_FOR_CAUSAL_LM_MAPPING:
            # by its class: under ZeRO-3 `from_config` would spread the modules over the processes
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(base)]
            return kind(base)
        return AutoModelForCausalLM.from_config(base, trust_remote_code=trust_remote_code)


def check_fits(adapter: Adapter, base: Any, where: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError unless a LoRA adapter has just the weights that the base model's shapes ask for.

    peft itself leaves out what an adapter lacks, and names tensors rather than the setting where shapes differ.

    Args:
        adapter: what was read.
        base: transformers configuration of the base model.
        where: the setting that names the adapter, for errors.
        trust_remote_code: whether the base model's own code may run.
    """
    if not isinstance(adapter.config, LoraConfig):
        return
    named = f"{where} {adapter.name!r} does not fit the base model {base.name_or_path or base.model_type!r}"
    config = copy.deepcopy(adapter.config)
    config.init_lora_weights = False  # shapes only: others would decompose weights that are not there
    config.inference_mode, config.base_model_name_or_path = False, None
    try:
        wanted = expected_shapes(skeleton(base, trust_remote_code), config)
    except (TypeError, ValueError) as error:  # peft checks few of the types in a configuration
        raise ValueError(f"{named}: {' '.join(str(error).split())}") from None
    for name, shape in wanted.items():
        if name not in adapter.shapes:
            raise ValueError(f"{named}: {ADAPTER_WEIGHTS} has no weight {name!r}; was it trained on another model?")
        if adapter.shapes[name] != shape:
            raise ValueError(
                f"{named}: {name} has shape {list(adapter.shapes[name])} and the model asks for {list(shape)}; it was "
                "trained on another model, or with resized embeddings"
            )
    foreign = sorted(name for name in adapter.shapes if name not in wanted and "lora_" in name)
    if foreign:
        raise ValueError(f"{named}: the model has no place for {foreign[0]!r}; was it trained on another model?")


def expected_shapes(base: Any, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that peft stores of an adapter on a base model (on the meta device), by name.

    Raises:
        ValueError: targets that are not in the model, in peft's words.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of tied layers, it says again where weights are loaded
        stored = get_peft_model_state_dict(get_peft_model(base, config), save_embedding_layers=False)
    return {name: tuple(weight.shape) for name, weight in stored.items()}
