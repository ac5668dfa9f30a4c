"""Decoding with a bounded cache against decoding with a cache that grows.

    python benchmarks/decoding.py                  # SmolLM2-135M's shape, a few minutes on two CPU cores
    python benchmarks/decoding.py --device cuda    # Qwen3-1.7B's shape, 16k tokens, batch 16, budget 2048

Random weights, greedy, no end token. Two questions, all sides in one process in turn:

- the same number of tokens decoded with transformers' `DynamicCache`, with its `StaticCache` of the full length, and
  with `EvictionCache`: tokens/s, bytes of cache storage at the end, and the share of our time that goes into evictions;
- one window of tokens, one eviction included, decoded with equally many entries held: milliseconds a token of
  `DynamicCache` and of `EvictionCache`. What is lost there is overhead.

All sides run eagerly. Prints medians and ratios, writes JSON.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measure import ROOT, machine, write
from transformers import Cache, DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.cache import EvictionLayer


@dataclass
class Settings:
    device: str = "cpu"
    """`cpu` or `cuda`; decides the defaults of everything that is not given."""
    hidden: int | None = None
    """Hidden size (cpu 576, cuda 2048)."""
    intermediate: int | None = None
    """Width of the MLP (1536, 6144)."""
    layers: int | None = None
    """Layers (30, 28)."""
    heads: int | None = None
    """Query heads (9, 16)."""
    kv_heads: int | None = None
    """KV heads (3, 8)."""
    head_dim: int | None = None
    """Head dimension (64, 128)."""
    vocab: int | None = None
    """Vocabulary (49152, 151936)."""
    rows: int | None = None
    """Sequences (2, 16)."""
    prompt: int | None = None
    """Tokens of each prompt (32, 128)."""
    tokens: int | None = None
    """Tokens decoded in each sequence (480, 16384)."""
    budget: int | None = None
    """Entries kept (128, 2048)."""
    window: int = 64
    """Newest entries kept, and tokens between evictions."""
    policy: str = "vase_attnv"
    """Policy."""
    rounds: int | None = None
    """Rounds of which the median is taken, all sides in turn in each (3, 1); one short round before warms up."""
    output: Path = ROOT / "runs/benchmarks/decoding.json"
    """Where the results go."""


DEFAULTS: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152,
        "rows": 2, "prompt": 32, "tokens": 480, "budget": 128, "rounds": 3,
    },
    "cuda": {
        "hidden": 2048, "intermediate": 6144, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128,
        "vocab": 151936, "rows": 16, "prompt": 128, "tokens": 16384, "budget": 2048, "rounds": 1,
    },
}  # fmt: skip


def resolved(settings: Settings) -> dict[str, Any]:
    """The settings with their device's defaults."""
    if settings.device not in DEFAULTS:
        raise ValueError(f"device must be cpu or cuda, got {settings.device!r}")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    return {**DEFAULTS[settings.device], **given}


def make_model(size: dict[str, Any], attention: str) -> Any:
    """A model of the shape with random weights, the same for every attention."""
    torch.manual_seed(0)
    make_config: Any = Qwen3Config
    config = make_config(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"], tie_word_embeddings=True, attn_implementation=attention,
        max_position_embeddings=size["prompt"] + size["tokens"] + size["budget"],
    )  # fmt: skip
    dtype = torch.bfloat16 if size["device"] == "cuda" else torch.float32
    with torch.device(size["device"]):
        model: Any = Qwen3ForCausalLM(config)
        return model.to(dtype).eval()


@torch.no_grad()
def decode(model: Any, cache: Cache, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of `tokens` greedy steps after the prompt; the prompt's forward is not counted."""
    device = prompt.device
    logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
    token, position = logits[:, -1].argmax(-1, keepdim=True), torch.full((len(prompt), 1), prompt.shape[1])
    position = position.to(device)
    _wait(device)
    began = time.perf_counter()
    for _ in range(tokens):
        logits = model(input_ids=token, position_ids=position, past_key_values=cache).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        position += 1
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed_evictions(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each layer's event, while the block runs; the device is waited for around each."""
    layers: Any = EvictionLayer
    original: Callable[..., None] = layers._evict_rows
    seconds: list[float] = []

    def timed(layer: EvictionLayer, *arguments: Any) -> None:
        _wait(device)
        began = time.perf_counter()
        original(layer, *arguments)
        _wait(device)
        seconds.append(time.perf_counter() - began)

    layers._evict_rows = timed
    try:
        yield seconds
    finally:
        layers._evict_rows = original


def stored_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache has allocated."""
    layers: Any = cache.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def main(settings: Settings) -> None:
    size = resolved(settings)
    device = torch.device(size["device"])
    config = EvictionConfig(policy=size["policy"], budget=size["budget"], window=size["window"])
    stock, ours = make_model(size, "sdpa"), make_model(size, "vkvtrain")
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> torch.Tensor:
        return torch.randint(0, size["vocab"], (size["rows"], length), generator=generator).to(device)

    total = size["prompt"] + size["tokens"]
    sides: dict[str, tuple[Any, Callable[[], Cache]]] = {
        "dynamic cache": (stock, DynamicCache),
        "static cache": (stock, lambda: StaticCache(config=stock.config, max_cache_len=total)),
        "eviction cache": (ours, lambda: EvictionCache(config, ours.config)),
    }
    ids, held = prompt(size["prompt"]), prompt(size["budget"])
    rates: dict[str, list[float]] = {name: [] for name in sides}
    equal: dict[str, list[float]] = {name: [] for name in sides if name != "static cache"}
    sizes, share = {}, []
    for model, make in sides.values():  # warm up
        decode(model, make(), ids, 4)
    for number in range(size["rounds"]):
        for name, (model, make) in sides.items():
            cache = make()
            rates[name].append(size["rows"] * size["tokens"] / decode(model, cache, ids, size["tokens"]))
            sizes[name] = stored_bytes(cache)
            del cache
        for name in equal:
            model, make = sides[name]
            equal[name].append(decode(model, make(), held, size["window"]) / size["window"] * 1e3)
        with timed_evictions(device) as seconds:
            steps = max(size["window"], min(size["tokens"], 8 * size["window"]) // size["window"] * size["window"])
            spent = decode(ours, EvictionCache(config, ours.config), held, steps)
        share.append(sum(seconds) / spent)
        print(f"round {number + 1} of {size['rounds']}", flush=True)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    step = {name: statistics.median(values) for name, values in equal.items()}
    results = {
        "settings": {name: value for name, value in size.items() if name != "output"},
        "tokens_per_second": rate,
        "cache_bytes": sizes,
        "share_of_time_evicting": statistics.median(share),
        "milliseconds_a_step_at_equal_length": step,
        "machine": machine(device),
    }
    print(f"\n{size['rows']} rows, {total} tokens each, budget {size['budget']} + {size['window']}, eager")
    print(f"{'':16s}{'tokens/s':>10s}{'ours, times':>13s}{'cache MiB':>11s}{'ours, times':>13s}")
    for name in sides:
        print(
            f"{name:16s}{rate[name]:10.1f}{rate['eviction cache'] / rate[name]:13.2f}{sizes[name] / 2**20:11.1f}"
            f"{sizes['eviction cache'] / sizes[name]:13.2f}"
        )
    print(f"evicting: {results['share_of_time_evicting']:.1%} of decode time (events timed one by one)")
    dynamic, own = step["dynamic cache"], step["eviction cache"]
    print(f"{size['budget']} to {size['budget'] + size['window']} entries held: {own:.1f} ms a step, dynamic cache "
          f"{dynamic:.1f} ms, ratio {dynamic / own:.2f}")  # fmt: skip
    write(results, size["output"])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
