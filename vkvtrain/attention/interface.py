"""The attention function and mask function that `attn_implementation="vkvtrain"` names.

Plain SDPA when neither a simulation nor an `EvictionCache` is in play. A simulation is found from the module; a cache
layer from the key tensor that its `update` returned: an attribute on that tensor needs no hook on the model, works
through wrappers, and cannot outlive the call.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vkvtrain.attention.simulation import simulation_of, simulation_of_config
from vkvtrain.cache import layer_of
from vkvtrain.support import ATTENTION

_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' attention interface calls it.

    Args:
        module: the attention module.
        query: [B, Hq, Q, D].
        key, value: [B, Hkv, K, D], as the cache's `update` returned them if there is a cache.
        attention_mask: bool [B, 1, Q, K] or None; [B, S] in a simulation.
        dropout: attention dropout; must be 0 in a simulation.
        scaling: factor of the logits, default D ** -0.5.

    Returns:
        ([B, Q, Hq, D], None).
    """
    simulation, layer = simulation_of(module), layer_of(key)
    if simulation is None and layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention, which eviction does not support"
            )
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if simulation is not None and layer is not None:
        raise ValueError("simulated_eviction and EvictionCache exclude each other: use the cache outside the block")
    if layer is not None:
        return layer.attend(module, query, key, value, attention_mask, factor, dropout), None
    assert simulation is not None
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout} in a simulation: set attention_dropout=0 in the model's config"
        )
    index: Any = module.layer_idx
    return simulation.attend(index, query, key, value, attention_mask, factor), None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What `sdpa_mask` makes; in a simulation the two-dimensional mask itself, never one of S^2 elements.

    Raises:
        ValueError: in a simulation, a mask that two dimensions cannot say (packed documents, custom patterns).
    """
    config = kwargs.get("config")
    if config is None or simulation_of_config(config) is None:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError(
            "simulated_eviction takes one right-padded sequence a row: packed sequences and custom mask patterns are "
            "not supported, pass a two-dimensional attention_mask"
        )
    return kwargs.get("attention_mask")


def register() -> None:
    """Make the implementation known to transformers; without a mask function the mask would silently be None."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, attention_mask)


__all__ = ["attention_forward", "attention_mask", "register"]
