"""Policies that score by the keys alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vkvtrain.policies.base import Candidates, Policy, register


@register("knorm")
@dataclass(frozen=True)
class KNorm(Policy):
    """Keep the keys of smallest Euclidean norm, which attract the most attention (Devoto et al., arXiv 2406.11430)."""

    needs_keys: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return -candidates.keys.norm(dim=-1)


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the keys that differ the most from the others (KeyDiff, arXiv 2504.15364).

    Score: minus the cosine of a key with the anchor, the mean of all held keys' directions, the window's included.
    """

    needs_keys: ClassVar[bool] = True
    needs_window_keys: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        anchor = normalize(candidates.all_keys(), dim=-1).mean(2, keepdim=True)
        return -cosine_similarity(candidates.keys, anchor, dim=-1)
