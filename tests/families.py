"""Tiny random models of every supported family, with what sets each one's attention apart."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SLIDING = ["sliding_attention", "full_attention"]
"""Layers of a family that alternates."""


@dataclass(frozen=True)
class Family:
    """A family: its classes, and the settings beside the common ones."""

    config: type
    model: type
    note: str = ""
    """What is particular, for the table in the README."""
    settings: dict[str, Any] = field(default_factory=dict)


MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, Family] = {
    "Qwen3": Family(Qwen3Config, Qwen3ForCausalLM, "norms of queries and keys", {"head_dim": 16}),
    "Qwen2": Family(Qwen2Config, Qwen2ForCausalLM, "biases"),
    "DeepSeek-R1-Distill-Qwen": Family(
        Qwen2Config, Qwen2ForCausalLM, "6 query heads a KV head",
        {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 192, "rope_theta": 10000.0},
    ),
    "Llama": Family(LlamaConfig, LlamaForCausalLM, "", {"head_dim": 16}),
    "DeepSeek-R1-Distill-Llama": Family(
        LlamaConfig, LlamaForCausalLM, "4 query heads a KV head, Llama 3 RoPE scaling",
        {
            "num_attention_heads": 8, "hidden_size": 128,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "Mistral": Family(MistralConfig, MistralForCausalLM, "without its sliding window", {"sliding_window": None}),
    "Phi3": Family(Phi3Config, Phi3ForCausalLM, "one projection for queries, keys and values"),
    "Granite": Family(GraniteConfig, GraniteForCausalLM, "its own scaling", {"attention_multiplier": 0.11}),
    "SmolLM3": Family(SmolLM3Config, SmolLM3ForCausalLM, "layers without RoPE", {"no_rope_layers": [1, 0]}),
    "Olmo2": Family(Olmo2Config, Olmo2ForCausalLM, "norms after attention"),
    "Olmo3": Family(
        Olmo3Config, Olmo3ForCausalLM, "sliding layers are left alone", {"sliding_window": 12, "layer_types": SLIDING}
    ),
    "Qwen3-MoE": Family(Qwen3MoeConfig, Qwen3MoeForCausalLM, "mixture of experts", {"head_dim": 16, **MOE}),
    "Gemma2": Family(
        Gemma2Config, Gemma2ForCausalLM, "soft-capped logits; sliding layers are left alone",
        {
            "head_dim": 16, "sliding_window": 12, "layer_types": SLIDING, "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "Gemma3": Family(
        Gemma3TextConfig, Gemma3ForCausalLM, "its own scaling; sliding layers are left alone",
        {"head_dim": 16, "sliding_window": 12, "layer_types": SLIDING, "query_pre_attn_scalar": 20},
    ),
    "gpt-oss": Family(
        GptOssConfig, GptOssForCausalLM, "learned attention sinks; sliding layers are left alone",
        {
            "head_dim": 16, "sliding_window": 12, "layer_types": SLIDING, "num_local_experts": 4,
            "num_experts_per_tok": 2, "intermediate_size": 32,
        },
    ),
}  # fmt: skip


def tiny_family(
    name: str, *, vocab: int = 40, dtype: torch.dtype = torch.float64, seed: int = 0, attention: str = "vkvtrain",
    **extra: Any,
) -> Any:  # fmt: skip
    """A random model of two layers, four query and two KV heads of dimension 16."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    make: Callable[..., Any] = family.config
    config = make(**{**common, **family.settings, **extra}, attn_implementation=attention)
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    model = family.model(config).to(dtype).eval()
    with torch.no_grad():
        for label, weight in model.named_parameters():  # larger weights: attention that prefers something
            if weight.dim() == 2 and "embed" not in label:
                weight.mul_(4)
            if label.endswith("sinks"):
                weight.copy_(torch.linspace(-1, 2, len(weight)))
    return model
