"""Tiny models, and the passes that parity tests compare: simulated, decoded token by token, and replayed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction

FAMILIES: dict[str, tuple[type, type]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def tiny_model(
    family: str = "qwen3", *, heads: int = 4, kv_heads: int = 2, layers: int = 2, vocab: int = 40,
    dtype: torch.dtype = torch.float64, seed: int = 0, attention: str = "vkvtrain", **extra: Any,
) -> Any:  # fmt: skip
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    head_dim = {"head_dim": 16} if family != "qwen2" else {}
    config = config_class(
        vocab_size=vocab, hidden_size=16 * heads, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, attn_implementation=attention, **head_dim, **extra,
    )  # fmt: skip
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # larger weights: attention that prefers something
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)
    return model


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def simulate(
    model: Any, config: EvictionConfig, rows: Sequence[Sequence[int]], prompts: Sequence[Any], streams: Sequence[Any],
    backend: str = "auto",
) -> tuple[list[Tensor], dict[int, Tensor]]:  # fmt: skip
    """Logits of each row [length, vocab], and `evict_at` of each layer."""
    ids, mask = right_padded(rows)
    with simulated_eviction(model, config, prompts, streams, backend) as trace:
        logits = model(input_ids=ids, attention_mask=mask).logits
    return [logits[i, : len(row)] for i, row in enumerate(rows)], trace.evict_at


@torch.no_grad()
def decode(
    model: Any, config: EvictionConfig, rows: Sequence[Sequence[int]], prompts: Sequence[int], streams: Sequence[Any],
) -> tuple[list[Tensor], list[dict[int, list[Tensor]]], EvictionCache]:  # fmt: skip
    """Teacher-forced decoding with left-padded prompts; all rows have equally many tokens after their prompt.

    Returns:
        Logits of each row [length, vocab]; for each row, by number of tokens seen, the positions held by each layer.
    """
    steps = len(rows[0]) - prompts[0]
    assert all(len(row) - prompt == steps for row, prompt in zip(rows, prompts, strict=True))
    cache = EvictionCache(config, model.config, streams)
    ids, mask = left_padded([row[:prompt] for row, prompt in zip(rows, prompts, strict=True)])
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache
    )
    logits = [[out.logits[i, -prompt:]] for i, prompt in enumerate(prompts)]
    held: list[dict[int, list[Tensor]]] = [{} for _ in rows]
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        position = torch.tensor([[prompt + step] for prompt in prompts])
        token = torch.tensor([[row[prompt + step]] for row, prompt in zip(rows, prompts, strict=True)])
        before = [row["evictions"] for row in cache.stats()]
        out = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
        for i, prompt in enumerate(prompts):
            logits[i].append(out.logits[i])
            if cache.stats()[i]["evictions"] > before[i]:
                held[i][prompt + step + 1] = [cache.positions(layer, i) for layer in range(len(cache.layers))]
    return [torch.cat(parts) for parts in logits], held, cache


def held_at(evict_at: Tensor, row: int, seen: int) -> list[list[int]]:
    """Positions that `evict_at` [B, Hkv, S] says are held once `seen` tokens were seen, for each KV head."""
    return [(head[:seen] > seen).nonzero().flatten().tolist() for head in evict_at[row]]
