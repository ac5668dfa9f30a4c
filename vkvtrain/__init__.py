"""vkvtrain: fine-tune models while their KV cache is being evicted, and evaluate them with the evicting cache.

Importing it registers `attn_implementation="vkvtrain"` with transformers.
"""

from vkvtrain.attention import Trace, register, simulated_eviction
from vkvtrain.cache import EvictionCache
from vkvtrain.config import EvictionConfig

__version__ = "0.1.0"
__all__ = ["EvictionCache", "EvictionConfig", "Trace", "simulated_eviction"]

register()
