"""Policies that never look at the cache's contents: in training all layers are decided before the first one attends."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register


@register("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keep a uniform sample; with `protect_prompt` this is Random Attention (arXiv 2609.03430)."""

    samples: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return torch.ones_like(candidates.positions, dtype=torch.float32)


@register("streaming")
@dataclass(frozen=True)
class Streaming(Policy):
    """Keep the sinks and the most recent entries (StreamingLLM, arXiv 2309.17453)."""

    keeps_newest: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        # all equal: ties go to the newest, at any length (float32 positions would collide above 2**24)
        return torch.zeros_like(candidates.positions, dtype=torch.float32)


@register("full")
@dataclass(frozen=True)
class Full(Policy):
    """Keep everything."""

    keeps_everything: ClassVar[bool] = True
