"""The cache that `generate` is given."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.expected import expect
from vkvtrain.cache.layer import EvictionLayer, evict
from vkvtrain.cache.sliding import SlidingLayer
from vkvtrain.cache.step import Step
from vkvtrain.config import EvictionConfig
from vkvtrain.noise import Stream, stream_key
from vkvtrain.precision import outside_autocast
from vkvtrain.rope import check_rope
from vkvtrain.support import LayerKind, check_attention, layer_kinds


class EvictionCache(Cache):
    """A KV cache bounded by an eviction policy, for `model.generate(..., past_key_values=cache)`.

    Rows are left-padded and independent of each other. Passing the cache again continues its sequences; `reset` starts
    afresh. Greedy and sampling work, also with `num_return_sequences`; beam search, assisted decoding, chunked prefill
    and cropping are refused. A prompt for a used cache that has not the cache's tokens before it is refused where it is
    no longer than these; of a longer one only its positions can be compared, since no tokens are held.

    Args:
        config: the eviction setting.
        model_config: `model.config` of a model loaded with `attn_implementation="vkvtrain"`.
        streams: what names each prompt's randomness, ints or tuples of ints; default 0, 1, ... With k sequences per
            prompt row r draws from `(streams[r // k], r % k)`.

    Raises:
        ValueError: a model that cannot evict, whose attention is another one, or whose rotary frequencies depend on
            the longest row of a batch (`fixed_rope`).
    """

    def __init__(self, config: EvictionConfig, model_config: Any, streams: Sequence[Stream] | None = None) -> None:
        check_attention(model_config.get_text_config(decoder=True), "EvictionCache")
        check_rope(model_config)
        self.kinds = layer_kinds(model_config, config)
        self._shared = Shared(config, _checked_streams(config, streams), len(self.kinds))
        super().__init__(layers=[self._make_layer(index, kind) for index, kind in enumerate(self.kinds)])
        self.config = config

    def _make_layer(self, index: int, kind: LayerKind) -> RowLayer:
        if kind.sliding_window is not None:
            return SlidingLayer(self._shared, index, kind.sliding_window)
        return EvictionLayer(self._shared, index, kind.evicts)

    @torch.compiler.disable  # counters and events are Python's: compiled, they would be guards that change every step
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        awaiting = self._shared.awaiting
        if awaiting is not None:
            raise ValueError(
                f"layer {awaiting} was given tokens but its attention did not go through vkvtrain: call "
                'model.set_attn_implementation("vkvtrain"), then cache.reset()'
            )
        self._shared.awaiting = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding columns included. Whoever asks is taken to go on from there: see `RowLayer.check`."""
        self._shared.is_resumed = True
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same, as mask functions ask for it in every forward."""
        return super().get_seq_length(layer_idx)

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(width, offset) of the masks that transformers makes; a forward asks before its layers run."""
        if query_length == 0:
            raise ValueError(
                f"this EvictionCache has seen {super().get_seq_length(layer_idx)} tokens, and the prompt has no "
                "more than these: a used cache is continued by the whole sequence so far and more; for another prompt "
                "call cache.reset(), or make a new one"
            )
        expect(self)
        return super().get_mask_sizes(query_length, layer_idx)

    def positions(self, layer: int, row: int) -> Tensor:
        """Logical positions that a layer holds of a row, int64 [Hkv, n], ascending.

        Raises:
            ValueError: an empty cache, or a layer with a sliding window of its own.
        """
        held = self.layers[layer]
        if not isinstance(held, EvictionLayer):
            raise ValueError(f"layer {layer} keeps its own sliding window and evicts nothing: ask for another layer")
        return held.storage.entry_positions[row, :, : held.counters.live[row]].clone()

    def stats(self) -> list[dict[str, int]]:
        """Of each row: evictions, entries held and most ever held per KV head of an evicting layer, and their bytes.

        Bytes are of all layers, each row's own tokens alone; sliding-window layers count what their window holds.
        """
        layers = self.row_layers
        first = max(layers, key=lambda layer: (layer.evicts, isinstance(layer, EvictionLayer)))
        rows = []
        for row in range(len(first.counters.seen)):
            held, peak = zip(*(layer.held_bytes(row) for layer in layers), strict=True)
            entries, most = (count // first.storage.entry_bytes for count in first.held_bytes(row))
            rows.append(
                {
                    "evictions": first.counters.events[row],
                    "live_entries": entries,
                    "peak_entries": most,
                    "bytes": sum(held),
                    "peak_bytes": sum(peak),
                }
            )
        return rows

    @property
    def allocated_bytes(self) -> int:
        """Bytes of key and value storage, all rows and layers."""
        storages = [layer.storage for layer in self.row_layers if layer.is_initialized]
        held = [tensor for storage in storages for tensor in (storage.keys, storage.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def reset(self, streams: Sequence[Stream] | None = None) -> None:
        """Forget the sequences; `streams` names the next ones (default: the same as before)."""
        for layer in self.row_layers:
            layer.reset()
        self._shared.forget()
        if streams is not None:
            self._shared.streams = _checked_streams(self.config, streams)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("EvictionCache cannot be cropped: evicted entries are gone (assisted decoding needs cropping)")

    @property
    def max_cache_len(self) -> NoReturn:
        """What PEFT asks for before it puts the entries of a prefix into another cache in the place of this one."""
        raise ValueError("prefix tuning does not work with EvictionCache: its entries were written by no token")

    def activate_past_recording(self) -> NoReturn:
        raise ValueError("assisted decoding does not work with EvictionCache: generate without an assistant")

    @property
    def row_layers(self) -> list[RowLayer]:
        """All layers."""
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]

    @property
    def evicting_layers(self) -> list[EvictionLayer]:
        """The layers that evict; they all count alike."""
        return [layer for layer in self.layers if isinstance(layer, EvictionLayer) and layer.evicts]

    @property
    def sliding_layers(self) -> list[SlidingLayer]:
        """The layers with a sliding window of their own."""
        return [layer for layer in self.layers if isinstance(layer, SlidingLayer)]

    def finish_step(self) -> bool:
        """Count one token a row that was stored and attended from outside, with the events due; whether one was."""
        evicting = self.evicting_layers
        step = self._step(evicting[0])
        for layer in self.row_layers:
            layer.finish(step if layer.evicts else self._step(layer))
        with outside_autocast(step.device):
            evict(evicting, step)
        return bool(step.due)

    def _step(self, layer: RowLayer) -> Step:
        return self._shared.step(layer.counters, 1, layer.storage.keys.device, layer.evicts)

    # Rows that come and go, for continuous batching

    @classmethod
    def join(cls, caches: "Sequence[EvictionCache]", model_config: Any) -> "EvictionCache":
        """A cache with the rows of several, which must not be used afterwards.

        Args:
            caches: of one eviction setting; every row keeps its own stream.
            model_config: the model's configuration.
        """
        joined = cls(caches[0].config, model_config)
        for layer, *sources in zip(joined.row_layers, *(cache.row_layers for cache in caches), strict=True):
            layer.join(sources)
        return joined

    def replace_row(self, row: int, other: "EvictionCache") -> None:
        """Put the first row of another cache in the place of `row`."""
        for layer, source in zip(self.row_layers, other.row_layers, strict=True):
            layer.replace_row(row, source)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        for layer in self.row_layers:
            layer.keep_rows(rows)


def _checked_streams(config: EvictionConfig, streams: Sequence[Stream] | None) -> list[Stream] | None:
    if streams is None:
        return None
    if not len(streams):
        raise ValueError("streams is empty: give one stream for each prompt, or None")
    for stream in streams:
        stream_key(config.seed, stream)
    return list(streams)
