"""A decode step of fixed shapes over storage that never moves, for `torch.compile` and CUDA graphs.

`EvictionCache` counts in Python, which a compiled forward would have to guard at every step. Here where a token goes
and what it sees follow from counters on the device, so all steps are one graph; what happens every `window` tokens, the
events, stays outside of it and is the cache's own.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from vkvtrain.cache.base import RowLayer, carry, in_one_dtype
from vkvtrain.cache.eviction_cache import EvictionCache
from vkvtrain.cache.layer import EvictionLayer
from vkvtrain.cache.sliding import SlidingLayer
from vkvtrain.cache.storage import Storage
from vkvtrain.logits import LayerInputs, attend
from vkvtrain.support import LayerKind


def grows(kinds: Sequence[LayerKind]) -> bool:
    """Whether a layer keeps everything, so that its storage has to grow."""
    return any(not kind.evicts and kind.sliding_window is None for kind in kinds)


class StaticView(Cache):
    """What the forward of one token a row is given in the place of an `EvictionCache`, whose storage it shares.

    A step is the forward with `position_ids=cache.positions`, `advance` (both may be compiled), then `finish`.

    Args:
        cache: a cache whose prompts are attended, every layer bounded.
        capacity: entries of each layer, for good: no row may come to hold more, its prompt and a window included.
    """

    def __init__(self, cache: EvictionCache, capacity: int) -> None:
        assert not grows(cache.kinds)
        self.source = cache
        evicting, sliding = cache.evicting_layers, cache.sliding_layers
        for layer in evicting:
            layer.fix_capacity(capacity)
        self.seen = _counter(evicting[0], evicting[0].counters.seen)
        """Tokens that each row has given to the cache, int64 [rows]."""
        self.live = _counter(evicting[0], evicting[0].counters.live)
        """Entries that its evicting layers hold, int64 [rows]."""
        self.ring = {layer.window: _counter(layer, layer.counters.seen) for layer in sliding}
        """Tokens by which the rings of each window are turned, int64 [rows]."""
        layers = [self._make_layer(layer) for layer in cache.row_layers]
        super().__init__(layers=[*layers])
        self._layers = layers

    def _make_layer(self, source: RowLayer) -> "_StaticLayer":
        if isinstance(source, SlidingLayer):
            return StaticSlidingLayer(source, self.ring[source.window])
        assert isinstance(source, EvictionLayer)
        return StaticEvictionLayer(source, self.live)

    @property
    def positions(self) -> Tensor:
        """Position ids of the step's tokens, int64 [rows, 1]."""
        return self.seen[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._layers[layer_idx].update(key_states, value_states)

    def advance(self) -> None:
        """Count the step on the device."""
        for counter in (self.seen, self.live, *self.ring.values()):
            counter += 1

    def finish(self) -> None:
        """Count the step in the cache; then the events that are due."""
        if self.source.finish_step():
            self._count_again()

    def replace_row(self, row: int, other: EvictionCache) -> None:
        """Put the first row of another cache in the place of `row`."""
        self.source.replace_row(row, other)
        self._count_again()

    def _count_again(self) -> None:
        counters = self.source.evicting_layers[0].counters
        self.seen.copy_(torch.tensor(counters.seen))
        self.live.copy_(torch.tensor(counters.live))
        for layer in self.source.sliding_layers:
            self.ring[layer.window].copy_(torch.tensor(layer.counters.seen))


def _counter(layer: RowLayer, counts: Sequence[int]) -> Tensor:
    """Counts of rows, on the layer's device, at an address that CUDA graphs may rely on."""
    counter = torch.tensor(counts, device=layer.storage.keys.device)
    torch._dynamo.mark_static_address(counter)
    return counter


class _StaticLayer(CacheLayerMixin):
    """What is given one token a row; it must not be given more."""

    is_compileable = True
    is_croppable = False

    keys: Tensor
    values: Tensor

    def __init__(self, storage: Storage) -> None:
        self.keys, self.values = storage.keys, storage.values
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is the source's."""

    def get_seq_length(self) -> int:
        """Not known here, and not asked for: the step's positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @abstractmethod
    def place(self) -> Tensor:
        """Slot that each row's token takes, int64 [rows]."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states, value_states = in_one_dtype(key_states, value_states, self.keys)
        slot = self.place().to(key_states.device)[:, None, None, None]
        self.keys.scatter_(2, slot.expand(key_states.shape), key_states)
        self.values.scatter_(2, slot.expand(value_states.shape), value_states)
        return carry(self.keys.view(self.keys.shape), self), self.values

    @abstractmethod
    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        """Attention output [rows, 1, Hq, D]; arguments as for `RowLayer.attend`, whose mask says nothing here."""


class StaticEvictionLayer(_StaticLayer):
    """A layer that evicts, its newest token in slot `live`."""

    is_sliding = False

    def __init__(self, source: EvictionLayer, live: Tensor) -> None:
        super().__init__(source.storage)
        self.live, self.queries = live, source.storage.queries
        if self.queries.shape[2]:
            torch._dynamo.mark_static_address(self.queries)

    def place(self) -> Tensor:
        return self.live

    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        query = inputs.query
        newest = self.live.to(query.device)[:, None, None, None]
        visible = torch.arange(inputs.key.shape[2], device=query.device) <= newest
        out = attend(inputs, visible)
        if self.queries.shape[2]:
            place = newest % self.queries.shape[2]
            self.queries.scatter_(2, place.expand(query.shape), query.to(self.queries.dtype))
        return out.transpose(1, 2)


class StaticSlidingLayer(_StaticLayer):
    """A layer with a sliding window of its own: the newest token in slot `turned % window`."""

    is_sliding = True

    def __init__(self, source: SlidingLayer, turned: Tensor) -> None:
        super().__init__(source.storage)
        self.turned, self.window = turned, source.window

    def place(self) -> Tensor:
        return self.turned % self.window

    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        device = inputs.query.device
        newest = self.turned.to(device)[:, None, None, None]
        visible = torch.arange(self.window, device=device) <= newest
        return attend(inputs, visible).transpose(1, 2)
