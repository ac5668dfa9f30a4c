"""The base model with its adapter, as a recipe describes them."""

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain.support import ATTENTION, layer_kinds
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.settings import Recipe


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


def load_model(recipe: Recipe) -> Any:
    """The base model with a fresh adapter; raises ValueError for a model that cannot evict."""
    settings, lora = recipe.model, recipe.lora
    model = AutoModelForCausalLM.from_pretrained(
        model_name(recipe), revision=settings.revision or "main", dtype=settings.dtype, attn_implementation=ATTENTION
    )
    for config in recipe.eviction_configs():
        layer_kinds(model.config, config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        init_lora_weights=True if lora.init == "default" else lora.init, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, adapter)
