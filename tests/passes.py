"""Tiny models, and the passes that parity tests compare: simulated, decoded token by token, and replayed."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from families import tiny_family
from torch import Tensor
from transformers import AttentionInterface

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction


def tiny_model(
    family: str = "Qwen3", *, heads: int = 4, kv_heads: int = 2, layers: int = 2, vocab: int = 40,
    dtype: torch.dtype = torch.float64, seed: int = 0, attention: str = "vkvtrain", **extra: Any,
) -> Any:  # fmt: skip
    """A random model of a family without layer types, in another shape than its own."""
    return tiny_family(
        family, vocab=vocab, dtype=dtype, seed=seed, attention=attention, hidden_size=16 * heads,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, **extra,
    )  # fmt: skip


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
    model: Any, config: EvictionConfig, rows: Sequence[Sequence[int]], prompts: Sequence[int], streams: Sequence[Any]
) -> tuple[list[Tensor], list[dict[int, dict[int, Tensor]]], EvictionCache]:
    """Teacher-forced decoding with left-padded prompts; all rows have equally many tokens after their prompt.

    Returns:
        Logits of each row [length, vocab]; for each row, by number of tokens seen, the positions that each evicting
        layer holds; the cache.
    """
    steps = len(rows[0]) - prompts[0]
    assert all(len(row) - prompt == steps for row, prompt in zip(rows, prompts, strict=True))
    cache = EvictionCache(config, model.config, streams)
    ids, mask = left_padded([row[:prompt] for row, prompt in zip(rows, prompts, strict=True)])
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache
    )
    logits = [[out.logits[i, -prompt:]] for i, prompt in enumerate(prompts)]
    held: list[dict[int, dict[int, Tensor]]] = [{} for _ in rows]
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        position = torch.tensor([[prompt + step] for prompt in prompts])
        token = torch.tensor([[row[prompt + step]] for row, prompt in zip(rows, prompts, strict=True)])
        before = [row["evictions"] for row in cache.stats()]
        out = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
        for i, prompt in enumerate(prompts):
            logits[i].append(out.logits[i])
            if cache.stats()[i]["evictions"] > before[i]:
                held[i][prompt + step + 1] = {
                    layer: cache.positions(layer, i) for layer, kind in enumerate(cache.kinds) if kind.evicts
                }
    return [torch.cat(parts) for parts in logits], held, cache


def replayed(
    model: Any, config: EvictionConfig, rows: Sequence[Sequence[int]], prompts: Sequence[int],
    edit: Callable[[Tensor], Tensor] = Tensor.clone, edited: Container[str] = ("query", "key", "value"),
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:  # fmt: skip
    """What simulation and cache hold after each token, given the very same queries, keys and values, layer by layer.

    Args:
        edit: changes what attention is called with, [B, heads, S, D], in both passes.
        edited: which of its tensors.
    """
    captured = {}
    ours = AttentionInterface()["vkvtrain"]

    def capture(module, query, key, value, attention_mask, **kwargs):
        tensors = {"query": query, "key": key, "value": value}
        tensors = {name: edit(tensor) if name in edited else tensor for name, tensor in tensors.items()}
        captured[module.layer_idx] = module, tensors, kwargs["scaling"]
        return ours(module, **tensors, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register("capture", capture)
    ids, mask = right_padded(rows)
    with torch.no_grad(), simulated_eviction(model, config, prompts, range(len(rows))) as trace:
        model.config._attn_implementation = "capture"  # after the block has checked it
        model(input_ids=ids, attention_mask=mask)
    model.config._attn_implementation = "vkvtrain"
    for layer, (module, tensors, scaling) in captured.items():
        for row, prompt in enumerate(prompts):
            cache = EvictionCache(config, model.config, [row])
            for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(rows[row])))]:
                query, key, value = (tensors[name][row : row + 1, :, start:end] for name in ("query", "key", "value"))
                ours(module, query, *cache.update(key, value, layer), None, scaling=scaling)
                yield held_at(trace.evict_at[layer], row, end), cache.positions(layer, 0).tolist()


def held_at(evict_at: Tensor, row: int, seen: int) -> list[list[int]]:
    """Positions that `evict_at` [B, Hkv, S] says are held once `seen` tokens were seen, for each KV head."""
    return [(head[:seen] > seen).nonzero().flatten().tolist() for head in evict_at[row]]


def rows_of(prompts: Sequence[int], steps: int, vocab: int = 8, seed: int = 1) -> list[list[int]]:
    """Few distinct tokens, so that equal tokens and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (prompt + steps,), generator=generator).tolist() for prompt in prompts]


def sets_equal(evict_at: dict[int, Tensor], held: list[dict[int, dict[int, Tensor]]]) -> tuple[int, int]:
    """(equal, compared) kept sets over rows, events, layers and heads."""
    equal = compared = 0
    for row, events in enumerate(held):
        for seen, layers in events.items():
            for layer, positions in layers.items():
                for ours, theirs in zip(held_at(evict_at[layer], row, seen), positions.tolist(), strict=True):
                    equal, compared = equal + (ours == theirs), compared + 1
    return equal, compared
