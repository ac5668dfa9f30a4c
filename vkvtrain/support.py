"""Which layers of a model can evict, and whether its attention is ours. Knows configurations, not modules."""

from collections.abc import Sequence
from typing import Any

from vkvtrain.config import EvictionConfig

ATTENTION = "vkvtrain"
"""Name of the attention implementation that importing `vkvtrain` registers."""


def check_attention(model_config: Any, who: str) -> None:
    """Raise ValueError unless the model's attention implementation is ours."""
    implementation = model_config._attn_implementation
    if implementation != ATTENTION:
        raise ValueError(
            f"{who} needs attn_implementation={ATTENTION!r}, but the model's is {implementation!r}: load it "
            f"with from_pretrained(..., attn_implementation={ATTENTION!r}), or call "
            f"model.set_attn_implementation({ATTENTION!r})"
        )


def evicting_layers(model_config: Any, config: EvictionConfig) -> list[bool]:
    """For each layer of a (text) model, whether it evicts under `config`.

    Raises:
        ValueError: a model whose layers cannot evict (sliding-window, linear or latent attention), by name; or
            `skip_layers` that names a layer that is not there.
    """
    text = model_config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type}: multi-head latent attention (kv_lora_rank) caches no keys and values per head, "
            "so there is nothing to evict; use a model with grouped-query or multi-head attention"
        )
    kind = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    types: Sequence[str] = getattr(text, "layer_types", None) or [kind] * layers
    other = sorted(set(types) - {"full_attention"})
    if other:
        where = [index for index, kind in enumerate(types) if kind != "full_attention"]
        raise ValueError(
            f"{text.model_type}: layers {_ranges(where)} are {' and '.join(other)}; only full_attention layers "
            "are supported, use a model without them"
        )
    beyond = [layer for layer in config.skip_layers if layer >= layers]
    if beyond:
        raise ValueError(f"skip_layers names layer {beyond[0]}, but the model has layers 0 to {layers - 1}")
    return [config.evicts and layer not in config.skip_layers for layer in range(layers)]


def _ranges(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:6])
    return shown + (f", ... ({len(indices)} layers)" if len(indices) > 6 else "")
