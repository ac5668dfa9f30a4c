"""The attention backends by name, all equal to rounding, and which of them is the fastest where."""

from torch import Tensor

from vkvtrain.attention import flex, reference, segments
from vkvtrain.lifetimes import Schedule, lifetimes
from vkvtrain.logits import LogitForm
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


def attend(
    backend: str, query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, schedule: Schedule, form: LogitForm
) -> Tensor:
    """Attention output [B, S, Hq, D] under `evict_at` [B, Hkv, S]; shapes as for `reference.attend`."""
    if backend == "flex" and not any(row.events for row in schedule.sequences):
        backend = "segments"  # nothing is evicted: plain causal attention
    return BACKENDS[backend](query, key, value, evict_at, schedule, form)


def attend_and_decide(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: Schedule,
    selector: Selector,
    layer: int,
    form: LogitForm,
) -> tuple[Tensor, Tensor]:
    """Attention output [B, S, Hq, D] and the `evict_at` [B, Hkv, S] that it is under; arguments as for `lifetimes`."""
    if backend == "segments" and segments.can_decide(selector, key.device):
        return segments.attend_and_decide(query, key, value, schedule, selector, layer, form)
    evict_at = lifetimes(query, key, value, schedule, selector, layer, form)
    return attend(backend, query, key, value, evict_at, schedule, form), evict_at
