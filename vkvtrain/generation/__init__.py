"""The slot engine: prompts in, completions out, with an evicting cache whose rows are refilled as they finish.

Knows nothing of training or evaluation.
"""

from vkvtrain.generation.engine import generate
from vkvtrain.generation.requests import Completion, Request, Sampling

__all__ = ["Completion", "Request", "Sampling", "generate"]
