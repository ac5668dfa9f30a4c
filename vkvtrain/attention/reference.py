"""Attention under `evict_at` with a dense mask: O(S^2), the oracle of the other backends."""

import torch
from torch import Tensor

from vkvtrain.lifetimes import Plan


def attend(query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, plan: Plan, scaling: float) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        plan: the batch's rows.
        scaling: factor of the attention logits.
    """
    group = query.shape[1] // key.shape[1]
    position = torch.arange(plan.width, device=key.device)
    real = position < plan.lengths[:, None]
    seen = (position <= position[:, None]) & (position[:, None] < evict_at[:, :, None, :])
    logits = torch.matmul(query, key.repeat_interleave(group, 1).transpose(-1, -2)) * scaling
    weights = logits.masked_fill(~seen.repeat_interleave(group, 1), -torch.inf)
    weights = torch.where(real[:, None, :, None], weights, 0.0).softmax(-1)
    out = torch.matmul(weights, value.repeat_interleave(group, 1)).transpose(1, 2)
    return torch.where(real[:, :, None, None], out, 0.0)
