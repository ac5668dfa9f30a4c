"""Policies that weigh importance against redundancy: R-KV and the simplified form that VaSE compares with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register, window_attention

_QUERIES, _POOL, _SIMILAR = 8, 7, 0.5
"""R-KV's observation queries, its pooling width, and the cosine above which keys are near-duplicates."""


def redundancy(keys: Tensor, threshold: float | None) -> Tensor:
    """How much each key repeats the others, [N, Hkv, n]: softmax over the mean cosine with all others.

    Args:
        keys: [N, Hkv, n, D].
        threshold: in each key's row of cosines the newest one above it is set to zero, so that the newest of several
            near-duplicates is not counted as redundant (where none is above, the oldest key's is set to zero, as in the
            official code); None: no such exemption.
    """
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = torch.matmul(unit, unit.transpose(-1, -2))
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    if threshold is not None:
        slots = torch.arange(keys.shape[2], device=keys.device)
        newest = torch.where(cosine > threshold, slots, 0).amax(-1, keepdim=True)
        cosine = cosine.masked_fill(slots == newest, 0.0)
    return cosine.mean(-2).softmax(-1)


@register("rkv")
@dataclass(frozen=True)
class RKV(Policy):
    """Keep what is attended and not redundant, `lam * I - (1 - lam) * S` (R-KV, arXiv 2505.24133, official code).

    I: softmax over the candidates of the group's largest logit, mean over the last eight queries, max-pooled over
    seven neighbours. S: `redundancy` among all held keys, the newest near-duplicate exempted.
    """

    lam: float = 0.1
    """Weight of the importance, 0 to 1."""

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    needs_window_keys: ClassVar[bool] = True
    threshold: ClassVar[float | None] = _SIMILAR

    def __post_init__(self) -> None:
        if not isinstance(self.lam, (int, float)) or isinstance(self.lam, bool) or not 0 <= self.lam <= 1:
            raise ValueError(f"policy_args: lam must be a number from 0 to 1, got {self.lam!r}")

    def importance(self, candidates: Candidates, smooth: bool) -> Tensor:
        """I, [N, Hkv, C]."""
        logits = candidates.logits(candidates.queries[:, :, -_QUERIES:], candidates.keys).amax(2)
        return torch.nn.functional.max_pool1d(logits.softmax(-1).mean(2), _POOL, stride=1, padding=_POOL // 2)

    def compared_keys(self, candidates: Candidates) -> Tensor:
        """Keys among which S is measured, the candidates' first, [N, Hkv, n, D]."""
        return candidates.all_keys()

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        importance = self.importance(candidates, smooth)
        repeated = redundancy(self.compared_keys(candidates), self.threshold)[..., : importance.shape[-1]]
        return self.lam * importance - (1 - self.lam) * repeated


@register("rkv_vase")
@dataclass(frozen=True)
class RKVVase(RKV):
    """The simplified R-KV of VaSE's tables: window attention for I, no exemption (VaSE, arXiv 2606.03928).

    S: `redundancy` among the candidates only; the window's keys are not looked at.
    """

    lam: float = 0.5
    needs_window_keys: ClassVar[bool] = False
    smooths: ClassVar[bool] = True
    threshold: ClassVar[float | None] = None

    def importance(self, candidates: Candidates, smooth: bool) -> Tensor:
        return window_attention(candidates, smooth)

    def compared_keys(self, candidates: Candidates) -> Tensor:
        return candidates.keys
