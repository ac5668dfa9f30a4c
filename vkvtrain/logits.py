"""How a model turns queries and keys into attention: scaling, soft cap, learned sinks; and attention by that form.

Knows nothing of eviction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QUERIES = 512
"""Queries whose logits exist at once where SDPA cannot be used."""


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are computed in: float32, float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LogitForm:
    """The form of a layer's attention.

    Attributes:
        scaling: factor of `q.k`.
        softcap: bound c of the logits, `c * tanh(l / c)` (Gemma 2); None without.
        sinks: learned logits whose attention mass is discarded, [Hq] (gpt-oss); None without.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled and capped logits, [N, Hkv, Hq / Hkv, Q, K].

        Args:
            query: [N, Hq, Q, D].
            key: [N, Hkv, K, D].
        """
        heads = query.unflatten(1, (key.shape[1], -1))
        logits = torch.matmul(heads.flatten(2, 3), key.transpose(-1, -2)).unflatten(2, heads.shape[2:4]) * self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def softmax(self, logits: Tensor) -> Tensor:
        """Attention weights over the last dimension; the attention mass on sinks is discarded.

        Args:
            logits: capped, [N, Hkv, Hq / Hkv, Q, K]; excluded entries at the dtype's minimum.
        """
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.to(logits.dtype).view(1, *logits.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a layer's attention is computed from.

    Attributes:
        query: [N, Hq, Q, D], after RoPE.
        key, value: [N, Hkv, K, D].
        form: scaling, soft cap and sinks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    form: LogitForm


def attend(inputs: LayerInputs, visible: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention output [N, Hq, Q, D]; zero where a query sees nothing.

    Args:
        inputs: the layer's.
        visible: bool, broadcastable to [N, 1, Q, K]; None: everything.
        is_causal: query i sees entries 0 to i; not with `visible`.
    """
    query, key, value, form = inputs.query, inputs.key, inputs.value, inputs.form
    if form.softcap is None and form.sinks is None:
        if query.shape[2] == 1 and not is_causal:
            # the heads of a group as queries of their KV head: no entry is repeated
            grouped = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
            out = scaled_dot_product_attention(grouped, key, value, attn_mask=visible, scale=form.scaling)
            return out.flatten(1, 2)[:, :, None]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=is_causal, scale=form.scaling, enable_gqa=True
        )
    queries, entries = query.shape[2], key.shape[2]
    if is_causal:
        position = torch.arange(max(queries, entries), device=query.device)
        visible = position[:entries] <= position[:queries, None]
    elif visible is None:
        visible = torch.ones(1, entries, dtype=torch.bool, device=query.device)
    visible = visible.expand(*visible.shape[:-2], queries, entries)
    if visible.dim() == 4:
        visible = visible[:, :, None]
    outputs = []
    for start in range(0, queries, _QUERIES):
        seen = visible[..., start : start + _QUERIES, :]
        logits = form.logits(query[:, :, start : start + _QUERIES], key)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = form.softmax(logits.masked_fill(~seen, torch.finfo(logits.dtype).min)) * seen.any(-1, keepdim=True)
        outputs.append(torch.matmul(weights.to(value.dtype), value[:, :, None]).flatten(1, 2))
    return torch.cat(outputs, 2)


def attention_mass(queries: Tensor, keys: Tensor, form: LogitForm) -> Tensor:
    """Attention that each entry gets from the queries of the newest R entries, [N, Hkv, n].

    Softmax over all entries that a query sees (itself included), summed over the R queries, mean over the query heads
    of the KV head.

    Args:
        queries: of the newest R entries in chronological order, [N, Hq, R, D].
        keys: of all n entries held, chronological, [N, Hkv, n, D].
        form: scaling, soft cap and sinks.
    """
    window, held = queries.shape[2], keys.shape[2]
    logits = form.logits(queries, keys)
    position = torch.arange(held, device=keys.device)
    unseen = position > position[held - window :, None]
    return form.softmax(logits.masked_fill(unseen, torch.finfo(logits.dtype).min)).sum(3).mean(2)
