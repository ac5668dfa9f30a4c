"""Whether a forward that was given an `EvictionCache` writes to it.

A model asks its cache how wide the masks must be, makes the masks, then runs its layers. Under gradient checkpointing
in training mode transformers' layers drop the cache after that, with no more than a log line (since 5.24 only where
gradients are on). All of it happens in the thread of the forward pass, and so does what is remembered here; a
recomputation in a backward pass asks for no masks.
"""

import threading
from typing import Any
from weakref import ReferenceType, ref


class _Forward(threading.local):
    cache: "ReferenceType[Any] | None" = None
    """The cache that was asked for the widths of masks, until it is written to."""
    makes_masks: bool = False
    """Whether the mask that is made next is the one it was asked for."""


_forward = _Forward()


def expect(cache: Any) -> None:
    """A forward has asked the cache for the width of a mask."""
    _forward.cache, _forward.makes_masks = ref(cache), True


def mask_is_made() -> None:
    """A mask is made; if no cache was asked for its width, the forward has none, and an earlier one was given up."""
    if not _forward.makes_masks:
        _forward.cache = None
    _forward.makes_masks = False


def cache_is_written() -> None:
    """A layer has given its tokens to the cache."""
    _forward.cache, _forward.makes_masks = None, False


def refuse_dropped_cache() -> None:
    """Raise ValueError for attention without a cache in a forward that was given one."""
    expected = _forward.cache
    cache_is_written()
    if expected is not None and expected() is not None:
        raise ValueError(
            "the model was given an EvictionCache, but its layers run without one, so that a token would not see those "
            "before it: gradient checkpointing drops the cache in training mode, call model.eval() first"
        )
