"""The attention backends by name, all equal to rounding, and which of them is the fastest where."""

from torch import Tensor

from vkvtrain.attention import flex, reference, segments
from vkvtrain.lifetimes import Schedule, lifetimes
from vkvtrain.logits import LayerInputs
from vkvtrain.selection import Selector

BACKENDS = {"reference": reference.attend, "segments": segments.attend, "flex": flex.attend}


def resolve(backend: str, query: Tensor, value: Tensor) -> str:
    """The backend that `auto` stands for, or the one that was asked for.

    Args:
        backend: `auto` or a name.
        query: [B, Hq, S, D].
        value: [B, Hkv, S, D].
    """
    if backend != "auto":
        return backend
    return "flex" if flex.supports(query, value) else "segments"


def attend(backend: str, inputs: LayerInputs, evict_at: Tensor, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under `evict_at` [B, Hkv, S]; shapes as for `reference.attend`."""
    if backend == "flex" and not any(sequence.events for sequence in schedule.sequences):
        backend = "segments"  # nothing is evicted: plain causal attention
    return BACKENDS[backend](inputs, evict_at, schedule)


def attend_and_decide(
    backend: str, inputs: LayerInputs, schedule: Schedule, selector: Selector, layer: int
) -> tuple[Tensor, Tensor]:
    """Attention output [B, S, Hq, D] and the `evict_at` [B, Hkv, S] that it is under; arguments as for `Walk`."""
    if backend == "segments" and segments.can_decide(selector, inputs.key.device):
        return segments.attend_and_decide(inputs, schedule, selector, layer)
    evict_at = lifetimes(inputs.query, inputs.key, inputs.value, schedule, selector, layer, inputs.form)
    return attend(backend, inputs, evict_at, schedule), evict_at
