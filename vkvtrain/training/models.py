"""The base model with its adapter, as a recipe describes them."""

import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import BitsAndBytesConfig

from vkvtrain.adapters import Adapter, check_fits, read_adapter, skeleton
from vkvtrain.config import nearest
from vkvtrain.loading import load_tokenizer as tokenizer_of
from vkvtrain.loading import load_weights, read_config
from vkvtrain.support import layer_kinds
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.settings import REWRITES_BASE, LoraSettings, ModelSettings, Recipe
from vkvtrain.versions import enable_checkpointing


def model_name(recipe: Recipe) -> str:
    """Directory or Hub name of the base model; a directory in full, so that the adapter names it from anywhere."""
    name = str(MODEL_PATH) if recipe.model.name == "tiny" else recipe.model.name
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the base model; raises ValueError where there is none."""
    return tokenizer_of(model_name(recipe), "model.name", recipe.model.revision)


def check_model(recipe: Recipe) -> None:
    """Raise ValueError for what can be known to fail, or to be without effect, before weights are loaded."""
    if recipe.model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantization {recipe.model.quantization!r} needs bitsandbytes: pip install bitsandbytes, or leave "
            "it out"
        )
    if recipe.model.quantization != "none" and not torch.cuda.is_available():
        # seen with 0.50: a 4-bit layer that was once in evaluation mode on a CPU gives no gradient from then on
        raise ValueError(
            f"model.quantization {recipe.model.quantization!r} needs a GPU, because bitsandbytes loses gradients on "
            "CPUs: leave it out"
        )
    name = model_name(recipe)
    if recipe.model.revision is not None and Path(name).is_dir():
        raise ValueError(
            f"model.revision {recipe.model.revision!r} is of a Hub repository, and model.name {recipe.model.name!r} is "
            "a directory: leave it out"
        )
    config = read_config(name, "model.name", recipe.model.revision)
    for eviction in recipe.eviction_configs():
        layer_kinds(config, eviction)
    if recipe.lora.continue_from is None:
        check_targets(skeleton(config), recipe.lora)
    else:
        adapter = read_adapter(recipe.lora.continue_from, "lora.continue_from")
        _check_adapter(recipe, adapter)
        check_fits(adapter, config, "lora.continue_from")


def check_targets(base: Any, lora: LoraSettings) -> None:
    """Raise ValueError unless every module that the recipe names is in the model and is trained.

    Args:
        base: the base model; its weights are not looked at.
        lora: the recipe's.
    """
    largest = max(min(weight.shape) for weight in base.parameters() if weight.dim() == 2)
    if lora.r > largest:
        raise ValueError(f"lora.r ({lora.r}) is more than the rank of any weight of the model ({largest}): lower it")
    names = [name for name, _ in base.named_modules() if name]
    for setting in ("target_modules", "modules_to_save"):
        _check_names(setting, getattr(lora, setting), names)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the adapter is made
            adapted = get_peft_model(base, lora_config(lora.model_copy(update={"init": "default"})))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lora.target_modules {lora.target_modules!r} with lora.modules_to_save {lora.modules_to_save!r}: "
            f"{' '.join(str(error).split())}"
        ) from None
    kinds = {"target_modules": LoraLayer, "modules_to_save": ModulesToSaveWrapper}
    for setting, kind in kinds.items():
        reached = [name for name, module in adapted.named_modules() if isinstance(module, kind)]
        entries = getattr(lora, setting)
        for entry in entries if isinstance(entries, list) else []:
            if not any(name.endswith(f".{entry}") for name in reached):
                raise ValueError(f"lora.{setting}: {entry!r} is without effect: another setting of lora has it, too")


def _check_names(setting: str, entries: str | list[str], names: Sequence[str]) -> None:
    """Raise ValueError for a name, or a pattern in the place of a list, that is no module's."""
    leaves = sorted({part for part in (name.rpartition(".")[2] for name in names) if not part.isdecimal()})
    if isinstance(entries, str):
        try:
            found = entries == "all-linear" or any(re.fullmatch(entries, name) for name in names)
        except re.error as error:
            raise ValueError(f"lora.{setting} {entries!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"lora.{setting} {entries!r} is the whole name of no module, as a pattern must be: give a list of last "
                f"parts of names{nearest(entries, leaves)}"
            )
        return
    if setting == "target_modules" and not entries:
        raise ValueError("lora.target_modules is an empty list: name at least one module")
    for entry in entries:
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            raise ValueError(f"lora.{setting}: the model has no module {entry!r}{nearest(entry, leaves)}")


def _check_adapter(recipe: Recipe, adapter: Adapter) -> None:
    """Raise ValueError unless an adapter to continue from is what the recipe says of it, and of the recipe's model."""
    found, name = adapter.config, adapter.name
    if not isinstance(found, LoraConfig):
        raise ValueError(f"lora.continue_from {name!r} is a {found.peft_type} adapter: only LoRA ones are supported")
    rewrites = isinstance(found.init_lora_weights, str) and found.init_lora_weights.startswith(REWRITES_BASE)
    if rewrites and recipe.training.objective != "sft":
        raise ValueError(
            f"lora.continue_from {name!r} was initialised with {found.init_lora_weights!r}, which rewrites the base "
            "weights, so the model without its adapter is no teacher: use objective 'sft'"
        )
    _check_base(recipe, found, name)
    ours = recipe.lora
    for setting, here, there in (
        ("r", ours.r, found.r),
        ("alpha", ours.alpha, found.lora_alpha),
        ("rslora", ours.rslora, found.use_rslora),
        ("dora", ours.dora, found.use_dora),
        ("dropout", ours.dropout, found.lora_dropout),
        ("target_modules", _as_set(ours.target_modules), _as_set(found.target_modules)),
        ("modules_to_save", _as_set(ours.modules_to_save), _as_set(found.modules_to_save)),
        ("init", ours.init, "default"),
    ):
        default = LoraSettings.model_fields[setting].get_default(call_default_factory=True)
        if here == there or setting not in ours.model_fields_set:
            continue
        said = f"lora.{setting} is {_shown(here)}, but the adapter {name!r} to continue from has {_shown(there)}"
        if here != _as_set(default):
            raise ValueError(f"{said}: leave it out")
        warnings.warn(f"{said}, which holds", stacklevel=2)


def _as_set(value: Any) -> Any:
    """Lists of names without their order; an empty one is none."""
    return frozenset(value or ()) if value is None or isinstance(value, list | set) else value


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def _check_base(recipe: Recipe, found: LoraConfig, name: str) -> None:
    """Raise ValueError if an adapter says that it was trained on another model."""
    theirs, ours = found.base_model_name_or_path, model_name(recipe)
    if not theirs:
        warnings.warn(f"lora.continue_from {name!r} names no base model, so it may be another's", stacklevel=2)
        return
    same = Path(theirs).resolve() == Path(ours) if Path(ours).is_dir() else theirs == ours
    if not same:
        raise ValueError(
            f"lora.continue_from {name!r} was trained on {theirs!r}, and model.name is {ours!r}: set model.name to it, "
            "or, if they are the same weights, correct base_model_name_or_path in its adapter_config.json"
        )
    revisions = [revision or "main" for revision in (found.revision, recipe.model.revision)]
    if revisions[0] != revisions[1]:
        raise ValueError(
            f"lora.continue_from {name!r} was trained on revision {revisions[0]!r} of {theirs!r}, and model.revision "
            f"is {revisions[1]!r}: set model.revision to it"
        )


def load_model(recipe: Recipe) -> Any:
    """The base model with its adapter, a fresh one or the one to continue from.

    Raises:
        ValueError: a model that cannot evict or be loaded, or targets that are not in it.
    """
    settings, lora = recipe.model, recipe.lora
    model = load_weights(
        model_name(recipe), "model.name", revision=settings.revision, dtype=settings.dtype,
        quantization_config=quantization(settings),
    )  # fmt: skip
    for config in recipe.eviction_configs():
        layer_kinds(model.config, config)
    if settings.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if settings.gradient_checkpointing:
        # not reentrant, whatever the engine: reentrant checkpointing breaks under DDP, and gives an adapter no gradient
        # unless the embeddings require one; ZeRO-3, which once needed it, trains the same without (DeepSpeed 0.19)
        enable_checkpointing(model, use_reentrant=False)
        model.enable_input_require_grads()
    if lora.continue_from is not None:
        return PeftModel.from_pretrained(model, lora.continue_from, is_trainable=True)
    return get_peft_model(model, lora_config(lora), revision=settings.revision)


def lora_config(lora: LoraSettings) -> LoraConfig:
    """The adapter as peft describes it."""
    init: Any = True if lora.init == "default" else lora.init
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        use_rslora=lora.rslora, use_dora=lora.dora, modules_to_save=lora.modules_to_save or None,
        init_lora_weights=init, task_type="CAUSAL_LM",
    )  # fmt: skip


def quantization(settings: ModelSettings) -> BitsAndBytesConfig | None:
    """How the base weights are stored: QLoRA's 4-bit NormalFloat with doubly quantised scales, LLM.int8, or as is."""
    if settings.quantization == "none":
        return None
    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
