"""The slot engine against static batching, on responses whose lengths are spread like reasoning traces.

    python benchmarks/slots.py

Lengths are log-normal with a factor of ten between the 5th and the 95th percentile. The static side decodes the same
prompts in batches of as many rows with `model.generate` and the same `EvictionCache`; a batch lasts as long as its
longest response, and only each request's own tokens count. The slots are stepped one by one and compiled. Random
weights, greedy, no end token: lengths are limits. Prints tokens/s, the ratios, and what the ratio would be if all slots
were full to the end and steps were all that costs.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from measure import ROOT, in_turn, machine, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.generation import Request, generate
from vkvtrain.versions import cache_argument


@dataclass
class Settings:
    device: str = "cpu"
    """Where the model is; in bfloat16 on cuda."""
    hidden: int = 384
    """Hidden size; the MLP is three times as wide, a head has 64 dimensions and two heads share a KV head."""
    layers: int = 12
    """Layers."""
    vocab: int = 8192
    """Vocabulary."""
    slots: int = 8
    """Sequences decoded at once, and rows of a static batch."""
    requests: int = 96
    """Requests, in random order."""
    median: int = 64
    """Median length of a response, in tokens."""
    spread: float = 10.0
    """Length at the 95th percentile over that at the 5th."""
    longest: int = 1024
    """Longest response."""
    budget: int = 128
    """Entries kept."""
    window: int = 32
    """Newest entries kept, and tokens between evictions."""
    policy: str = "vase_attnv"
    """Policy."""
    rounds: int = 3
    """Rounds of which the median is taken, after one that warms up."""
    output: Path = ROOT / "runs/benchmarks/slots.json"
    """Where the results go."""


def make_model(settings: Settings) -> Any:
    torch.manual_seed(0)
    heads = settings.hidden // 64
    make_config: Any = Qwen3Config
    config = make_config(
        vocab_size=settings.vocab, hidden_size=settings.hidden, intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=64, tie_word_embeddings=True, attn_implementation="vkvtrain", eos_token_id=None, pad_token_id=0,
        max_position_embeddings=settings.longest + 128,
    )  # fmt: skip
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    model: Any = Qwen3ForCausalLM(config)
    return model.to(settings.device, dtype).eval()


def workload(settings: Settings) -> list[Request]:
    """Prompts of 16 to 64 tokens and the lengths of their responses."""
    generator = torch.Generator().manual_seed(0)
    sigma = math.log(settings.spread) / (2 * statistics.NormalDist().inv_cdf(0.95))
    lengths = (settings.median * torch.exp(sigma * torch.randn(settings.requests, generator=generator))).round()
    requests = []
    for stream, length in enumerate(lengths.clamp(1, settings.longest).int().tolist()):
        width = int(torch.randint(16, 65, (1,), generator=generator))
        prompt = torch.randint(1, settings.vocab, (width,), generator=generator).tolist()
        requests.append(Request(tuple(prompt), length, stream))
    return requests


@torch.no_grad()
def static(model: Any, config: EvictionConfig, requests: list[Request], slots: int) -> list[list[int]]:
    """Responses by batches of `slots` rows, each as long as its longest response."""
    responses = []
    for start in range(0, len(requests), slots):
        batch = requests[start : start + slots]
        width = max(len(request.prompt) for request in batch)
        padding = [width - len(request.prompt) for request in batch]
        rows = [[0] * pad + list(request.prompt) for pad, request in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        out = model.generate(
            torch.tensor(rows, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            **cache_argument(EvictionCache(config, model.config, [request.stream for request in batch])),
            max_new_tokens=max(request.max_new_tokens for request in batch), do_sample=False,
        )  # fmt: skip
        responses += [
            row[width : width + request.max_new_tokens] for row, request in zip(out.tolist(), batch, strict=True)
        ]
    return responses


def main(settings: Settings) -> None:
    device = torch.device(settings.device)
    model, requests = make_model(settings), workload(settings)
    config = EvictionConfig(policy=settings.policy, budget=settings.budget, window=settings.window)
    lengths = [request.max_new_tokens for request in requests]
    batches = [lengths[start : start + settings.slots] for start in range(0, len(lengths), settings.slots)]
    print(f"{len(lengths)} requests, {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}")
    answers: dict[str, list[list[int]]] = {}

    def by_slots(name: str, compile: bool) -> None:
        found = generate(model, config, requests, slots=settings.slots, end_tokens=(), compile=compile)
        answers[name] = [completion.tokens for completion in found]

    def by_batches() -> None:
        answers["static"] = static(model, config, requests, settings.slots)

    sides = {
        "slots": partial(by_slots, "slots", compile=False),
        "compiled": partial(by_slots, "compiled", compile=True),
        "static": by_batches,
    }
    times = in_turn(sides, settings.rounds, device)
    rows = {
        name: {
            "tokens_per_second": sum(lengths) / found["seconds"],
            "ratio": times["static"]["seconds"] / found["seconds"],
            "ratio_cpu_seconds": times["static"]["cpu_seconds"] / found["cpu_seconds"],
            "same_responses": sum(a == b for a, b in zip(answers[name], answers["static"], strict=True)),
        }
        for name, found in times.items()
    }
    results = {
        "settings": asdict(settings) | {"output": str(settings.output)},
        "lengths": lengths,
        "times": times,
        "sides": rows,
        "ratio_of_steps": settings.slots * sum(map(max, batches)) / sum(lengths),
        "machine": machine(device),
    }
    for name, row in rows.items():
        print(
            f"{name:10s}{row['tokens_per_second']:8.1f} tokens/s, {row['ratio']:.2f} times static "
            f"({row['ratio_cpu_seconds']:.2f} by CPU seconds), {row['same_responses']} of {len(requests)} responses "
            "the same"
        )
    print(f"with all slots full to the end, by steps alone: {results['ratio_of_steps']:.2f}")
    write(results, settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
