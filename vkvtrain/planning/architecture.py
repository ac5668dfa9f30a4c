"""The shapes of a model, from its configuration alone: its modules are made on the meta device and counted.

Knows no devices and no runs.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vkvtrain.config import EvictionConfig, nearest
from vkvtrain.support import layer_kinds

PRESETS = files("vkvtrain.planning") / "presets"
"""Public configuration numbers of models, by name."""


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model. H is `hidden`, I `intermediate`, D `head_dim`."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Of the MLP that a token passes: of all its experts together where there are experts."""
    vocabulary: int
    evicting: int
    """Layers with full attention, whose entries grow until they are evicted."""
    sliding_window: int
    """Newest tokens that the other layers keep."""
    parameters: int
    layer_parameters: int
    """Of the largest layer."""
    active: int
    """Parameters that take part in the matrix products of one token: head included, embedding not, and of the experts
    those that a token is sent to."""
    expert_share: float
    """Share of the experts that a token is sent to; 1 without experts."""
    expert_parameters: int
    """Parameters of all experts."""
    quantised: int
    """Parameters that 4-bit and 8-bit storage reach: linear layers but the head."""
    adapter: int
    """Parameters of the adapter."""
    adapter_inputs: int
    """Input features of the adapted modules of one layer, summed."""
    adapted: int
    """Adapted modules of one layer."""
    norms_heads: bool
    """Whether queries and keys are normalised."""


def preset_names() -> list[str]:
    return sorted(Path(str(one)).stem for one in PRESETS.iterdir())


def read_config(name: str) -> Any:
    """The configuration of a preset, a directory or a Hub repository.

    Raises:
        ValueError: a name that is none of them.
    """
    if name in preset_names():
        return AutoConfig.for_model(**json.loads((PRESETS / f"{name}.json").read_text()))
    if "/" not in name and not Path(name).exists():
        raise ValueError(f"--model-config: there is no preset or directory {name!r}{nearest(name, preset_names())}")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model-config {name!r} cannot be loaded: {' '.join(str(error).split())}") from None


def read_architecture(name: str, r: int = 16, targets: str | list[str] = "all-linear") -> Architecture:
    """The shapes of a model and of a LoRA adapter on it.

    Args:
        name: of a preset, a directory or a Hub repository.
        r: rank.
        targets: modules that get an adapter, as peft names them.

    Raises:
        ValueError: a name that is none of them, or a model that cannot evict.
    """
    return architecture_of(read_config(name), name, r, targets)


def architecture_of(config: Any, name: str, r: int = 16, targets: str | list[str] = "all-linear") -> Architecture:
    """The same from a transformers configuration."""
    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(config, EvictionConfig(policy="snapkv", budget=2, window=1, sinks=0))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        own = list(model.named_parameters())
        layers = _layers(model)
        largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
        linear = {label: one.weight.numel() for label, one in model.named_modules() if isinstance(one, nn.Linear)}
        experts = sum(weight.numel() for _, weight in own if weight.dim() == 3)
        share = _expert_share(text) if experts else 1.0
        adapted: Any = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    inputs = [one.in_features or 0 for one in layers[0].modules() if isinstance(one, LoraLayer)]
    per_token = getattr(text, "num_experts_per_tok", 1) if experts else 1
    width = getattr(text, "moe_intermediate_size", None) if experts else None
    return Architecture(
        name=name, layers=text.num_hidden_layers, hidden=text.hidden_size, heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads, head_dim=getattr(text, "head_dim", None) or _head_dim(text),
        intermediate=(width or text.intermediate_size) * per_token, vocabulary=text.vocab_size,
        evicting=sum(kind.evicts for kind in kinds), sliding_window=getattr(text, "sliding_window", None) or 0,
        parameters=sum(weight.numel() for _, weight in own), layer_parameters=largest,
        active=sum(linear.values()) + round(experts * share), expert_share=share, expert_parameters=experts,
        quantised=sum(n for label, n in linear.items() if label != "lm_head"),
        adapter=adapted.get_nb_trainable_parameters()[0], adapter_inputs=sum(inputs), adapted=len(inputs),
        norms_heads=any("q_norm" in label for label, _ in own),
    )  # fmt: skip


def _head_dim(text: Any) -> int:
    return text.hidden_size // text.num_attention_heads


def _layers(model: Any) -> Any:
    """The decoder layers of a model."""
    return next(one for one in model.modules() if isinstance(one, nn.ModuleList))


def _expert_share(text: Any) -> float:
    total = getattr(text, "num_local_experts", None) or text.num_experts
    return text.num_experts_per_tok / total
