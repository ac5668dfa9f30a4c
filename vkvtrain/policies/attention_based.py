"""Policies that score by attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.policies.base import Candidates, Policy, register, round_beside, window_attention


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Keep the candidates with the highest window attention (SnapKV, arXiv 2404.14469, decode form)."""

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    only_window_attention: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True
    smooths: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return window_attention(candidates, smooth)


@register("vase_attnv")
@dataclass(frozen=True)
class VaseAttnV(SnapKV):
    """Protect the largest value ranges, sample the rest by the window attention (VaSE, arXiv 2606.03928)."""

    samples: ClassVar[bool] = True
    protected_fraction: ClassVar[float] = 0.25


@register("tova")
@dataclass(frozen=True)
class Tova(Policy):
    """Keep what the last query attends to, one decision for all heads of a layer (TOVA, arXiv 2401.06104).

    Score: softmax over everything held, mean over the query heads. Where KV heads hold different entries (large values
    are protected head by head), a position's mean is over those that hold it.
    """

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    needs_window_keys: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        positions = candidates.positions.contiguous()
        attention = candidates.logits(candidates.queries[:, :, -1:], candidates.all_keys()).softmax(-1)
        group_mean = attention[..., 0, : positions.shape[-1]].mean(2)
        total, holders = torch.zeros_like(group_mean), torch.zeros_like(group_mean)
        for head in range(positions.shape[1]):
            head_positions = positions[:, head, None].expand_as(positions).contiguous()
            slot = torch.searchsorted(head_positions, positions).clamp(max=positions.shape[-1] - 1)
            holds = head_positions.gather(-1, slot) == positions
            total += torch.where(holds, group_mean[:, head, None].expand_as(group_mean).gather(-1, slot), 0.0)
            holders += holds
        return total / holders


@register("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keep the heavy hitters: the attention of every query so far, summed (H2O, arXiv 2306.14048).

    The prompt's queries count too, so a prompt costs one more pass of attention over itself. Mean over the query heads
    of a KV head.
    """

    needs_mass: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        return candidates.mass


@register("caote")
@dataclass(frozen=True)
class Caote(Policy):
    """Keep what changes the attention output the most when it goes (CAOTE, arXiv 2504.14051).

    Score: `alpha / (1 - alpha) * |o - v|_2` with alpha the window attention normalised over the candidates and
    `o = sum alpha v`. The distance is rounded to ten bits of the values' size, so that equal values have none.
    """

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    only_window_attention: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True
    smooths: ClassVar[bool] = True

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        attention = window_attention(candidates, smooth)
        alpha = attention / attention.sum(-1, keepdim=True)
        output = torch.matmul(alpha[..., None, :], candidates.values)
        norms = candidates.values.norm(dim=-1)
        size = torch.maximum(norms, (alpha * norms).sum(-1, keepdim=True))
        error = alpha / (1 - alpha) * round_beside((output - candidates.values).norm(dim=-1), size)
        return torch.where(alpha < 1, error, torch.inf)  # alone it is the whole output
