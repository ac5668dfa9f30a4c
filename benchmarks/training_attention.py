"""Attention under eviction, scoring included, against dense causal attention: forward and backward, time and memory.

    python benchmarks/training_attention.py                  # CPU: 9 query heads, 3 KV heads, D 64, float32
    python benchmarks/training_attention.py --device cuda    # shapes of Qwen3-8B, bfloat16, S=32k

Both sides run in turn in one process; ratios are dense / evicted, above 1 is faster. Apart from the whole, the event
walk alone (q, k, v to `evict_at`) and the attention alone (`evict_at` known, as when gradient checkpointing recomputes)
are timed; where the backend walks and attends at once, the whole is less than their sum. A policy that looks at no data
is decided for all layers of a model at once: its walk is that of a model of one layer, the most that a layer can cost.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measure import Kernels, in_turn, machine, peak_bytes, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vkvtrain import EvictionConfig
from vkvtrain.attention.backends import attend, attend_and_decide, resolve
from vkvtrain.foresight import Foresight
from vkvtrain.lifetimes import Schedule, lifetimes, make_schedule
from vkvtrain.logits import LayerInputs, LogitForm
from vkvtrain.selection import Selector


@dataclass(frozen=True)
class Shape:
    """One attention layer and its batch."""

    tokens: int
    budget: int
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    window: int
    prompt: int
    policy: str
    backend: str
    dtype: str
    device: str

    @property
    def on(self) -> torch.device:
        return torch.device(self.device)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value, and the gradient of the output [B, S, Hq, D]; in memory as a model's projections lie."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        made = [
            torch.randn(
                self.batch, self.tokens, count, self.head_dim, device=self.on, dtype=getattr(torch, self.dtype),
                generator=generator,
            )
            for count in heads
        ]  # fmt: skip
        query, key, value = (tensor.transpose(1, 2).requires_grad_() for tensor in made[:3])
        return query, key, value, made[3]

    def eviction(self) -> tuple[Schedule, Selector, LogitForm]:
        config = EvictionConfig(policy=self.policy, budget=self.budget, window=self.window)
        rows = range(self.batch)
        schedule = make_schedule(
            config, [self.prompt for _ in rows], rows, [self.tokens for _ in rows], self.tokens, self.on
        )
        return schedule, Selector(config), LogitForm(self.head_dim**-0.5)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def decide(inputs: LayerInputs, schedule: Schedule, selector: Selector) -> Tensor:
    """`evict_at` of a model's only layer."""
    if selector.data_independent:
        return Foresight(selector, [0]).evict_at(0, inputs.key.shape[1], schedule)
    return lifetimes(inputs.query, inputs.key, inputs.value, schedule, selector, 0, inputs.form)


def evicted(backend: str, inputs: LayerInputs, schedule: Schedule, selector: Selector) -> Tensor:
    """Attention output, decided as training does."""
    if selector.data_independent:
        return attend(backend, inputs, decide(inputs, schedule, selector), schedule)
    return attend_and_decide(backend, inputs, schedule, selector, 0)[0]


def step(shape: Shape, side: str, warm_up: bool = False) -> None:
    """Forward and backward of one side on fresh tensors: what the peak memory is measured of."""
    if warm_up:
        tokens = 4 * shape.window
        shape = Shape(**{**vars(shape), "tokens": tokens, "budget": 2 * shape.window, "prompt": shape.window})
    query, key, value, gradient = shape.tensors()
    if side == "dense":
        out = dense(query, key, value)
    else:
        schedule, selector, form = shape.eviction()
        backend = resolve(shape.backend, query, value)
        out = evicted(backend, LayerInputs(query, key, value, form), schedule, selector)
    out.backward(gradient)


def timed(shape: Shape, rounds: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The backend, and the seconds of each side."""
    query, key, value, gradient = shape.tensors()
    schedule, selector, form = shape.eviction()
    backend = resolve(shape.backend, query, value)
    inputs = LayerInputs(query, key, value, form)
    evict_at = decide(inputs, schedule, selector)

    def backward(out: Tensor) -> None:
        out.backward(gradient)
        query.grad = key.grad = value.grad = None

    sides = {
        "dense": lambda: backward(dense(query, key, value)),
        "evicted": lambda: backward(evicted(backend, inputs, schedule, selector)),
        "walk": lambda: decide(inputs, schedule, selector),
        "attention": lambda: backward(attend(backend, inputs, evict_at, schedule)),
    }
    return backend, in_turn(sides, rounds, shape.on)


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times, ratios and peaks of one shape."""
    backend, times = timed(shape, rounds)
    schedule, selector, form = shape.eviction()
    events = sum(len(sequence.events) for sequence in schedule.sequences) // shape.batch
    query, key, value, _ = shape.tensors()
    with Kernels() as kernels:
        decide(LayerInputs(query, key, value, form), schedule, selector)
    peaks = {side: peak_bytes(step, shape, side, device=shape.on) for side in ("dense", "evicted")}
    return {
        "shape": vars(shape),
        "backend": backend,
        "times": times,
        "ratio": times["dense"]["seconds"] / times["evicted"]["seconds"],
        "cpu_ratio": times["dense"]["cpu_seconds"] / times["evicted"]["cpu_seconds"],
        "attention_ratio": times["dense"]["seconds"] / times["attention"]["seconds"],
        "events": events,
        "kernels_of_an_event": kernels.calls / events,
        "peak_bytes": peaks,
        "peak_ratio": peaks["evicted"] / peaks["dense"],
    }


@dataclass
class Settings:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    tokens: list[int] = field(default_factory=list)
    """Sequence lengths; default 4096 8192 8192 on a CPU, 32768 on CUDA."""
    budgets: list[int] = field(default_factory=list)
    """Budget of each length; default 512 512 1024 on a CPU, 4096 on CUDA."""
    q_heads: int | None = None
    """Query heads; default 9, on CUDA 32."""
    kv_heads: int | None = None
    """KV heads; default 3, on CUDA 8."""
    head_dim: int | None = None
    """Head dimension; default 64, on CUDA 128."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Default float32, on CUDA bfloat16."""
    batch: int = 1
    """Rows."""
    window: int = 64
    """Newest entries, and tokens between two events."""
    prompt: int = 64
    """Tokens of the prompt."""
    policy: str = "vase_attnv"
    """Eviction policy."""
    backend: str = "auto"
    """Attention backend."""
    rounds: int = 5
    """Timed runs of each side, after one to warm up."""
    output: Path = Path("runs/training_attention.json")
    """Results as JSON."""

    def shapes(self) -> list[Shape]:
        """The shapes to measure.

        Raises:
            ValueError: another number of budgets than of lengths.
        """
        on_cuda = self.device == "cuda"
        tokens = self.tokens or ([32768] if on_cuda else [4096, 8192, 8192])
        budgets = self.budgets or ([4096] if on_cuda else [512, 512, 1024])
        if len(tokens) != len(budgets):
            raise ValueError(
                f"tokens has {len(tokens)} entries, budgets {len(budgets)}: give one budget for each length"
            )
        return [
            Shape(
                tokens=length, budget=budget, q_heads=self.q_heads or (32 if on_cuda else 9),
                kv_heads=self.kv_heads or (8 if on_cuda else 3), head_dim=self.head_dim or (128 if on_cuda else 64),
                batch=self.batch, window=self.window, prompt=self.prompt, policy=self.policy,
                backend=self.backend,
                dtype=self.dtype or ("bfloat16" if on_cuda else "float32"), device=self.device,
            )
            for length, budget in zip(tokens, budgets, strict=True)
        ]  # fmt: skip


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    shapes = settings.shapes()
    results: dict[str, Any] = {"machine": machine(shapes[0].on), "cases": []}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print(
        f"policy {settings.policy}, {shapes[0].dtype}; seconds, forward + backward; kernels of one event of the walk\n"
    )
    titles = [
        "S", "B", "dense", "evicted", "ratio", "ratio of CPU time", "walk", "kernels", "attention", "peak, of dense",
        "backend",
    ]  # fmt: skip
    for cells in (titles, ["---"] * len(titles)):
        print(f"| {' | '.join(cells)} |")
    for shape in shapes:
        case = measure(shape, settings.rounds)
        results["cases"].append(case)
        times = {name: its["seconds"] for name, its in case["times"].items()}
        cells = [
            shape.tokens, shape.budget, f"{times['dense']:.3f}", f"{times['evicted']:.3f}", f"{case['ratio']:.2f}",
            f"{case['cpu_ratio']:.2f}", f"{times['walk']:.3f}", f"{case['kernels_of_an_event']:.0f}",
            f"{times['attention']:.3f}",
            f"{case['peak_ratio']:.2f}", case["backend"],
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    write(results, settings.output)


if __name__ == "__main__":
    main()
