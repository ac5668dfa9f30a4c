"""What differs between the supported releases of transformers, 5.17 to 5.24. Nothing else asks for a version."""

from typing import Any

import transformers
from packaging.version import Version

_RELEASE = Version(transformers.__version__).release[:2]

CACHE_ARGUMENT = "cache" if _RELEASE >= (5, 24) else "past_key_values"
"""What models and `generate` call the cache that they are given; releases that say `cache` warn of the older name."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a model or of `generate`."""
    return {CACHE_ARGUMENT: cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache, by either name, out of keyword arguments that were meant for `generate`; None without one."""
    caches = [arguments.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in caches if cache is not None), None)


def enable_checkpointing(model: Any, use_reentrant: bool) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    enable = model.activation_checkpointing_enable if _RELEASE >= (5, 23) else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
