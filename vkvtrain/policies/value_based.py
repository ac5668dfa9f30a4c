"""Policies that score by the size of the value states."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register


@register("evict_large")
@dataclass(frozen=True)
class EvictLarge(Policy):
    """Drop the largest value ranges: the ablation that shows what VaSE protects (arXiv 2606.03928)."""

    measures: ClassVar[tuple[str, ...]] = ("range",)
    scores_single_tokens: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return -candidates.value_size("range")


@register("value_l2")
@dataclass(frozen=True)
class ValueL2(Policy):
    """Keep the values of largest Euclidean norm: another measure of size than VaSE's value range."""

    measures: ClassVar[tuple[str, ...]] = ("l2",)
    has_weights: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return candidates.value_size("l2")


@register("value_var")
@dataclass(frozen=True)
class ValueVar(Policy):
    """Keep the values of largest variance over the head dimension: another measure of size than VaSE's range."""

    measures: ClassVar[tuple[str, ...]] = ("variance",)
    has_weights: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return candidates.value_size("variance")
