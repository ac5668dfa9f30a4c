"""vkvtrain: fine-tune models while their KV cache is being evicted, and evaluate them with the evicting cache.

Importing it registers `attn_implementation="vkvtrain"` with transformers.
"""

from typing import TYPE_CHECKING, Any

from vkvtrain.attention import Trace, register, simulated_eviction
from vkvtrain.cache import EvictionCache
from vkvtrain.config import EvictionConfig
from vkvtrain.rope import fixed_rope

if TYPE_CHECKING:
    from vkvtrain.loading import load

__version__ = "0.1.0"
__all__ = ["EvictionCache", "EvictionConfig", "Trace", "fixed_rope", "load", "simulated_eviction"]

register()


def __getattr__(name: str) -> Any:
    """`load` on first use: it needs the model classes, which importing the package should not wait for."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vkvtrain.loading import load

    globals()["load"] = load
    return load
