"""Policies that score by the size of the value states."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register


@dataclass(frozen=True)
class _ValueBased(Policy):
    needs_values: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True


@register("evict_large")
@dataclass(frozen=True)
class EvictLarge(_ValueBased):
    """Drop the largest value ranges: the ablation that shows what VaSE protects (arXiv 2606.03928)."""

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return -candidates.value_range()


@register("value_l2")
@dataclass(frozen=True)
class ValueL2(_ValueBased):
    """Keep the values of largest Euclidean norm: another measure of size than VaSE's value range."""

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        assert candidates.values is not None
        return candidates.values.norm(dim=-1)


@register("value_var")
@dataclass(frozen=True)
class ValueVar(_ValueBased):
    """Keep the values of largest variance over the head dimension: another measure of size than VaSE's range."""

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        assert candidates.values is not None
        return candidates.values.var(-1, unbiased=False)
