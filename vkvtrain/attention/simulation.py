"""Simulated eviction: one parallel pass in which every query sees what it would see while decoding.

The state of a simulation is reached from the attention module, by an attribute of each: copies of modules carry it
along, and compilers guard on it. Recomputation under gradient checkpointing runs in an autograd worker thread on CUDA,
where thread-local state and context variables are not to be had.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vkvtrain.attention import reference, sliding
from vkvtrain.attention.backends import BACKENDS, attend, attend_and_decide, resolve
from vkvtrain.attention.inputs import after_virtual_tokens, check_streams, checked_prompts, right_padded_lengths
from vkvtrain.attention.packing import Layout, checked_documents
from vkvtrain.config import EvictionConfig
from vkvtrain.events import Chunks
from vkvtrain.foresight import Foresight
from vkvtrain.lifetimes import Schedule, SequenceSchedule, make_schedule, never_evicted
from vkvtrain.logits import LayerInputs
from vkvtrain.modules import attention_modules, virtual_tokens
from vkvtrain.noise import Stream
from vkvtrain.rope import check_rope
from vkvtrain.selection import Selector
from vkvtrain.support import LayerKind, check_attention, layer_kinds

_LINK = "_vkvtrain_simulation"
"""The attribute of an attention module that ties it to the simulation that it is in, or was in when it last ran."""
_open: "dict[int, list[Trace]]" = {}
"""Open simulations by the identity of the model configuration, which is all that a mask function is told."""


class Link:
    """What ties an attention module to a simulation; copies of the module made within the block share it."""

    def __init__(self, trace: "Trace") -> None:
        self.trace = trace

    def __deepcopy__(self, memo: Any) -> "Link":
        return self

    def __reduce__(self) -> Any:
        return _no_link, ()


def _no_link() -> None:
    """What a module that is pickled within a block has in the place of its link when it is loaded."""


def simulation_of(module: nn.Module) -> "Trace | None":
    """The simulation that an attention call on `module` belongs to, if any.

    Raises:
        RuntimeError: in a backward pass, after the simulation that the forward ran in was left.
        ValueError: a replica of `nn.DataParallel`, which has rows of which the simulation does not know the places.
    """
    link: Link | None = getattr(module, _LINK, None)
    if link is None:
        return None
    trace = link.trace
    if trace.closed:
        if torch.compiler.is_compiling():
            return None  # recomputation is never compiled
        if in_backward():
            raise RuntimeError(
                "the backward pass recomputes a layer whose simulated_eviction block has been left: call "
                "loss.backward() inside the block"
            )
        delattr(module, _LINK)
        return None
    if getattr(module, "_is_replica", False):
        raise ValueError(
            "simulated_eviction does not work under nn.DataParallel, whose replicas have a part of the rows each: "
            "launch one process for each GPU (torchrun or accelerate launch)"
        )
    return trace if trace.attends else None


def simulation_of_config(config: Any) -> "Trace | None":
    """The open simulation of a model, by its configuration object."""
    for trace in _open.get(id(config), ()):
        if trace.attends:
            return trace
    return None


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (torch.utils.checkpoint asks in the same way)."""
    return torch._C._current_graph_task_id() != -1


class Trace:
    """What a simulation did. Readable after its block has been left.

    Attributes:
        evict_at: of each layer that has run, int64 [B, Hkv, S]: the first query position that no longer sees the key;
            S + 1 where never, 0 at padding. Of a packed batch [documents, Hkv, longest document], positions within the
            document.
        backend: the attention backend in use; what `auto` stands for is known once a layer has run.
        closed: whether the block has been left.
    """

    def __init__(
        self,
        config: EvictionConfig,
        kinds: Sequence[LayerKind],
        prompts: Sequence[int | Chunks],
        streams: Sequence[Stream] | None,
        backend: str,
        documents: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.evict_at: dict[int, Tensor] = {}
        self.backend = backend
        self.closed = False
        self.is_suspended = False
        self._config = config
        self._kinds = kinds
        self._prompts = prompts
        self._streams = range(len(prompts)) if streams is None else streams
        selector = self._selector = Selector(config) if config.evicts else None
        evicting = [layer for layer, kind in enumerate(kinds) if kind.evicts]
        self._foresight = None
        if selector is not None and selector.data_independent:
            self._foresight = Foresight(selector, evicting)
        self._documents = documents
        self._shape: tuple[int, int] | None = None
        self._schedules: dict[torch.device, tuple[Schedule, Layout | None]] = {}
        self._unpadded: list[Tensor] = []

    @property
    def rows(self) -> list[SequenceSchedule]:
        """Lengths and events of the rows of the pass (of the documents, if packed), once it has run."""
        return next((schedule.sequences for schedule, _ in self._schedules.values()), [])

    @property
    def is_packed(self) -> bool:
        """Whether the rows hold several documents each."""
        return self._documents is not None

    @property
    def attends(self) -> bool:
        """Whether attention is the simulation's now: also while it is suspended, if it keeps documents apart."""
        return self.is_packed or not self.is_suspended

    def unpadded_mask(self, rows: int, width: int, device: torch.device) -> Tensor:
        """A two-dimensional mask without padding, which is known for one: its lengths are not asked of the device."""
        mask = torch.ones(rows, width, dtype=torch.bool, device=device)
        self._unpadded.append(mask)
        return mask

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Attention is full inside (packed documents stay apart): for a teacher's forward pass, without gradients."""
        self.is_suspended = True
        try:
            yield
        finally:
            self.is_suspended = False

    def attend(self, layer: int, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        """Attention output [B, S, Hq, D] of a layer; decides its `evict_at` unless this is a recomputation."""
        key = inputs.key
        if inputs.query.shape[2] != key.shape[2]:
            raise ValueError("simulated_eviction needs the whole sequence in one pass: leave the cache out")
        if layer in self.evict_at and not self.is_suspended and not in_backward():
            raise RuntimeError(
                f"layer {layer} ran twice in one simulated_eviction block: open a block for each forward pass, and run "
                "a teacher before it or inside trace.suspended()"
            )
        schedule, layout = self._schedule_of(mask, key.shape[0], key.shape[2], key.device)
        if layout is None:
            return self._attend_rows(layer, inputs, schedule)
        apart = LayerInputs(layout.apart(inputs.query), layout.apart(key), layout.apart(inputs.value), inputs.form)
        return layout.together(self._attend_rows(layer, apart, schedule))

    def _attend_rows(self, layer: int, inputs: LayerInputs, schedule: Schedule) -> Tensor:
        """The same for one sequence a row."""
        kind, kv_heads = self._kinds[layer], inputs.key.shape[1]
        self.backend = resolve(self.backend, inputs.query, inputs.value)
        if self.is_suspended or not kind.evicts:
            schedule = schedule.without_events()
        if self.is_suspended:
            evict_at = never_evicted(schedule, kv_heads)
        elif layer in self.evict_at:
            evict_at = self.evict_at[layer]
        elif kind.evicts and self._foresight is not None:
            evict_at = self.evict_at[layer] = self._foresight.evict_at(layer, kv_heads, schedule)
        elif kind.evicts and self._selector is not None:
            out, self.evict_at[layer] = attend_and_decide(self.backend, inputs, schedule, self._selector, layer)
            return out
        else:
            evict_at = self.evict_at[layer] = never_evicted(schedule, kv_heads)
        if kind.sliding_window is not None:
            attend_sliding = reference.attend_sliding if self.backend == "reference" else sliding.attend
            return attend_sliding(inputs, kind.sliding_window, schedule)
        return attend(self.backend, inputs, evict_at, schedule)

    def _schedule_of(
        self, mask: Tensor | None, rows: int, width: int, device: torch.device
    ) -> tuple[Schedule, "Layout | None"]:
        """Schedule and layout of the pass on a layer's device: with a device map the layers lie on several."""
        if self._shape is None:
            if mask is None or any(mask is unpadded for unpadded in self._unpadded):
                lengths = [width] * rows
            else:
                lengths = right_padded_lengths(mask, rows, width)
            self._unpadded.clear()
            layout = None if self._documents is None else Layout(self._documents, lengths, width)
            if layout is None and rows != len(self._prompts):
                raise ValueError(
                    f"prompt_lengths has {len(self._prompts)} entries for a batch of {rows} rows: give one each"
                )
            longest = width
            if layout is not None:  # each document is a sequence of its own
                lengths, longest = layout.documents, layout.longest
            schedule = make_schedule(self._config, self._prompts, self._streams, lengths, longest, device)
            self._shape = (rows, width)
            self._schedules[device] = (schedule, layout and layout.on(device))
        elif self._shape != (rows, width):
            raise ValueError("the layers of one simulated pass saw batches of different shapes")
        if device not in self._schedules:
            schedule, layout = next(iter(self._schedules.values()))
            self._schedules[device] = (schedule.on(device), layout and layout.on(device))
        return self._schedules[device]


@contextmanager
def simulated_eviction(
    model: nn.Module,
    config: EvictionConfig,
    prompt_lengths: Sequence[int | Chunks],
    streams: Sequence[Stream] | None = None,
    backend: str = "auto",
    documents: Sequence[Sequence[int]] | None = None,
) -> Iterator[Trace]:
    """Within the block, one forward pass of `model` sees what decoding with `EvictionCache` would see.

    The backward pass belongs inside too: gradient checkpointing recomputes there. Rows are right-padded.

    Args:
        model: a transformers model loaded with `attn_implementation="vkvtrain"`, PEFT and other wrappers included.
        config: the eviction setting.
        prompt_lengths: of each row the length of its prompt, or a list of (start, end) chunks that decoding would
            append without eviction. The virtual tokens of a prompt-tuning adapter are not counted here: they belong to
            the prompt, and `evict_at` has them as its first columns.
        streams: names each row's randomness, ints or tuples of ints; default 0, 1, ...
        backend: `segments`, `flex`, `reference`, or `auto` (`flex` on a GPU that can, else `segments`).
        documents: of each row the token lengths of the documents packed into it, in order, such as [[12, 9], [30]];
            `prompt_lengths` and `streams` then have one entry for each document. Documents do not see each other, and
            each is evicted as if it were alone. The caller's position_ids start again at 0 in each document.

    Yields:
        The trace: `evict_at` of each layer, `suspended()` for a teacher's pass.

    Raises:
        ValueError: a model that cannot evict or whose attention is another one, or settings that do not fit the batch.
        RuntimeError: a second forward pass in the block, a block without one or in which a layer did not run, or a
            backward pass after it.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {' or '.join(BACKENDS)}, got {backend!r}")
    prompts = checked_prompts(prompt_lengths)
    check_streams(config.seed, streams, len(prompts))
    if documents is not None:
        documents = checked_documents(documents, prompts)
    added = virtual_tokens(model)
    if added and documents is not None:
        raise ValueError(
            "documents= does not work with a prompt-tuning adapter: its virtual tokens begin each row only"
        )
    prompts = [after_virtual_tokens(prompt, added) for prompt in prompts]
    modules = attention_modules(model)
    if not modules:
        raise ValueError("simulated_eviction found no attention layers in the model: pass a transformers decoder model")
    model_config: Any = modules[0].config
    check_attention(model_config, "simulated_eviction")
    check_rope(model_config)
    kinds = layer_kinds(model_config, config)
    for module in modules:
        link: Link | None = getattr(module, _LINK, None)
        if link is not None and not link.trace.closed:
            raise RuntimeError("the model is in a simulated_eviction block already: leave that one first")
    trace = Trace(config, kinds, prompts, streams, backend, documents)
    configs = {id(module.config): module.config for module in modules}  # kept alive by the modules
    for module in modules:
        setattr(module, _LINK, Link(trace))
    for identity in configs:
        _open.setdefault(identity, []).append(trace)
    try:
        yield trace
        _check_all_ran(trace, {module.layer_idx for module in modules})
    finally:
        trace.closed = True
        for identity in configs:
            _open[identity].remove(trace)
            if not _open[identity]:
                del _open[identity]


def _check_all_ran(trace: Trace, layers: set[int]) -> None:
    """Raise RuntimeError for layers that no attention call of the block reached, whose eviction was not simulated."""
    missing = sorted(layers - trace.evict_at.keys())
    if missing:
        which = "no attention layer" if len(missing) == len(layers) else f"not every layer (layer {missing[0]} did not)"
        raise RuntimeError(
            f"{which} ran in a simulated_eviction block, so nothing says what eviction does there: run one forward "
            "pass inside the block, of the model that was given to it and not of a copy made before"
        )
