"""Policies that score by the size of the value states."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, value_range


@dataclass(frozen=True)
class EvictLarge(Policy):
    """Drop the largest value ranges: the ablation that shows what VaSE protects (arXiv 2606.03928)."""

    needs_values: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        assert candidates.values is not None
        return -value_range(candidates.values)
