"""Policies that score by the attention of the window's queries."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, window_attention


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keep the candidates with the highest window attention (SnapKV, arXiv 2404.14469, decode form)."""

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return window_attention(candidates, smooth)


@dataclass(frozen=True)
class VaseAttnV(Policy):
    """Protect the largest value ranges, sample the rest in proportion to the window attention.

    Source: VaSE (arXiv 2606.03928).
    """

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    protected_fraction: ClassVar[float] = 0.25

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return window_attention(candidates, smooth)
