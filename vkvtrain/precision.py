"""The dtype in which attention is entered, and how what follows stays out of autocast.

Under autocast queries and keys leave RoPE in float32 and values a projection in bfloat16; a float32 norm of the queries
and keys of a bfloat16 model does the same. Both passes enter attention in one dtype, and scores are computed as the
eviction contract says, in float32, not as autocast would have them.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_KINDS = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind))
"""Types of devices that know autocast; asked once, because compilers of older releases cannot trace the question."""


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return device.type in _KINDS and torch.is_autocast_enabled(device.type)


def attention_dtype(value: Tensor) -> torch.dtype:
    """The dtype of queries, keys and values when attention is entered: autocast's, as for stock SDPA, or the values'.

    Args:
        value: [B, Hkv, K, D], as the model's projection made it.
    """
    if value.dtype != torch.float64 and is_autocast(value.device):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(value.device.type)
    return value.dtype


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations on a device have the dtype of their inputs."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()
