"""Attention of a layer that has a sliding window of its own, block by block: O(S * window), no S^2 mask."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vkvtrain.lifetimes import Schedule
from vkvtrain.logits import LayerInputs
from vkvtrain.logits import attend as attend_entries


def attend(inputs: LayerInputs, window: int, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `i - window < j <= i`; zero at padding.

    Args:
        inputs: query [B, Hq, S, D], key and value [B, Hkv, S, D].
        window: newest tokens that a query sees, itself included.
        schedule: lengths of the batch's sequences.
    """
    rows, width, device = inputs.query.shape[0], schedule.width, inputs.query.device
    blocks = -(-width // window)
    # a block's queries see its own keys and those of the block before, which for the first one do not exist
    fill = (0, 0, 0, blocks * window - width)

    def split(entries: Tensor) -> Tensor:
        """[B, H, S, D] -> [B * blocks, H, window, D]."""
        return pad(entries, fill).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(entries: Tensor) -> Tensor:
        keys = split(entries)
        before = pad(keys.unflatten(0, (rows, blocks))[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1)
        return torch.cat([before, keys], dim=2)

    place = torch.arange(window, device=device)
    distance = place[:, None] + window - torch.arange(2 * window, device=device)
    visible = (distance >= 0) & (distance < window)
    first = visible & (torch.arange(2 * window, device=device) >= window)
    visible = torch.cat([first[None], visible.expand(blocks - 1, -1, -1)]).repeat(rows, 1, 1)[:, None]
    blockwise = LayerInputs(split(inputs.query), with_previous(inputs.key), with_previous(inputs.value), inputs.form)
    out = attend_entries(blockwise, visible)
    out = out.unflatten(0, (rows, blocks)).permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :width]
    real = torch.arange(width, device=device) < schedule.lengths[:, None]
    return torch.where(real[:, :, None, None], out, 0.0)
