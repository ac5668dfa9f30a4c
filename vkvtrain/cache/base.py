"""What the layers of a cache have in common: independent rows whose counters are Python integers."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vkvtrain.cache.step import Counters, Step
from vkvtrain.config import EvictionConfig
from vkvtrain.logits import LogitForm
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
    """What the layers of a cache have in common. Holds no tensors of a sequence and no layers."""

    def __init__(self, config: EvictionConfig, streams: Sequence[Stream] | None) -> None:
        self.config = config
        self.selector = Selector(config) if config.evicts else None
        self.streams = None if streams is None else list(streams)
        self.awaiting: int | None = None
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._lengths: list[tuple[Tensor, list[int]]] = []
        self._unpadded: list[Tensor] = []
        self._steps: list[Step] = []

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
        known = next((lengths for other, lengths in self._lengths if other is mask), None)
        if known is None:
            seen = mask[:, 0, -1, -width:].bool()
            if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
                raise ValueError("EvictionCache needs left-padded prompts: set the tokenizer's padding_side to 'left'")
            known = seen.sum(-1).expand(rows).tolist()
            if 0 in known:
                raise ValueError(f"row {known.index(0)} of the prompt is all padding: give every row a token")
            self._lengths = [*self._lengths[-1:], (mask, known)]  # of full layers and of sliding ones
        return known

    def step(self, before: Counters, new: int, device: torch.device, evicts: bool) -> Step:
        """What a forward of `new` tokens a row does; layers that count alike are given the same one."""
        budget = self.config.budget if evicts else None
        for step in self._steps:
            if step.new == new and step.device == device and step.evicts == evicts and step.before == before:
                return step
        step = Step(before, new, device, self.config.window, budget)
        self._steps = [*self._steps[-3:], step]
        return step

    def refuse_padding(self, mask: Tensor | None, new: int) -> None:
        """Raise ValueError for padding among tokens that continue a sequence; one transfer for each mask."""
        if mask is None or any(mask is other for other in self._unpadded):
            return
        if not bool(mask[:, 0, -1, -new:].all()):
            raise ValueError("padding among tokens that continue a sequence: continue rows with equally many tokens")
        self._unpadded = [*self._unpadded[-1:], mask]  # of full layers and of sliding ones

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


class RowLayer(CacheLayerMixin):
    """One layer's entries, row by row. Rows may have seen different numbers of tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    evicts = False
    stored: ClassVar[tuple[str, ...]]
    """Tensors whose first dimension is the row."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        for name in self.stored:
            setattr(self, name, None)
        self.is_initialized = False
        self.columns = 0
        self.counters = Counters.of_prompts([])

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
        return carry(keys, self), values

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
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        """Attention output [rows, q, Hq, D] of the tokens just given to `update`; then the events that are due.

        Args:
            query: [rows, Hq, q, D].
            key, value: what `update` returned, [rows, Hkv, entries, D].
            mask: of the new tokens among themselves, bool [rows, 1, q, q], or None without padding.
            form: scaling, soft cap and sinks of the attention.
        """

    def finish(self, step: Step) -> None:
        """Count a step whose tokens are stored and attended."""
        self.columns += step.new
        self.counters = step.after

    @abstractmethod
    def held_bytes(self, row: int) -> tuple[int, int]:
        """(bytes held of a row, most that were ever held)."""

    def entry_bytes(self) -> int:
        """Bytes of one token's entries, all KV heads."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    # Rows that come and go, for continuous batching

    def match_storage(self, layers: "Sequence[RowLayer]") -> None:
        """Give all layers storage of the same size."""

    def join(self, sources: "Sequence[RowLayer]") -> None:
        """Hold the rows of other layers, one after another; they may lose their storage."""
        self.match_storage(sources)
        for name in self.stored:
            tensors = [getattr(source, name) for source in sources]
            setattr(self, name, None if tensors[0] is None else torch.cat(tensors))
        self.counters = Counters.join([source.counters for source in sources])
        self.columns = max(source.columns for source in sources)
        self.is_initialized = True

    def replace_row(self, row: int, source: "RowLayer") -> None:
        """Put the first row of another layer into `row`."""
        self.match_storage([self, source])
        for name in self.stored:
            if getattr(self, name) is not None:
                getattr(self, name)[row] = getattr(source, name)[0]
        self.counters = self.counters.replace_row(row, source.counters)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        for name in self.stored:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[self.shared.index(rows, tensor.device)])
        self.counters = self.counters.keep(rows)
