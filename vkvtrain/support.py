"""Which layers of a model can evict, and whether its attention is ours. Knows configurations, not modules."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerKind:
    """What becomes of a layer's entries."""

    evicts: bool
    sliding_window: int | None = None
    """Newest tokens that a query sees, itself included, in a layer that bounds itself; it is left alone."""


_REASONS = {
    "chunked_attention": "chunks forget by position, not by choice",
    "linear_attention": "a linear layer keeps a state of fixed size and no entries",
    "mamba": "a state-space layer keeps a state of fixed size and no entries",
    "conv": "a convolution keeps a state of fixed size and no entries",
}


def layer_kinds(model_config: Any, config: EvictionConfig) -> list[LayerKind]:
    """For each layer of a (text) model, what becomes of its entries under `config`.

    Full-attention layers evict unless `skip_layers` names them; sliding-window layers keep their own window.

    Raises:
        ValueError: a model that cannot evict (latent, linear or chunked attention, layers that share a cache, no layer
            with full attention), by name; or `skip_layers` that names a layer that is not there.
    """
    text = model_config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{text.model_type} is an encoder-decoder: only decoder-only models are supported")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type}: multi-head latent attention (kv_lora_rank) caches no keys and values per head, "
            "so there is nothing to evict; use a model with grouped-query or multi-head attention"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{text.model_type}: {text.num_kv_shared_layers} layers share another layer's cache "
            "(num_kv_shared_layers), which would have to please several layers' queries; this is not supported"
        )
    window = getattr(text, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types: Sequence[str] = getattr(text, "layer_types", None) or [default] * layers
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    if other:
        where = [index for index, kind in enumerate(types) if kind in other]
        reason = next((f" ({why})" for name, why in _REASONS.items() if other[0].startswith(name)), "")
        raise ValueError(
            f"{text.model_type}: layers {_ranges(where)} are {' and '.join(other)}{reason}; only full_attention and "
            "sliding_attention layers are supported, use a model without them"
        )
    if "full_attention" not in types and config.evicts:
        raise ValueError(
            f"{text.model_type}: every layer has a sliding window of {window} tokens, so there is nothing to evict; "
            "policy 'full' leaves them alone"
        )
    beyond = [layer for layer in config.skip_layers if layer >= layers]
    if beyond:
        raise ValueError(f"skip_layers names layer {beyond[0]}, but the model has layers 0 to {layers - 1}")
    return [
        LayerKind(False, window)
        if kind == "sliding_attention"
        else LayerKind(config.evicts and layer not in config.skip_layers)
        for layer, kind in enumerate(types)
    ]


def _ranges(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:6])
    return shown + (f", ... ({len(indices)} layers)" if len(indices) > 6 else "")
