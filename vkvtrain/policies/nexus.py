"""Nexus Sampling: window attention and what a walk over it adds, as weights of a reservoir."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register

_STEPS = 3
"""Steps of the walk."""


@register("nexus")
@dataclass(frozen=True)
class Nexus(Policy):
    """Sample by the window attention and a walk over it (Nexus Sampling, arXiv 2606.23961, as in its authors' draft).

    Weight: `a + lam * c / sum c` with `a` the mean over the window's queries of their attention rows `s_q` to the
    candidates, and `c` the walk `c <- c + s_q (1 + s_q . c)` from zero over the window's first three queries; an
    attention row is the mean over the query heads of the KV head. The reservoir with priorities `u ** (1 / w)` is
    sampling without replacement in proportion to the weights.

    Source: the draft's Algorithm 1 (Escanord/verl, docs/nexus_method.md, commit 750e18e) for blocks of one token. The
    draft takes blocks of 64 tokens, one decision for all heads, and by default the mean of four priorities, which draws
    from no stated distribution; with one priority it is the reservoir of its analysis, as here. The printed paper's
    formula may differ from the draft's.
    """

    lam: float = 0.5
    """Weight of the walk beside the window attention, 0 to 1."""

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.lam, (int, float)) or isinstance(self.lam, bool) or not 0 <= self.lam <= 1:
            raise ValueError(f"policy_args: lam must be a number from 0 to 1, got {self.lam!r}")

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        rows = candidates.logits(candidates.queries, candidates.keys).softmax(-1).mean(2)
        walk = torch.zeros_like(rows[:, :, 0])
        for row in rows[:, :, :_STEPS].unbind(2):
            walk = walk + row * (1 + (row * walk).sum(-1, keepdim=True))
        return rows.mean(2) + self.lam * walk / walk.sum(-1, keepdim=True)
