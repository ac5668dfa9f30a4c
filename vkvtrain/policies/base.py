"""What a policy is: it scores candidates. Selection (protection, sampling, ties) is in `vkvtrain.selection`.

Shapes: N sequences, Hq query heads, Hkv KV heads (Hq a multiple of Hkv), R window queries, C candidates, D head
dimension.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vkvtrain.noise import NoiseSource


@dataclass(frozen=True)
class Candidates:
    """The entries that an event chooses among, in chronological order, with what the policy declared that it needs.

    Attributes:
        positions: logical positions, int64 [N, Hkv, C], ascending.
        queries: the window's queries in chronological order [N, Hq, R, D], float32 (float64 for a float64 model).
        keys: keys as cached, after RoPE [N, Hkv, C, D], same dtype.
        values: [N, Hkv, C, D], same dtype.
        scaling: factor of the attention logits, from the model.
        noise: the random numbers of this event.
    """

    positions: Tensor
    queries: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    scaling: float
    noise: NoiseSource


@dataclass(frozen=True)
class Policy:
    """Base of the policies. Fields of a subclass are its `policy_args`; everything else is declared on the class."""

    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    """Scores are weights of sampling without replacement, else the highest scores are kept."""
    scores_single_tokens: ClassVar[bool] = False
    """A score depends on one token alone, so equal tokens tie: scores are compared at 10 mantissa bits."""
    protected_fraction: ClassVar[float] = 0.0
    """The policy's own share of the budget that is protected as sinks or large values."""
    keeps_everything: ClassVar[bool] = False

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        """Scores [N, Hkv, C], higher is kept; weights >= 0 where the policy samples."""
        raise TypeError(f"{type(self).__name__} scores nothing")


def window_attention(candidates: Candidates, smooth: bool) -> Tensor:
    """The attention that the window pays to each candidate, `a` [N, Hkv, C].

    Softmax over the candidates only of `q.k * scaling`, mean over the R window queries, average-pooled over 5
    neighbours (stride 1, zero padding counted) if `smooth`, mean over the query heads of the KV head. Source: SnapKV
    (arXiv 2404.14469) in its decode form, as VaSE (arXiv 2606.03928) uses it.
    """
    assert candidates.queries is not None
    assert candidates.keys is not None
    sequences, kv_heads, _, dim = candidates.keys.shape
    grouped = candidates.queries.reshape(sequences, kv_heads, -1, dim)  # [N, Hkv, Hq/Hkv * R, D]
    logits = torch.matmul(grouped, candidates.keys.transpose(-1, -2)) * candidates.scaling
    attention = logits.softmax(-1).mean(2)  # both means at once: every query head has R queries
    return torch.nn.functional.avg_pool1d(attention, 5, stride=1, padding=2) if smooth else attention


def value_range(values: Tensor) -> Tensor:
    """`max_d v - min_d v` of each entry: VaSE's measure of a large value. [..., D] -> [...]."""
    return values.amax(-1) - values.amin(-1)
