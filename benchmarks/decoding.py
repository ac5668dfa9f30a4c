"""Decoding with a bounded cache against decoding with a cache that grows.

    python benchmarks/decoding.py                  # SmolLM2-135M's shape, a few minutes on two CPU cores
    python benchmarks/decoding.py --device cuda    # Qwen3-1.7B's shape, 16k tokens, batch 16, budget 2048

Random weights, greedy, no end token. Two questions, all sides in one process in turn:

- the same number of tokens decoded with transformers' `DynamicCache`, step by step; with its `StaticCache` of the full
  length, compiled; and with `EvictionCache`, step by step and compiled: tokens/s, peak memory (bytes of cache storage
  at the end; on a GPU of the whole process too), and what evictions cost: the share of our time, and operator calls;
- one window of tokens, one eviction included, decoded with equally many entries held: milliseconds a token of
  `DynamicCache` and of `EvictionCache`. What is lost there is overhead.

What is compiled is one graph, `torch.compile(fullgraph=True)`, in mode `reduce-overhead` (CUDA graphs) on a GPU; the
first steps of each decoding, which compile and record, are not timed. Prints medians and ratios, writes JSON.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from measure import ROOT, Kernels, machine, write
from transformers import Cache, DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.cache import layer
from vkvtrain.generation.decoders import Compiled, Eager, compiled
from vkvtrain.versions import cache_argument

WARM_UP = 4
"""Steps of each decoding that are not timed: they compile, and record CUDA graphs."""
DYNAMIC, STATIC, OURS, COMPILED = "dynamic cache", "static cache, compiled", "ours", "ours, compiled"


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


class Stock:
    """transformers' own caches, step by step or compiled as ours is."""

    def __init__(self, model: Any, cache: Cache, compile: bool) -> None:
        self.cache = cache

        def step(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return model(input_ids=tokens, position_ids=positions, **cache_argument(cache)).logits

        self.forward = compiled(step, model.device) if compile else step


@dataclass(frozen=True)
class Side:
    """A model with a kind of cache and a way to step."""

    model: Any
    make_cache: Callable[[], Cache]
    decoder: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Decoding:
    seconds: float
    """Of the steps that are timed."""
    seconds_to_warm_up: float
    """Of those before: where a step is compiled, of compiling it."""
    cache_bytes: int
    """Of the keys and values stored at the end."""


@torch.no_grad()
def decode(side: Side, prompt: torch.Tensor, tokens: int) -> Decoding:
    """`tokens` greedy steps after the prompt and a few steps that warm up."""
    device = prompt.device
    cache = side.make_cache()
    logits = side.model(input_ids=prompt, **cache_argument(cache), logits_to_keep=1).logits
    decoder = side.decoder(side.model, cache)
    position = torch.full((len(prompt), 1), prompt.shape[1], device=device)
    times = []
    for steps in (WARM_UP, tokens):
        _wait(device)
        times.append(time.perf_counter())
        for _ in range(steps):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = decoder.forward(token, position)
            position += 1
    _wait(device)
    times.append(time.perf_counter())
    return Decoding(times[2] - times[1], times[1] - times[0], stored_bytes(cache))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed_evictions(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each event, of one layer or of several, while the block runs; the device is waited for around each."""
    original = layer._evict_rows
    seconds: list[float] = []

    def timed(*arguments: Any) -> None:
        _wait(device)
        began = time.perf_counter()
        original(*arguments)
        _wait(device)
        seconds.append(time.perf_counter() - began)

    layer._evict_rows = timed
    try:
        yield seconds
    finally:
        layer._evict_rows = original


@contextmanager
def counted_evictions() -> Iterator[Kernels]:
    """Operator calls of events while the block runs."""
    original, kernels = layer._evict_rows, Kernels()

    def counted(*arguments: Any) -> None:
        with kernels:
            original(*arguments)

    layer._evict_rows = counted
    try:
        yield kernels
    finally:
        layer._evict_rows = original


def stored_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache has allocated."""
    layers: Any = cache.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def sides_of(size: dict[str, Any]) -> dict[str, Side]:
    """Everything that is compared, by name."""
    config = EvictionConfig(policy=size["policy"], budget=size["budget"], window=size["window"])
    stock, ours = make_model(size, "sdpa"), make_model(size, "vkvtrain")
    total = size["prompt"] + WARM_UP + size["tokens"]

    def evicting() -> EvictionCache:
        return EvictionCache(config, ours.config)

    return {
        DYNAMIC: Side(stock, DynamicCache, partial(Stock, compile=False)),
        STATIC: Side(
            stock, partial(StaticCache, config=stock.config, max_cache_len=total), partial(Stock, compile=True)
        ),
        OURS: Side(ours, evicting, Eager),
        COMPILED: Side(ours, evicting, partial(Compiled, capacity=size["budget"] + size["window"])),
    }


def measure(size: dict[str, Any], sides: dict[str, Side], device: torch.device) -> dict[str, dict[str, float]]:
    """Of each side the medians over the rounds."""
    generator = torch.Generator().manual_seed(0)
    ids, held = (
        torch.randint(0, size["vocab"], (size["rows"], length), generator=generator).to(device)
        for length in (size["prompt"], size["budget"])
    )
    some = max(1, min(size["tokens"], 8 * size["window"]) // size["window"]) * size["window"]
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
    for name, side in sides.items():
        found[name]["seconds_to_compile"].append(decode(side, ids, 1).seconds_to_warm_up)
    for number in range(size["rounds"]):
        for name, side in sides.items():
            its = found[name]
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            timed = decode(side, ids, size["tokens"])
            its["tokens_per_second"].append(size["rows"] * size["tokens"] / timed.seconds)
            its["cache_bytes"].append(timed.cache_bytes)
            if device.type == "cuda":
                its["peak_bytes"].append(torch.cuda.max_memory_allocated())
            if name != STATIC:  # which attends to its full length at every step
                timed = decode(side, held, size["window"])
                its["milliseconds_a_step_at_equal_length"].append(timed.seconds / size["window"] * 1e3)
            if name in (OURS, COMPILED):
                with timed_evictions(device) as events:
                    timed = decode(side, held, some)
                its["share_of_time_evicting"].append(sum(events) / timed.seconds)
            print(f"round {number + 1} of {size['rounds']}: {name}", flush=True)
    for name in (OURS, COMPILED):
        with counted_evictions() as kernels:
            decode(sides[name], held, size["window"])  # one event
        found[name]["kernels_of_an_event"].append(kernels.calls)
    return {name: {what: statistics.median(values) for what, values in its.items()} for name, its in found.items()}


def main(settings: Settings) -> None:
    size = resolved(settings)
    device = torch.device(size["device"])
    found = measure(size, sides_of(size), device)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    results = {
        "settings": {name: value for name, value in size.items() if name != "output"},
        "sides": found,
        "cuda_graphs_skipped": skipped,
        "machine": machine(device),
    }
    total = size["prompt"] + WARM_UP + size["tokens"]
    print(f"\n{size['rows']} rows, {total} tokens each, budget {size['budget']} + {size['window']}")
    print("times: ours, compiled, over the row's (tokens/s), or the row's over it (milliseconds)")
    print("kernels: operator calls of one event, all layers")
    columns = [("tokens/s", 10), ("times", 7), ("cache MiB", 11), ("peak MiB", 10), ("ms at equal length", 20),
               ("times", 7), ("evicting", 10), ("kernels", 9), ("compiling", 11)]  # fmt: skip
    print(f"{'':24s}" + "".join(title.rjust(width) for title, width in columns))
    best = found[COMPILED]
    for name, its in found.items():
        own = its.get("milliseconds_a_step_at_equal_length")
        cells = [
            f"{its['tokens_per_second']:.1f}",
            f"{best['tokens_per_second'] / its['tokens_per_second']:.2f}",
            f"{its['cache_bytes'] / 2**20:.1f}",
            f"{its['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in its else "",
            "" if own is None else f"{own:.1f}",
            "" if own is None else f"{own / best['milliseconds_a_step_at_equal_length']:.2f}",
            f"{its['share_of_time_evicting']:.1%}" if "share_of_time_evicting" in its else "",
            f"{its['kernels_of_an_event']:.0f}" if "kernels_of_an_event" in its else "",
            f"{its['seconds_to_compile']:.0f} s" if "compiled" in name else "",
        ]
        print(f"{name:24s}" + "".join(cell.rjust(width) for cell, (_, width) in zip(cells, columns, strict=True)))
    if skipped:
        print(f"CUDA graphs were skipped {skipped} times: what is called compiled ran without them in part")
    write(results, size["output"])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
