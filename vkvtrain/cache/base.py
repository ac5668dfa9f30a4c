"""What the layers of a cache have in common: independent rows whose counters are Python integers."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vkvtrain.cache.expected import cache_is_written
from vkvtrain.cache.step import Counters, Step
from vkvtrain.cache.storage import Storage
from vkvtrain.config import EvictionConfig
from vkvtrain.logits import LayerInputs
from vkvtrain.noise import Stream, stream_key
from vkvtrain.precision import attention_dtype
from vkvtrain.selection import Selector

_LAYER = "_vkvtrain_cache_layer"


def carry(key: Tensor, layer: Any) -> Tensor:
    """The key tensor, a fresh one, which now carries its cache layer to the attention function."""
    setattr(key, _LAYER, layer)
    return key


def layer_of(key: Tensor) -> Any:
    """The cache layer that returned this key tensor from `update`; None without one."""
    return getattr(key, _LAYER, None)


def in_one_dtype(key: Tensor, value: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values in the dtype in which attention is entered.

    Raises:
        ValueError: it is not that of the entries that are stored, because autocast came or went within a sequence.
    """
    dtype = attention_dtype(value)
    if stored is not None and stored.dtype != dtype:
        raise ValueError(
            f"this EvictionCache holds entries in {stored.dtype} and was given {dtype}: decode a whole sequence with "
            "autocast or without"
        )
    return key.to(dtype), value.to(dtype)


class Shared:
    """What the layers of a cache have in common. Holds no tensors of a sequence, no layers and no masks.

    Args:
        config: the eviction setting.
        streams: of each prompt; None for 0, 1, ...
        layers: how many layers run in a forward.
    """

    def __init__(self, config: EvictionConfig, streams: Sequence[Stream] | None, layers: int) -> None:
        self.config = config
        self.selector = Selector(config) if config.evicts else None
        self.streams = None if streams is None else list(streams)
        self.layers = layers
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Forget the sequences."""
        self.awaiting: int | None = None
        self.is_resumed = False
        """Whether the caller has asked, since the last forward, how many tokens the cache has seen."""
        self.first_positions: list[int] | None = None
        """Position id of each row's first token, if the model tells position ids."""
        self._lengths: list[int] | None = None
        self._steps: list[Step] = []
        self._finished = 0

    def index(self, values: Sequence[int], device: torch.device) -> Tensor:
        """Python ints as an int64 tensor; the layers of a step ask for the same ones, which are copied once."""
        wanted = (tuple(values), device)
        if wanted not in self._index:
            if len(self._index) >= 64:
                self._index.clear()
            self._index[wanted] = torch.tensor(wanted[0], dtype=torch.int64, device=device)
        return self._index[wanted]

    def row_lengths(self, mask: Tensor | None, rows: int, width: int) -> list[int]:
        """Tokens of each left-padded row of a prompt, all layers' alike: its first mask is read, in one transfer."""
        if self._lengths is None and mask is not None:
            real = _sees_itself(mask)
            if bool((real[:, :-1] & ~real[:, 1:]).any()):
                raise ValueError("EvictionCache needs left-padded prompts: set the tokenizer's padding_side to 'left'")
            lengths = real.sum(-1).expand(rows).tolist()
            if 0 in lengths:
                raise ValueError(f"row {lengths.index(0)} of the prompt is all padding: give every row a token")
            self._lengths = lengths
        return [width] * rows if self._lengths is None else self._lengths

    def step(self, before: Counters, new: int, device: torch.device, evicts: bool) -> Step:
        """What a forward of `new` tokens a row does; layers that count alike are given the same one."""
        budget = self.config.budget if evicts else None
        for step in self._steps:
            if step.new == new and step.device == device and step.evicts == evicts and step.before == before:
                return step
        step = Step(before, new, device, self.config.window, budget)
        self._steps = [*self._steps[-3:], step]
        return step

    def finish(self) -> None:
        """A layer has finished a forward; after the last layer nothing of the forward is held."""
        self._finished += 1
        if self._finished >= self.layers:
            self.is_resumed, self._steps, self._finished = False, [], 0

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


def _sees_itself(mask: Tensor) -> Tensor:
    """Which tokens are no padding, bool [rows, q], of a mask [rows, 1, q, q]: under any window a token sees itself."""
    return mask[:, 0].diagonal(dim1=-2, dim2=-1).bool()


class RowLayer(CacheLayerMixin):
    """One layer's entries, row by row. Rows may have seen different numbers of tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    evicts = False

    def __init__(self, shared: Shared, index: int) -> None:
        # not the mixin's, which would set keys and values: here they are the storage's
        self.shared = shared
        self.index = index
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self._storage: Storage | None = None
        self.decoded = False
        """Whether a token was given alone after the prompt."""
        self.step: Step | None = None
        """What is under way, from `update` to the end of `attend`."""
        self.columns = 0
        self.counters = Counters.of_prompts([])

    @property
    def storage(self) -> Storage:
        """What the layer holds, from the prompt on.

        Raises:
            ValueError: an empty cache.
        """
        if self._storage is None:
            raise ValueError("the cache is empty: pass it to generate or to the model first")
        return self._storage

    # What transformers asks of a layer

    @property
    def is_initialized(self) -> bool:
        return self._storage is not None

    @property
    def keys(self) -> Tensor | None:
        return None if self._storage is None else self._storage.keys

    @property
    def values(self) -> Tensor | None:
        return None if self._storage is None else self._storage.values

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
        """Take the new tokens' keys and values [rows, Hkv, q, D]; returns what they attend to, in one dtype."""
        rows, _, new, _ = key_states.shape
        key_states, value_states = in_one_dtype(key_states, value_states, self.keys)
        if new == 0:
            raise ValueError("EvictionCache was given no tokens: pass at least one")
        if not self.is_initialized:
            keys, values = key_states.view(key_states.shape), value_states
        else:
            if rows != len(self.counters.seen):
                raise ValueError(
                    f"this EvictionCache holds {len(self.counters.seen)} rows and was given {rows}: make a new cache, "
                    "or call cache.reset(streams=...) to start afresh"
                )
            keys, values = self.append(key_states, value_states)
        cache_is_written()
        return carry(keys, self), values

    def check(self, query: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise ValueError unless the tokens just given to `update` are a prompt or continue the rows.

        One transfer a prompt and a chunk; none for a token of a decoding loop.

        Args:
            query: [rows, Hq, q, D].
            mask: as for `attend`.
            positions: position ids of the tokens, int64 [rows or 1, q]; None where the model does not tell them.
        """
        shared, (rows, _, new, _) = self.shared, query.shape
        shared.awaiting = None
        if positions is not None and positions.dim() != 2:  # of images and text
            positions = None
        if self.step is None:
            if positions is not None and shared.first_positions is None:
                newest = positions[:, -1].expand(rows).tolist()
                lengths = shared.row_lengths(mask, rows, new)
                shared.first_positions = [last + 1 - length for last, length in zip(newest, lengths, strict=True)]
            return
        if self.step.is_checked:
            return
        if positions is not None and shared.first_positions is not None and (new > 1 or shared.is_resumed):
            _check_positions(positions.expand(rows, new), shared.first_positions, self.step.before.seen)
        if mask is not None and not bool(_sees_itself(mask).all()):
            raise ValueError("padding among tokens that continue a sequence: continue rows with equally many tokens")
        if new > 1 and not (self.decoded or shared.is_resumed):
            raise ValueError(
                "EvictionCache was given a second chunk before any token was decoded: pass the whole prompt at once "
                "(prefill_chunk_size is not supported)"
            )
        self.step.is_checked = True

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise ValueError("beam search does not work with EvictionCache: use num_beams=1")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError("EvictionCache cannot be cropped: evicted entries are gone (assisted decoding needs cropping)")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise ValueError("EvictionCache cannot repeat its rows: use num_return_sequences, or repeat the prompts")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise ValueError("EvictionCache cannot select rows: use keep_rows")

    # What a kind of layer says for itself

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens that continue the rows; returns the keys and values that they attend to."""

    @abstractmethod
    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        """Attention output [rows, q, Hq, D] of the tokens just given to `update`; then the events that are due.

        Args:
            inputs: query [rows, Hq, q, D]; key and value are what `update` returned, [rows, Hkv, entries, D].
            mask: of the new tokens among themselves, bool [rows, 1, q, q], or None without padding.
        """

    def take_step(self) -> Step:
        """The step that `update` has begun and `attend` ends."""
        if self.step is None:
            raise RuntimeError("attention without tokens: EvictionCache.update comes before attend")
        step, self.step = self.step, None
        return step

    def finish(self, step: Step) -> None:
        """Count a step whose tokens are stored and attended."""
        self.columns += step.new
        self.counters = step.after
        self.decoded = self.decoded or step.new == 1
        self.shared.finish()

    @abstractmethod
    def held_bytes(self, row: int) -> tuple[int, int]:
        """(bytes held of a row, most that were ever held)."""

    # Rows that come and go, for continuous batching

    def match_storage(self, layers: "Sequence[RowLayer]") -> None:
        """Give all layers storage of the same size."""

    def join(self, sources: "Sequence[RowLayer]") -> None:
        """Hold the rows of other layers, one after another; they may lose their storage."""
        self.match_storage(sources)
        self._storage = Storage.join([source.storage for source in sources])
        self.counters = Counters.join([source.counters for source in sources])
        self.columns = max(source.columns for source in sources)
        self.decoded = any(source.decoded for source in sources)

    def replace_row(self, row: int, source: "RowLayer") -> None:
        """Put the first row of another layer into `row`."""
        self.match_storage([self, source])
        self.storage.replace_row(row, source.storage)
        self.counters = self.counters.replace_row(row, source.counters)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.storage.keep_rows(self.shared.index(rows, self.storage.keys.device))
        self.counters = self.counters.keep(rows)


def _check_positions(positions: Tensor, first: Sequence[int], seen: Sequence[int]) -> None:
    """Raise ValueError unless rows that have seen so many tokens go on where they were.

    Args:
        positions: position ids of the new tokens, int64 [rows, q].
        first: position id of each row's first token.
        seen: tokens of each row before.
    """
    for row, (start, end) in enumerate(positions[:, [0, -1]].tolist()):
        expected = first[row] + seen[row]
        has_gaps = end - start != positions.shape[1] - 1  # as by padding, which the mask tells better
        if start == expected or has_gaps:
            continue
        given = (
            f"this EvictionCache has seen {seen[row]} tokens of row {row}, so that position {expected} is next, and "
            f"was given {start} to {end}"
        )
        if start == first[row] and end >= expected:
            raise ValueError(
                f"{given}, every token again: set use_cache=True, which generate takes from its arguments, its "
                "generation_config or the model's config; for another prompt call cache.reset(), or make a new one"
            )
        raise ValueError(
            f"{given}: a used cache is continued by the whole sequence so far and more; for another prompt call "
            "cache.reset(), or make a new one"
        )
