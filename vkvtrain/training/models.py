"""The base model with its adapter, as a recipe describes them."""

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from vkvtrain.loading import load_config
from vkvtrain.support import ATTENTION, layer_kinds
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.settings import REWRITES_BASE, LoraSettings, ModelSettings, Recipe
from vkvtrain.versions import enable_checkpointing


def model_name(recipe: Recipe) -> str:
    """Directory or Hub name of the base model."""
    return str(MODEL_PATH) if recipe.model.name == "tiny" else recipe.model.name


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the base model; raises ValueError where there is none."""
    name = model_name(recipe)
    try:
        return AutoTokenizer.from_pretrained(name, revision=recipe.model.revision or "main")
    except OSError as error:
        raise ValueError(f"model.name {name!r} cannot be loaded: {' '.join(str(error).split())}") from None


def check_model(recipe: Recipe) -> None:
    """Raise ValueError for what can be known to fail before weights are loaded."""
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
    if recipe.lora.continue_from is not None:
        _check_adapter(recipe, recipe.lora.continue_from)


def _check_adapter(recipe: Recipe, name: str) -> None:
    """Raise ValueError unless an adapter is there and is what the recipe says of it."""
    try:
        found = PeftConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"lora.continue_from {name!r} holds no adapter: {' '.join(str(error).split())}") from None
    if not isinstance(found, LoraConfig):
        raise ValueError(f"lora.continue_from {name!r} is a {found.peft_type} adapter: only LoRA ones are supported")
    rewrites = isinstance(found.init_lora_weights, str) and found.init_lora_weights.startswith(REWRITES_BASE)
    if rewrites and recipe.training.objective != "sft":
        raise ValueError(
            f"lora.continue_from {name!r} was initialised with {found.init_lora_weights!r}, which rewrites the base "
            "weights, so the model without its adapter is no teacher: use objective 'sft'"
        )
    ours = recipe.lora
    for setting, here, there in (
        ("r", ours.r, found.r),
        ("alpha", ours.alpha, found.lora_alpha),
        ("rslora", ours.rslora, found.use_rslora),
        ("dora", ours.dora, found.use_dora),
    ):
        if here not in (there, LoraSettings.model_fields[setting].default):
            raise ValueError(
                f"lora.{setting} is {here}, but the adapter {name!r} to continue from has {there}: leave it out"
            )


def load_model(recipe: Recipe) -> Any:
    """The base model with its adapter, a fresh one or the one to continue from.

    Raises:
        ValueError: a model that cannot evict, or targets that are not in it.
    """
    settings, lora = recipe.model, recipe.lora
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_name(recipe), config=load_config(model_name(recipe), settings.revision),
        revision=settings.revision or "main", dtype=settings.dtype, attn_implementation=ATTENTION,
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
    init: Any = True if lora.init == "default" else lora.init
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        use_rslora=lora.rslora, use_dora=lora.dora, modules_to_save=lora.modules_to_save or None,
        init_lora_weights=init, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, adapter)


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
