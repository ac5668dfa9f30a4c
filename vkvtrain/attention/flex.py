"""Attention under `evict_at` by FlexAttention, whose kernels skip blocks of keys that no query of a block sees.

In natural order nearly every block of keys holds one that lives long, so little can be skipped. Sorted per KV head by
(when it is evicted, in buckets of a few events; position), keys that live together lie together, and the mask is
block-sparse. Block lists come from each key block's extreme positions and lifetimes, never from a mask of S^2 elements.

Not yet measured on a GPU. On a CPU FlexAttention has no backward pass, and without compilation it is an S^2
computation: there this backend is for tests.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from vkvtrain.lifetimes import Schedule
from vkvtrain.logits import LayerInputs

BLOCK = 128
"""Queries and keys of a block."""
_EVENTS = 16
"""Events whose victims are sorted into one bucket: fewer sort by lifetime, more by position. Of the dense causal blocks
this leaves 0.35 to visit at S=32768, B=4096, window 64, where single pairs would be 0.24 (4 events: 0.56, 32: 0.33)."""
_DIMS = (16, 32, 64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention's kernels take these tensors."""
    return (
        query.device.type == "cuda"
        and query.dtype in _DTYPES
        and query.shape[-1] in _DIMS
        and value.shape[-1] in _DIMS
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend(inputs: LayerInputs, evict_at: Tensor, schedule: Schedule) -> Tensor:
    """Attention output [B, S, Hq, D] under the mask `j <= i < evict_at[b, h, j]`; zero at padding.

    Args:
        inputs: query [B, Hq, S, D], key and value [B, Hkv, S, D].
        evict_at: [B, Hkv, S].
        schedule: lengths of the batch's sequences.

    Raises:
        ValueError: gradients on a CPU.
    """
    query, key, value, form = inputs.query, inputs.key, inputs.value, inputs.form
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("backend 'flex' has no backward pass on a CPU: use backend='auto'")
    group, width = query.shape[1] // key.shape[1], schedule.width
    order, position, until = sorted_keys(evict_at, schedule.window)
    fill = (0, 0, 0, position.shape[-1] - width)
    key, value = _Permuted.apply(pad(key, fill), order), _Permuted.apply(pad(value, fill), order)  # pyright: ignore
    softcap = form.softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    out, aux = _kernel(query.device)(
        pad(query, fill),
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask(position, until, group),
        scale=form.scaling,
        enable_gqa=group > 1,
        return_aux=AuxRequest(lse=True),
    )
    if form.sinks is not None:
        # the attention mass on sinks is discarded, so the output is scaled by sigmoid(lse - sink)
        out = out * torch.sigmoid(aux.lse - form.sinks.to(aux.lse.dtype)[:, None])[..., None].to(out.dtype)
    real = torch.arange(width, device=out.device) < schedule.lengths[:, None]
    return torch.where(real[:, :, None, None], out[:, :, :width].transpose(1, 2), 0.0)


def sorted_keys(evict_at: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of each KV head by (bucket of events at which they are evicted, position), padded to whole blocks.

    Args:
        evict_at: [B, Hkv, S].
        window: tokens between two events.

    Returns:
        Their order int64, positions int32 and `evict_at` int32, all [B, Hkv, a multiple of BLOCK]. What pads is never
        seen.
    """
    width = evict_at.shape[-1]
    evict_at = pad(evict_at, (0, -width % BLOCK))
    position = torch.arange(evict_at.shape[-1], device=evict_at.device)
    bucket = (evict_at + _EVENTS * window - 1) // (_EVENTS * window)
    order = (bucket * len(position) + position).argsort(-1)
    return order, order.int(), evict_at.gather(-1, order).int()


def block_mask(position: Tensor, until: Tensor, group: int) -> BlockMask:
    """The mask `position <= i < until` with lists of the key blocks that each block of queries visits.

    Args:
        position, until: of the sorted keys, int32 [B, Hkv, S].
        group: query heads of a KV head.
    """
    width = position.shape[-1]
    seen, fully_seen = visited_blocks(position, until)
    lists = []
    for blocks in (seen & ~fully_seen, fully_seen):
        blocks = blocks.repeat_interleave(group, 1)
        lists += [blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()]

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kv_head = head // group
        return (position[row, kv_head, key] <= query) & (query < until[row, kv_head, key])

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(width, width))


def visited_blocks(position: Tensor, until: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a block of queries sees something, and whether it sees everything, of a block of keys.

    From each key block's extremes only: a block may be visited in vain, but none that is seen is left out.

    Returns:
        Two bool tensors [B, Hkv, query blocks, key blocks].
    """
    positions, lives = position.unflatten(-1, (-1, BLOCK)), until.unflatten(-1, (-1, BLOCK))
    first = torch.arange(0, position.shape[-1], BLOCK, device=position.device)[:, None]
    last = first + BLOCK - 1
    # what pads is never seen, wherever it lies
    begins = torch.where(lives > 0, positions, torch.iinfo(torch.int32).max).amin(-1)
    seen = (begins[..., None, :] <= last) & (lives.amax(-1)[..., None, :] > first)
    fully_seen = (positions.amax(-1)[..., None, :] <= first) & (lives.amin(-1)[..., None, :] > last)
    return seen, fully_seen


class _Permuted(torch.autograd.Function):
    """Entries [B, H, S, D] in another order [B, H, S]; gradients come back by a gather too, not by adding up."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _gathered(entries, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _gathered(gradients[0], order.argsort(-1)), None


def _gathered(entries: Tensor, order: Tensor) -> Tensor:
    return entries.gather(2, order[..., None].expand(*order.shape, entries.shape[-1]))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _kernel(device: torch.device) -> Any:
    return _compiled() if device.type == "cuda" else flex_attention
