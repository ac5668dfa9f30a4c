"""Policies that score by approximate leverage: the size of a key and a value under a random projection."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register


@register("curdkv")
@dataclass(frozen=True)
class CurDKV(Policy):
    """Keep the largest approximate leverage of keys and values (CurDKV, Sengupta et al. 2025).

    Score: `norm(k G)^2 * norm(v G)^2` with one `G` [D, rank] ~ N(0, 1/rank) per sequence and layer.
    """

    rank: int = 20
    """Columns of the random projection."""

    needs_keys: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True
    scores_single_tokens: ClassVar[bool] = True
    fresh_projection: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"policy_args: rank must be a positive int, got {self.rank!r}")

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        keys, values = candidates.keys, candidates.values

        def leverage(entries: Tensor) -> Tensor:
            dim = entries.shape[-1]
            projection = candidates.noise.projection(dim, self.rank, per_event=self.fresh_projection).to(entries.dtype)
            return torch.matmul(entries, projection[:, None]).square().sum(-1)

        return leverage(keys) * leverage(values)


@register("vase_dkv")
@dataclass(frozen=True)
class VaseDKV(CurDKV):
    """CurDKV's leverage with a projection drawn afresh at every event (VaSE, arXiv 2606.03928)."""

    fresh_projection: ClassVar[bool] = True
