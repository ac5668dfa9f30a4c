"""Attention under eviction: the interface that transformers calls, the simulation, and its backends."""

from vkvtrain.attention.interface import register
from vkvtrain.attention.simulation import Trace, simulated_eviction

__all__ = ["Trace", "register", "simulated_eviction"]
