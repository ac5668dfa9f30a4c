"""Decoding: a `transformers` cache that evicts. Knows nothing of training.

Attention modules call `update`, then the attention function; the key tensor that `update` returns carries its cache
layer (`layer_of`), so the attention function can hand the layer the query, the mask and the logits' form without a hook
on the model.
"""

from vkvtrain.cache.base import RowLayer, layer_of
from vkvtrain.cache.eviction_cache import EvictionCache
from vkvtrain.cache.expected import mask_is_made, refuse_dropped_cache
from vkvtrain.cache.layer import EvictionLayer
from vkvtrain.cache.sliding import SlidingLayer
from vkvtrain.cache.static import StaticView, grows

__all__ = [
    "EvictionCache",
    "EvictionLayer",
    "RowLayer",
    "SlidingLayer",
    "StaticView",
    "grows",
    "layer_of",
    "mask_is_made",
    "refuse_dropped_cache",
]
