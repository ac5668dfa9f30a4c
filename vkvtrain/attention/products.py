"""Attention of short segments by plain matrix products, forward and backward, and the window attention from them.

A segment's queries see all that its row holds and, causally, the segment's own tokens: a small matrix of logits that
stays in a CPU's cache, where plain products are faster than a fused kernel with a mask. Everything is computed in the
dtype of scores, so that scores are decoding's up to rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vkvtrain.logits import LayerInputs, LogitForm, score_dtype

_SMALLEST = 1e-20
"""Least share of the attention that can be divided by without losing digits of float32."""


@dataclass(frozen=True)
class Segment:
    """Queries of N segments and the entries that they see, those of the past first.

    Attributes:
        query: scaled, [N * Hkv, Hq / Hkv * L, D].
        key, value: [N * Hkv, held + L, D].
        logits: capped, [N * Hkv, Hq / Hkv * L, held + L]; not causal.
        weights: attention, of the same shape.
        shape: (N, Hq, L, D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    weights: Tensor
    shape: torch.Size


def segment(inputs: LayerInputs) -> Segment:
    """The attention weights of segments.

    Args:
        inputs: query [N, Hq, L, D], key and value [N, Hkv, held + L, D].
    """
    query, key, value, form = inputs.query, inputs.key, inputs.value, inputs.form
    dtype, length, entries = score_dtype(query.dtype), query.shape[2], key.shape[2]
    shape, group = query.shape, query.shape[1] // key.shape[1]
    query = query.to(dtype).reshape(-1, group * length, shape[3]) * form.scaling
    key, value = key.to(dtype).flatten(0, 1), value.to(dtype).flatten(0, 1)
    logits = torch.bmm(query, key.transpose(1, 2))
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    unseen = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    # the past's logits are read again for the scores, so only the segment's own block is overwritten
    logits.unflatten(1, (group, length))[..., entries - length :].masked_fill_(unseen, -torch.inf)
    if form.sinks is None:
        weights = logits.softmax(-1)
    else:
        weights = form.softmax(logits.view(shape[0], -1, group, length, entries)).reshape(logits.shape)
    return Segment(query, key, value, logits, weights, shape)


def output(segments: Segment) -> Tensor:
    """Attention output, [N, Hq, L, Dv]."""
    return torch.bmm(segments.weights, segments.value).view(*segments.shape[:3], -1)


def window_attention(segments: Segment, heads: int, held: int) -> Tensor:
    """What the segments' queries pay to each entry of the past, softmax over those alone, mean over queries and heads.

    Args:
        segments: as long as the window.
        heads: KV heads.
        held: entries of the past.

    Returns:
        [N, Hkv, held], see `vkvtrain.policies.window_attention` (before smoothing).
    """
    past = segments.weights[..., :held]
    share = past.sum(-1)
    if bool((share < _SMALLEST).any()):
        attention = segments.logits[..., :held].softmax(-1).mean(1)
    else:
        attention = torch.bmm(share.reciprocal_()[:, None], past).squeeze(1) / segments.weights.shape[1]
    return attention.unflatten(0, (-1, heads))


def gradients(segments: Segment, gradient: Tensor, form: LogitForm) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query [N, Hq, L, D], key and value [N, Hkv, held + L, D], and sinks [Hq].

    Args:
        segments: their attention.
        gradient: of their output, [N, Hq, L, Dv].
        form: scaling, soft cap and sinks.
    """
    rows, q_heads, length, _ = segments.shape
    weights = segments.weights
    upstream = gradient.to(segments.value.dtype).reshape(*segments.query.shape[:2], -1)
    grad_value = torch.bmm(weights.transpose(1, 2), upstream)
    slope = torch.bmm(upstream, segments.value.transpose(1, 2)).mul_(weights)
    total = slope.sum(-1, keepdim=True)
    slope.addcmul_(weights, total, value=-1)
    grad_sinks = None
    if form.sinks is not None:
        grad_sink = (1 - weights.sum(-1, keepdim=True)) * -total
        grad_sinks = grad_sink.view(rows, q_heads, length).sum((0, 2)).to(form.sinks.dtype)
    if form.softcap is not None:
        # an entry that is not seen has slope zero, and its logit minus infinity
        slope.mul_(1 - (segments.logits.clamp(min=-form.softcap) / form.softcap).square())
    grad_query = torch.bmm(slope, segments.key).mul_(form.scaling).view(segments.shape)
    grad_key = torch.bmm(slope.transpose(1, 2), segments.query)
    return grad_query, grad_key.unflatten(0, (rows, -1)), grad_value.unflatten(0, (rows, -1)), grad_sinks
