"""Eviction policies by the field's names. To add one: a class in a file of this folder, and a line in `POLICIES`.

Knows nothing of models, caches or training: tensors in, tensors out.
"""

import difflib

from vkvtrain.policies.attention_based import SnapKV, VaseAttnV
from vkvtrain.policies.base import Candidates, Policy, value_range, window_attention
from vkvtrain.policies.data_independent import Full, Random, Streaming
from vkvtrain.policies.leverage import CurDKV, VaseDKV
from vkvtrain.policies.value_based import EvictLarge

POLICIES: dict[str, type[Policy]] = {
    "vase_attnv": VaseAttnV,
    "vase_dkv": VaseDKV,
    "curdkv": CurDKV,
    "snapkv": SnapKV,
    "random": Random,
    "streaming": Streaming,
    "evict_large": EvictLarge,
    "full": Full,
}


def get_policy(name: str) -> type[Policy]:
    """The policy class of a name; raises ValueError with the nearest name if there is none."""
    if name not in POLICIES:
        close = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(POLICIES)}"
        raise ValueError(f"policy: there is no policy {name!r} ({hint})")
    return POLICIES[name]


__all__ = ["POLICIES", "Candidates", "Policy", "get_policy", "value_range", "window_attention"]
