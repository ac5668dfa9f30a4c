"""The attention function and mask function that `attn_implementation="vkvtrain"` names.

Plain SDPA when neither a simulation nor an `EvictionCache` is in play. A simulation is found from the module; a cache
layer from the key tensor that its `update` returned: an attribute on that tensor needs no hook on the model, works
through wrappers, and cannot outlive the call.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from vkvtrain.attention.simulation import Trace, simulation_of, simulation_of_config
from vkvtrain.cache import RowLayer, layer_of, mask_is_made, refuse_dropped_cache
from vkvtrain.logits import LayerInputs, LogitForm, attend
from vkvtrain.precision import attention_dtype, outside_autocast
from vkvtrain.support import ATTENTION


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
        kwargs: by model `softcap` (Gemma 2), `s_aux` (gpt-oss's sinks), `sliding_window`, `is_causal`.

    Returns:
        ([B, Q, Hq, D], None).
    """
    simulation, layer = simulation_of(module), layer_of(key)
    if layer is None and not torch.compiler.is_compiling():
        refuse_dropped_cache()
    if simulation is None and attention_mask is not None and attention_mask.dim() == 2:
        raise ValueError(
            f"a two-dimensional attention mask reached a {type(module).__name__} that is in no simulation: inside a "
            "simulated_eviction block the model's configuration object stands for the model, so give another model a "
            "configuration of its own (copy.deepcopy(model.config)), and make copies of the model outside the block"
        )
    dtype = attention_dtype(value) if layer is None else key.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = LogitForm(factor, kwargs.get("softcap"), kwargs.get("s_aux"))
    inputs = LayerInputs(query, key, value, form)
    if simulation is None and layer is None:
        if form.softcap is None and form.sinks is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        _refuse_dropout(dropout, "an attention with a soft cap or sinks")
        is_causal = attention_mask is None and query.shape[2] > 1
        with outside_autocast(query.device):
            return attend(inputs, attention_mask, is_causal).transpose(1, 2), None
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} passes 'position_bias' to its attention, which eviction does not support"
        )
    if simulation is not None and layer is not None:
        raise ValueError("simulated_eviction and EvictionCache exclude each other: use the cache outside the block")
    if layer is not None:
        _refuse_dropout(dropout, "EvictionCache")
        with outside_autocast(query.device):
            if isinstance(layer, RowLayer):
                return _decode(layer, inputs, attention_mask, kwargs.get("position_ids")), None
            # a static view's layer is compiled with the model
            return type(layer).attend(layer, inputs, attention_mask), None
    assert simulation is not None
    _refuse_dropout(dropout, "a simulation")
    index: Any = module.layer_idx
    with outside_autocast(query.device):
        return _simulate(simulation, index, inputs, attention_mask), None


def _uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which `torch.compile` leaves alone: events are Python's, as guards they would change every step."""
    outside: Any = torch.compiler.disable(function)
    return outside


@_uncompiled
def _decode(layer: RowLayer, inputs: LayerInputs, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    layer.check(inputs.query, mask, positions)
    return layer.attend(inputs, mask)


@_uncompiled
def _simulate(simulation: Trace, layer: int, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
    return simulation.attend(layer, inputs, mask)


def _refuse_dropout(dropout: float, where: str) -> None:
    if dropout:
        raise ValueError(f"attention dropout is {dropout} in {where}: set attention_dropout=0 in the model's config")


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What `sdpa_mask` makes; in a simulation the two-dimensional mask itself, never one of S^2 elements.

    None, plain causality, is right for every model that shares the configuration; any other mask has to be seen.

    Raises:
        ValueError: in a simulation, a mask that two dimensions cannot say: custom patterns, or documents that the
            simulation was not told of.
    """
    if not torch.compiler.is_compiling():
        mask_is_made()
    config = kwargs.get("config")
    simulation = None if config is None else simulation_of_config(config)
    if simulation is None:
        return sdpa_mask(*args, **kwargs)
    function, mask = kwargs.get("mask_function", causal_mask_function), kwargs.get("attention_mask")
    if not _is_known(function, simulation.is_packed):
        raise ValueError(
            "simulated_eviction takes right-padded rows: name the documents of packed sequences by documents=, and "
            "pass a two-dimensional attention_mask instead of custom mask patterns"
        )
    if mask is None and function is not causal_mask_function:
        return simulation.unpadded_mask(kwargs["batch_size"], kwargs["q_length"], kwargs["device"])
    return mask


_SLIDING = sliding_window_overlay(1).__qualname__
_PACKED = packed_sequence_mask_function(torch.zeros(0)).__qualname__
_REMAPPED = "remap_positions_for_packed_sequence."
"""Newer transformers wrap what is to be evaluated within documents."""


def _is_known(function: Callable[..., Any], is_packed: bool) -> bool:
    """Whether a mask function is made of nothing but causality, a sliding window and, if told so, packed documents."""
    if function is causal_mask_function:
        return True
    inner = inspect.getclosurevars(function).nonlocals
    name = function.__qualname__
    if name.startswith("and_masks."):
        return all(_is_known(conjunct, is_packed) for conjunct in inner["mask_functions"])
    if name.startswith(_REMAPPED):
        return is_packed and _is_known(inner["mask_function"], is_packed)
    return name == _SLIDING or (is_packed and name == _PACKED)


def register() -> None:
    """Make the implementation known to transformers; without a mask function the mask would silently be None."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, attention_mask)


__all__ = ["attention_forward", "attention_mask", "register"]
