"""Decoding: a `transformers` cache that evicts.

`model.generate(..., past_key_values=EvictionCache(config, model.config))`. Attention modules call `update`, then the
attention function; the key tensor that `update` returns carries its cache layer (`layer_of`), so the attention function
can hand the layer the query, the mask and the scaling without a hook on the model. Knows nothing of training.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from vkvtrain.config import EvictionConfig
from vkvtrain.events import is_due
from vkvtrain.logits import LogitForm, attend, attention_mass
from vkvtrain.noise import NoiseSource, Stream, stream_key
from vkvtrain.policies import Candidates
from vkvtrain.selection import Selector
from vkvtrain.support import LayerKind, check_attention, layer_kinds

_LAYER = "_vkvtrain_cache_layer"
_GROWTH = 256
"""Entries by which the storage of a layer that keeps everything grows."""


def layer_of(key: Tensor) -> "EvictionLayer | None":
    """The cache layer that returned this key tensor from `update`, if any."""
    return getattr(key, _LAYER, None)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are computed in: float32, float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Shared:
    """What the layers of a cache have in common. Holds no tensors of a sequence and no layers."""

    def __init__(self, config: EvictionConfig, streams: Sequence[Stream] | None) -> None:
        self.config = config
        self.selector = Selector(config) if config.evicts else None
        self.streams = None if streams is None else list(streams)
        self.awaiting: int | None = None
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._lengths: tuple[Tensor, list[int]] | None = None

    def index(self, values: Sequence[int], device: torch.device) -> Tensor:
        """Python ints as an int64 tensor; the layers of a step ask for the same ones, which are copied once."""
        wanted = (tuple(values), device)
        if wanted not in self._index:
            if len(self._index) >= 64:
                self._index.clear()
            self._index[wanted] = torch.tensor(wanted[0], dtype=torch.int64, device=device)
        return self._index[wanted]

    def row_lengths(self, mask: Tensor | None, rows: int, width: int) -> list[int]:
        """Tokens of each left-padded row of a prompt, from the last query row of its mask; one transfer a prompt."""
        if mask is None:
            return [width] * rows
        if self._lengths is None or self._lengths[0] is not mask:
            seen = mask[:, 0, -1, -width:].bool()
            if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
                raise ValueError("EvictionCache needs left-padded prompts: set the tokenizer's padding_side to 'left'")
            lengths = seen.sum(-1).expand(rows).tolist()
            if 0 in lengths:
                raise ValueError(f"row {lengths.index(0)} of the prompt is all padding: give every row a token")
            self._lengths = (mask, lengths)
        return self._lengths[1]

    def keys(self, rows: int) -> list[tuple[int, int]]:
        """The Philox key of each row; several rows per stream are repeats of it."""
        streams = range(rows) if self.streams is None else self.streams
        if rows % len(streams):
            raise ValueError(
                f"streams has {len(streams)} entries for a batch of {rows} rows: give one stream for each prompt"
            )
        repeats = rows // len(streams)
        named = [stream if repeats == 1 else (stream, repeat) for stream in streams for repeat in range(repeats)]
        return [stream_key(self.config.seed, stream) for stream in named]


class EvictionLayer(CacheLayerMixin):
    """One layer's entries: storage [rows, Hkv, capacity, D], each row's entries in the first `live[row]` slots.

    All counters are Python ints that are known without asking the device.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, shared: _Shared, index: int, evicts: bool) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.selector = shared.selector if evicts else None
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.keys = self.values = self.entry_positions = self.queries = self.mass = None
        self.is_initialized = False
        self.columns = 0
        self.prompts: list[int] = []
        self.seen: list[int] = []
        self.live: list[int] = []
        self.peak: list[int] = []
        self.events: list[int] = []
        self.decoded = False

    # What transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made when the prompt has been attended, because only its mask tells the rows' lengths."""

    def get_seq_length(self) -> int:
        """Tokens seen, padding columns included (not entries held)."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(width, offset) of the masks that transformers makes: of the new tokens among themselves.

        Which entries a query sees is known here, so the mask has only to tell padding.
        """
        return query_length, self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values [rows, Hkv, q, D]; returns what they attend to."""
        rows, _, new, _ = key_states.shape
        if new == 0:
            raise ValueError("EvictionCache was given no tokens: pass at least one")
        if not self.is_initialized:
            keys, values = key_states.view(key_states.shape), value_states
        else:
            if rows != len(self.live):
                raise ValueError(
                    f"this EvictionCache holds {len(self.live)} rows and was given {rows}: make a new cache, or call "
                    "cache.reset(streams=...) to start afresh"
                )
            if new > 1 and not self.decoded:
                raise ValueError(
                    "EvictionCache was given a second chunk before any token was decoded: pass the whole prompt at "
                    "once (prefill_chunk_size is not supported)"
                )
            keys, values = self._append(key_states, value_states)
        setattr(keys, _LAYER, self)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise ValueError("beam search does not work with EvictionCache: use num_beams=1")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError("EvictionCache cannot be cropped: evicted entries are gone (assisted decoding needs cropping)")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise ValueError("EvictionCache cannot repeat its rows: use num_return_sequences, or repeat the prompts")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise ValueError("EvictionCache cannot select rows: make a new cache for other rows")

    # What the attention function asks of a layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        """Attention output [rows, q, Hq, D] of the tokens just given to `update`; then the events that are due.

        Args:
            query: [rows, Hq, q, D].
            key, value: what `update` returned, [rows, Hkv, entries, D].
            mask: of the new tokens among themselves, bool [rows, 1, q, q], or None without padding.
            form: scaling, soft cap and sinks of the attention.
        """
        new = query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(query, key, value, form, mask, is_causal=mask is None)
            self._take_prompt(query, key, value, mask, form)
            return out.transpose(1, 2)
        if mask is not None and not bool(mask[:, 0, -1, -new:].all()):
            raise ValueError("padding among tokens that continue a sequence: continue rows with equally many tokens")
        entries = key.shape[2]
        before = [live - new for live in self.live]
        if new == 1 and min(self.live) == entries:
            visible = None
        else:
            slots = torch.arange(entries, device=key.device)
            last = self.shared.index(before, key.device)[:, None, None, None]
            visible = slots <= last + torch.arange(new, device=key.device)[:, None]
        out = attend(query, key, value, form, visible)
        if new > 1:
            self._add_mass_of_chunk(query, [new] * len(self.live), form)
        self._remember(query, [0] * len(self.live))
        if new == 1:
            self.decoded = True
            self._evict(form)
        return out.transpose(1, 2)

    # Storage

    def _take_prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> None:
        rows, heads, width, _ = key.shape
        device = key.device
        lengths = self.shared.row_lengths(mask, rows, width)
        self.prompts, self.live, self.peak, self.seen = list(lengths), list(lengths), list(lengths), list(lengths)
        self.events = [0] * rows
        self.columns = width
        self.philox = torch.tensor(self.shared.keys(rows), dtype=torch.int64, device=device)
        config = self.shared.config
        capacity = max(lengths) + _GROWTH
        if self.selector is not None:
            assert config.budget is not None
            capacity = max(config.budget, max(lengths)) + config.window
        self.keys = key.new_zeros(rows, heads, capacity, key.shape[-1])
        self.values = value.new_zeros(rows, heads, capacity, value.shape[-1])
        self.entry_positions = torch.arange(capacity, device=device).expand(rows, heads, -1).clone()
        for row, length in enumerate(lengths):
            self.keys[row, :, :length] = key[row, :, width - length :]
            self.values[row, :, :length] = value[row, :, width - length :]
        if self.selector is not None and (self.selector.needs_queries or self.selector.needs_mass):
            self.queries = query.new_zeros(rows, query.shape[1], config.window, query.shape[-1])
            if self.selector.needs_mass:
                self.mass = key.new_zeros(rows, heads, capacity, dtype=score_dtype(key.dtype))
                self._add_mass_of_chunk(query, lengths, form)
            self._remember(query, [width - length for length in lengths])
        self.is_initialized = True

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows, _, new, _ = key.shape
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        needed = max(self.live) + new
        if needed > self.keys.shape[2]:
            self._resize(needed + (_GROWTH if self.selector is None else self.shared.config.window))
        device = key.device
        row = self.shared.index(range(rows), device)[:, None]
        offset = torch.arange(new, device=device)
        slot = self.shared.index(self.live, device)[:, None] + offset
        self.keys[row, :, slot] = key.transpose(1, 2)
        self.values[row, :, slot] = value.transpose(1, 2)
        self.entry_positions[row, :, slot] = (self.shared.index(self.seen, device)[:, None] + offset)[:, :, None]
        self.live = [live + new for live in self.live]
        self.seen = [seen + new for seen in self.seen]
        self.peak = [max(peak, live) for peak, live in zip(self.peak, self.live, strict=True)]
        self.columns += new
        return self.keys[:, :, :needed], self.values[:, :, :needed]

    def _resize(self, capacity: int) -> None:
        held = min(capacity, max(self.live))
        for name in ("keys", "values", "entry_positions", "mass"):
            old = getattr(self, name)
            if old is None:
                continue
            fresh = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            fresh[:, :, :held] = old[:, :, :held]
            setattr(self, name, fresh)

    def _remember(self, query: Tensor, padding: Sequence[int]) -> None:
        """Keep the newest `window` queries of each row, token `i` at place `i % window`."""
        if self.queries is None:
            return
        window, width = self.queries.shape[2], query.shape[2]
        for new, rows in _group([min(width - pad, window) for pad in padding]).items():
            row = self.shared.index(rows, query.device)[:, None]
            newest = torch.arange(-new, 0, device=query.device)
            place = (self.shared.index([self.seen[r] for r in rows], query.device)[:, None] + newest) % window
            self.queries[row, :, place] = query[row, :, width + newest].to(self.queries.dtype)

    def _window_queries(self, rows: Sequence[int]) -> Tensor:
        """The newest `window` queries of some rows in chronological order, [N, Hq, R, D], in the scores' dtype."""
        assert self.queries is not None
        window, device = self.queries.shape[2], self.queries.device
        order = [[(self.seen[r] + i) % window for i in range(window)] for r in rows]
        places = torch.stack([self.shared.index(places, device) for places in order])
        queries = self.queries[self.shared.index(rows, device)[:, None], :, places].transpose(1, 2)
        return queries.to(score_dtype(queries.dtype)).contiguous()

    # Accumulated attention, in blocks of `window` entries: the queries of a block are in the ring when it is full

    def _add_mass(self, rows: list[int], live: int, form: LogitForm) -> None:
        """Add what the newest block's queries attend to, in rows that all hold `live` entries."""
        assert self.mass is not None
        assert self.keys is not None
        row = self.shared.index(rows, self.keys.device)
        self.mass[row, :, :live] += attention_mass(
            self._window_queries(rows), self.keys[row, :, :live].to(self.mass.dtype), form
        )

    def _add_mass_of_chunk(self, query: Tensor, lengths: Sequence[int], form: LogitForm) -> None:
        """The same for all blocks that end in a prompt or a chunk; call before `_remember` and after storing it.

        Args:
            query: [rows, Hq, q, D], padding on the left.
            lengths: tokens of the chunk in each row, padding excluded.
        """
        if self.mass is None:
            return
        assert self.keys is not None
        window, dtype = self.shared.config.window, self.mass.dtype
        for row, (length, live) in enumerate(zip(lengths, self.live, strict=True)):
            pending = (live - length) % window
            queries = query[row, :, query.shape[2] - length :].to(dtype)
            if pending:
                self.seen[row] -= length  # the ring still ends before the chunk
                queries = torch.cat([self._window_queries([row])[0, :, window - pending :], queries], dim=1)
                self.seen[row] += length
            start = live - length - pending
            for end in range(start + window, live + 1, window):
                block = queries[:, end - window - start : end - start]
                keys = self.keys[row, :, :end].to(dtype)
                self.mass[row, :, :end] += attention_mass(block[None], keys[None], form)[0]

    # Eviction

    def _evict(self, form: LogitForm) -> None:
        if self.selector is None:
            return
        config = self.shared.config
        assert config.budget is not None
        if self.mass is not None:
            for live, rows in _group([0 if live % config.window else live for live in self.live]).items():
                if live:
                    self._add_mass(rows, live, form)
        due = [live if is_due(live, config.budget, config.window) else 0 for live in self.live]
        for live, rows in _group(due).items():
            if live:
                self._evict_rows(rows, live, form)
        limit = config.budget + config.window
        if any(due) and max(self.live) <= limit and self.keys is not None and self.keys.shape[2] > limit:
            self._resize(limit)  # a prompt longer than the budget needed more

    def _evict_rows(self, rows: list[int], live: int, form: LogitForm) -> None:
        """One event in rows that all hold `live` entries."""
        selector, config = self.selector, self.shared.config
        assert selector is not None
        assert self.keys is not None
        assert self.values is not None
        assert self.entry_positions is not None
        device = self.keys.device
        row = self.shared.index(rows, device)
        count = live - config.window
        dtype = score_dtype(self.keys.dtype)
        positions = self.entry_positions[row, :, :live]
        candidates = Candidates(
            positions=positions[:, :, :count],
            queries=self._window_queries(rows) if selector.needs_queries else None,
            keys=self.keys[row, :, :count].to(dtype) if selector.needs_keys else None,
            values=self.values[row, :, :count].to(dtype) if selector.needs_values else None,
            scaling=form.scaling,
            noise=NoiseSource(
                (self.philox[row, 0], self.philox[row, 1]),
                self.shared.index([self.events[r] for r in rows], device),
                self.index,
            ),
            window_keys=self.keys[row, :, count:live].to(dtype) if selector.needs_window_keys else None,
            mass=None if self.mass is None else self.mass[row, :, :count],
            softcap=form.softcap,
        )
        kept = selector(candidates, [self.prompts[r] for r in rows])
        newest = torch.arange(count, live, device=device).expand(*kept.shape[:2], -1)
        slots = torch.cat([kept, newest], dim=-1)  # chronological: the window is newer than every candidate
        budget = slots.shape[-1]
        self.entry_positions[row, :, :budget] = positions.gather(-1, slots)
        for storage in (self.keys, self.values):
            index = slots[..., None].expand(*slots.shape, storage.shape[-1])
            storage[row, :, :budget] = storage[row, :, :live].gather(2, index)
        if self.mass is not None:
            mass = self.mass[row, :, :live].gather(-1, slots)
            self.mass[row] = 0  # what is appended starts at nothing
            self.mass[row, :, :budget] = mass
        for r in rows:
            self.live[r] = budget
            self.events[r] += 1


def _group(values: Sequence[int]) -> dict[int, list[int]]:
    """Indices by value."""
    groups: dict[int, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return groups


class EvictionCache(Cache):
    """A KV cache bounded by an eviction policy, for `model.generate(..., past_key_values=cache)`.

    Rows are left-padded and independent of each other. Passing the cache again continues its sequences; `reset` starts
    afresh. Greedy and sampling work, also with `num_return_sequences`; beam search, assisted decoding, chunked prefill
    and cropping are refused.

    Args:
        config: the eviction setting.
        model_config: `model.config` of a model loaded with `attn_implementation="vkvtrain"`.
        streams: what names each prompt's randomness, ints or tuples of ints; default 0, 1, ... With k sequences per
            prompt row r draws from `(streams[r // k], r % k)`.

    Raises:
        ValueError: a model that cannot evict, or whose attention is another one.
    """

    def __init__(self, config: EvictionConfig, model_config: Any, streams: Sequence[Stream] | None = None) -> None:
        check_attention(model_config.get_text_config(decoder=True), "EvictionCache")
        self.kinds = layer_kinds(model_config, config)
        self._shared = _Shared(config, _checked_streams(config, streams))
        super().__init__(layers=[self._make_layer(index, kind) for index, kind in enumerate(self.kinds)])
        self.config = config

    def _make_layer(self, index: int, kind: LayerKind) -> CacheLayerMixin:
        if kind.sliding_window is not None:
            return DynamicSlidingWindowLayer(kind.sliding_window)
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
        if self.kinds[layer_idx].sliding_window is None:
            self._shared.awaiting = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def positions(self, layer: int, row: int) -> Tensor:
        """Logical positions that a layer holds of a row, int64 [Hkv, n], ascending.

        Raises:
            ValueError: an empty cache, or a layer with a sliding window of its own.
        """
        held = self.layers[layer]
        if not isinstance(held, EvictionLayer):
            raise ValueError(f"layer {layer} keeps its own sliding window and evicts nothing: ask for another layer")
        if held.entry_positions is None:
            raise ValueError("the cache is empty: pass it to generate or to the model first")
        return held.entry_positions[row, :, : held.live[row]].clone()

    def stats(self) -> list[dict[str, int]]:
        """Of each row: evictions, entries held and most ever held per KV head of an evicting layer, and their bytes.

        Bytes are of all layers, each row's own tokens alone; sliding-window layers count what their window holds.
        """
        layers = self._eviction_layers()
        first = next((layer for layer in layers if layer.selector is not None), layers[0])
        rows = []
        for row in range(len(first.live)):
            sliding = self._sliding_bytes(first.seen[row])
            rows.append(
                {
                    "evictions": first.events[row],
                    "live_entries": first.live[row],
                    "peak_entries": first.peak[row],
                    "bytes": sliding + sum(layer.live[row] * _entry_bytes(layer) for layer in layers),
                    "peak_bytes": sliding + sum(layer.peak[row] * _entry_bytes(layer) for layer in layers),
                }
            )
        return rows

    @property
    def allocated_bytes(self) -> int:
        """Bytes of key and value storage, all rows and layers."""
        layers = [*self._eviction_layers(), *self._sliding_layers()]
        held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def reset(self, streams: Sequence[Stream] | None = None) -> None:
        """Forget the sequences; `streams` names the next ones (default: the same as before)."""
        for index, kind in enumerate(self.kinds):
            if kind.sliding_window is not None:
                self.layers[index] = self._make_layer(index, kind)  # its own reset leaves zeros behind
        for layer in self._eviction_layers():
            layer.reset()
        self._shared.awaiting = None
        if streams is not None:
            self._shared.streams = _checked_streams(self.config, streams)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("EvictionCache cannot be cropped: evicted entries are gone (assisted decoding needs cropping)")

    def activate_past_recording(self) -> NoReturn:
        raise ValueError("assisted decoding does not work with EvictionCache: generate without an assistant")

    def _eviction_layers(self) -> list[EvictionLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictionLayer)]

    def _sliding_layers(self) -> list[DynamicSlidingWindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    def _sliding_bytes(self, seen: int) -> int:
        """Bytes of a row of `seen` tokens in the layers that keep their own window."""
        layers = [layer for layer in self._sliding_layers() if layer.is_initialized]
        return sum(min(seen, layer.sliding_window - 1) * _entry_bytes(layer) for layer in layers)


def _entry_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of one token's entries in a layer, all KV heads."""
    assert layer.keys is not None
    assert layer.values is not None
    keys, values = layer.keys, layer.values
    return keys.shape[1] * (keys.shape[3] + values.shape[3]) * keys.element_size()


def _checked_streams(config: EvictionConfig, streams: Sequence[Stream] | None) -> list[Stream] | None:
    if streams is None:
        return None
    if not len(streams):
        raise ValueError("streams is empty: give one stream for each prompt, or None")
    for stream in streams:
        stream_key(config.seed, stream)
    return list(streams)
