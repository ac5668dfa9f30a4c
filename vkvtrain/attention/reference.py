"""Attention under `evict_at` with a dense mask: O(S^2), the oracle of the other backends."""

import torch
from torch import Tensor

from vkvtrain.lifetimes import Schedule
from vkvtrain.logits import LayerInputs


def attend(inputs: LayerInputs, evict_at: Tensor, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        inputs: query [B, Hq, S, D], key and value [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        schedule: lengths of the batch's sequences.
    """
    position = torch.arange(schedule.width, device=evict_at.device)
    seen = (position <= position[:, None]) & (position[:, None] < evict_at[:, :, None, :])
    return _attend_masked(inputs, seen, schedule)


def attend_sliding(inputs: LayerInputs, window: int, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `i - window < j <= i`; arguments as for `attend`."""
    position = torch.arange(schedule.width, device=inputs.key.device)
    seen = (position <= position[:, None]) & (position > position[:, None] - window)
    return _attend_masked(inputs, seen.expand(*inputs.key.shape[:2], -1, -1), schedule)


def _attend_masked(inputs: LayerInputs, seen: Tensor, schedule: Schedule) -> Tensor:
    """Under a mask [B, Hkv, S, S], head by head and with every logit at once."""
    query, key, form = inputs.query, inputs.key, inputs.form
    group = query.shape[1] // key.shape[1]
    real = torch.arange(schedule.width, device=key.device) < schedule.lengths[:, None]
    logits = torch.matmul(query, key.repeat_interleave(group, 1).transpose(-1, -2)) * form.scaling
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    logits = logits.masked_fill(~seen.repeat_interleave(group, 1), -torch.inf)
    logits = torch.where(real[:, None, :, None], logits, 0.0)
    if form.sinks is not None:
        sinks = form.sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([sinks, logits], dim=-1)
    weights = logits.softmax(-1)[..., -schedule.width :]
    out = torch.matmul(weights, inputs.value.repeat_interleave(group, 1)).transpose(1, 2)
    return torch.where(real[:, :, None, None], out, 0.0)
