"""Attention of a layer that has a sliding window of its own, block by block: O(S * window), no S^2 mask."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vkvtrain.lifetimes import Schedule
from vkvtrain.logits import LogitForm
from vkvtrain.logits import attend as attend_entries


def attend(query: Tensor, key: Tensor, value: Tensor, window: int, schedule: Schedule, form: LogitForm) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `i - window < j <= i`; zero at padding.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, Hkv, S, D].
        window: newest tokens that a query sees, itself included.
        schedule: lengths of the batch's sequences.
        form: scaling, soft cap and sinks of the attention.
    """
    rows, width = query.shape[0], schedule.width
    blocks = -(-width // window)
    # a block's queries see its own keys and those of the block before, which for the first one do not exist
    fill = (0, 0, 0, blocks * window - width)

    def split(entries: Tensor) -> Tensor:
        """[B, H, S, D] -> [B * blocks, H, window, D]."""
        return pad(entries, fill).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(entries: Tensor) -> Tensor:
        own = split(entries)
        before = pad(own.unflatten(0, (rows, blocks))[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1)
        return torch.cat([before, own], dim=2)

    place = torch.arange(window, device=query.device)
    distance = place[:, None] + window - torch.arange(2 * window, device=query.device)
    visible = (distance >= 0) & (distance < window)
    first = visible & (torch.arange(2 * window, device=query.device) >= window)
    visible = torch.cat([first[None], visible.expand(blocks - 1, -1, -1)]).repeat(rows, 1, 1)[:, None]
    out = attend_entries(split(query), with_previous(key), with_previous(value), form, visible)
    out = out.unflatten(0, (rows, blocks)).permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :width]
    real = torch.arange(width, device=query.device) < schedule.lengths[:, None]
    return torch.where(real[:, :, None, None], out, 0.0)
