"""How far training pass and decoding agree where they round differently: kept sets of a random model, by dtype.

    python benchmarks/agreement.py --dtype bfloat16

The training pass computes a whole sequence at once, decoding a token at a time, so a model's activations differ in
their last bits, and two candidates whose scores are nearly equal may be swapped. From there on the sequences differ by
an entry. A random model is the hard case: its attention prefers little. In float64, and in any dtype for the same
queries, keys and values, all kept sets are equal, which the parity tests show.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.versions import cache_argument


@dataclass(frozen=True)
class Settings:
    policies: tuple[str, ...] = ("vase_attnv", "snapkv", "evict_large", "random")
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    autocast: bool = False
    """Weights stay in float32, and both passes run under autocast to `dtype`."""
    layers: int = 4
    vocabulary: int = 512
    budget: int = 64
    window: int = 8
    rows: int = 2
    prompt: int = 20
    tokens: int = 224
    """Tokens of a row."""
    seed: int = 0


@dataclass(frozen=True)
class Agreement:
    """Of the kept sets of a policy: one for each row, event, layer and KV head."""

    policy: str
    sets: int
    equal_sets: int
    equal_entries: float
    """Mean share of a kept set's entries that the other pass keeps too."""
    logits: float
    """Largest difference of the two passes' logits."""


def make_model(settings: Settings) -> Any:
    """A random model with weights large enough for attention that prefers something."""
    torch.manual_seed(settings.seed)
    arguments: dict[str, Any] = {
        "vocab_size": settings.vocabulary, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": settings.layers, "head_dim": 16,
        "attn_implementation": "vkvtrain",
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**arguments)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)
    dtype: Any = torch.float32 if settings.autocast else getattr(torch, settings.dtype)
    return model.to(dtype)


def decode(model: Any, ids: Tensor, prompt: int, config: EvictionConfig) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Logits [rows, tokens, V] of a decode token by token; after each event, by tokens seen, the positions that each
    layer holds, [rows, Hkv, budget]."""
    cache = EvictionCache(config, model.config)
    held, logits = {}, [model(input_ids=ids[:, :prompt], **cache_argument(cache)).logits]
    for token in range(prompt, ids.shape[1]):
        before = cache.stats()[0]["evictions"]
        logits.append(model(input_ids=ids[:, token : token + 1], **cache_argument(cache)).logits)
        if cache.stats()[0]["evictions"] > before:
            layers = range(len(cache.layers))
            held[token + 1] = [torch.stack([cache.positions(i, row) for row in range(len(ids))]) for i in layers]
    return torch.cat(logits, 1), held


@torch.no_grad()
def measure(model: Any, settings: Settings, policy: str) -> Agreement:
    """Both passes over the same rows, side by side."""
    config = EvictionConfig(policy=policy, budget=settings.budget, window=settings.window)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, settings.vocabulary, (settings.rows, settings.tokens), generator=generator)
    with torch.autocast("cpu", getattr(torch, settings.dtype), enabled=settings.autocast):
        with simulated_eviction(model, config, [settings.prompt] * settings.rows) as trace:
            simulated = model(input_ids=ids, use_cache=False).logits
        decoded, held = decode(model, ids, settings.prompt, config)
    shares = []
    for seen, layers in held.items():
        for layer, positions in enumerate(layers):
            alive = trace.evict_at[layer][:, :, :seen] > seen
            shares.append(alive.gather(-1, positions).float().mean(-1).flatten())
    share = torch.cat(shares)
    return Agreement(
        policy, len(share), int((share == 1).sum()), round(share.mean().item(), 5),
        (simulated.float() - decoded.float()).abs().max().item(),
    )  # fmt: skip


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    model = make_model(settings)
    for policy in settings.policies:
        found = measure(model, settings, policy)
        print(
            f"{policy:12} {found.equal_sets} of {found.sets} kept sets equal, {found.equal_entries:.2%} of entries; "
            f"logits within {found.logits:.2g}"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
