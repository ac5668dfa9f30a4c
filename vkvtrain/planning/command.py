"""`vkvtrain plan`: what a training run or decoding needs and could reach, before anything is launched."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import tyro
from rich.console import Console
from rich.table import Table

from vkvtrain.config import EvictionConfig
from vkvtrain.outputs import check_file
from vkvtrain.planning.architecture import Architecture, preset_names, read_architecture
from vkvtrain.planning.decoding import Decoding, Roof, roof
from vkvtrain.planning.devices import Device, find_device
from vkvtrain.planning.training import Item, Strategy, Workload, flops, memory, peak
from vkvtrain.shipped import find_recipe
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.settings import Recipe

GIB = 2**30
TINY_ROW = 192
"""Tokens that hold every row of the embedded task."""
Weights = Literal["float32", "bfloat16", "float16", "8bit", "4bit"]


@dataclass
class EstimateArguments:
    """Memory per device and FLOPs of a training step, slots and tokens per second of decoding, each with its formula.

    With a recipe (`vkvtrain plan qwen3-8b --gpus 8 --strategy fsdp2`; a file, or a shipped one's name) its settings are
    planned, and the options below replace them. Nothing is downloaded but a configuration, and nothing is run: these
    are sums on paper. `benchmarks/plan_error.py` compares the memory with measured peaks.
    """

    model_config: str
    """A preset (qwen3-8b, ...), a directory with a config.json, or a Hub name."""
    seq: int = 32768
    """Tokens of a row, and that a decoded sequence grows to."""
    budget: int = 4096
    """Entries kept after an eviction event; 0: no eviction."""
    window: int = 64
    """Newest entries; tokens between two events."""
    gpus: int = 1
    """Devices."""
    strategy: Strategy = "single"
    """How training is spread over them."""
    device: str = "h100"
    """b200, h200, h100, a100, a100-40gb, l40s, rtx5090, rtx4090, mi300x, or cpu (measured here)."""
    rows: int = 1
    """Rows of a forward pass on one device (`training.batch_per_device`)."""
    global_batch: int = 16
    """Rows of an optimiser step."""
    weights: Weights = "bfloat16"
    """How the base weights are stored."""
    checkpointing: bool = True
    """Gradient checkpointing."""
    r: int = 16
    """Rank of the adapter."""
    objective: Literal["sft", "distill"] = "sft"
    """`distill` adds a teacher's forward pass."""
    mfu: float = 0.4
    """Share of the peak that is assumed to be reached, for the time of a step."""
    output: Path | None = None
    """JSON file to write as well."""


@dataclass(frozen=True)
class Estimate:
    """Everything that is printed."""

    memory: list[Item]
    flops: list[Item]
    evicted: Roof
    full: Roof
    seconds: float
    """Of a step at the assumed share of the peak."""

    @property
    def bytes(self) -> float:
        """On one device, at its peak."""
        return peak(self.memory)


def make_estimate(a: Architecture, w: Workload, device: Device, mfu: float) -> Estimate:
    """The estimate of a workload; decoding is on one device."""
    work = flops(a, w)
    dtype = w.compute
    return Estimate(
        memory(a, w, device), work,
        roof(a, Decoding(w.seq, w.budget, w.window, dtype), device),
        roof(a, Decoding(w.seq, None, w.window, dtype), device),
        sum(item.value for item in work) / (w.gpus * device.flops * mfu),
    )  # fmt: skip


def workload(arguments: EstimateArguments) -> Workload:
    """The settings of a step.

    Raises:
        ValueError: settings that do not hold, by name.
    """
    for name in ("seq", "window", "gpus", "rows", "global_batch", "r"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for name in ("seq", "budget", "window", "gpus", "rows", "global_batch", "r"):
        if getattr(arguments, name) >= 2**31:
            raise ValueError(f"--{name.replace('_', '-')} must be below 2^31, got {getattr(arguments, name)}")
    if arguments.budget < 0:
        raise ValueError(f"--budget must be 0 (no eviction) or more, got {arguments.budget}")
    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, got {arguments.mfu}")
    if arguments.gpus > 1 and arguments.strategy == "single":
        raise ValueError(f"--gpus {arguments.gpus} needs a strategy: set --strategy ddp, fsdp2, zero2 or zero3")
    if arguments.global_batch % arguments.gpus:
        raise ValueError(f"--global-batch ({arguments.global_batch}) must be a multiple of --gpus ({arguments.gpus})")
    if arguments.rows * arguments.gpus > arguments.global_batch:
        raise ValueError(
            f"--rows ({arguments.rows}) on {arguments.gpus} devices are more than --global-batch "
            f"({arguments.global_batch}): lower --rows"
        )
    if arguments.budget:
        EvictionConfig(budget=arguments.budget, window=arguments.window, sinks=0)
    compute = arguments.weights if arguments.weights in ("float32", "float16") else "bfloat16"
    return Workload(
        arguments.seq, arguments.budget or None, arguments.window, arguments.rows, arguments.global_batch,
        arguments.gpus, arguments.strategy, arguments.weights, compute, arguments.checkpointing, arguments.r,
        arguments.objective == "distill",
    )  # fmt: skip


def table(title: str, items: Sequence[Item], unit: str, scale: float, digits: int = 2) -> Table:
    """Items with their formulas, and their sum, or their largest sum at one time."""
    made = Table("", "formula", unit, title=title, title_justify="left")
    made.columns[2].justify = "right"
    for item in sorted(items, key=lambda item: item.phase):
        when = {"": "", "loss": " (in the loss)", "backward": " (in a layer's backward pass)"}[item.phase]
        made.add_row(item.name + when, item.formula, f"{item.value / scale:,.{digits}f}")
    phases = any(item.phase for item in items)
    name, note = ("peak", "with the larger of the two phases") if phases else ("total", "")
    made.add_row(name, note, f"{peak(items) / scale:,.{digits}f}", style="bold")
    return made


def decoding_table(title: str, evicted: Roof, full: Roof) -> Table:
    """Both caches, line by line."""
    made = Table("", "formula", "evicted", "full", title=title, title_justify="left")
    for ours, theirs in zip(evicted.items, full.items, strict=True):
        made.add_row(ours.name, ours.formula, f"{ours.value:,.4g}", f"{theirs.value:,.4g}")
    formula = "slots / the longer of the two"
    speeds = [f"{one.tokens_per_second:,.0f}" for one in (evicted, full)]
    made.add_row("tokens/s at best", formula, *speeds, style="bold")
    return made


def summary(estimate: Estimate, w: Workload, device: Device, mfu: float) -> str:
    """An estimate in one line, as the headers of recipes state it."""
    return (
        f"{w.gpus} x {device.name}, {w.strategy}: {estimate.bytes / GIB:.1f} GiB a device, "
        f"{estimate.seconds:.0f} s a step at {mfu:.0%} of the peak"
    )


def show(a: Architecture, w: Workload, device: Device, estimate: Estimate, mfu: float, console: Console) -> None:
    """Print an estimate."""
    tokens, where = w.seq * w.rows, f"{w.gpus} x {device.name}, {w.strategy}"
    console.print(
        f"{a.name}: {a.parameters:,} parameters, adapter {a.adapter:,}; {a.layers} layers, {a.evicting} of them evict; "
        f"H {a.hidden}, {a.heads} heads, {a.kv_heads} KV heads, D {a.head_dim}, I {a.intermediate}",
        highlight=False,
    )
    title = f"training, memory of each device ({where}; {tokens:,} tokens a forward pass)"
    console.print(table(title, estimate.memory, "GiB", GIB))
    fits = estimate.bytes <= device.memory
    console.print(
        f"{'fits' if fits else 'DOES NOT FIT'}: {estimate.bytes / GIB:.1f} of {device.memory / GIB:.1f} GiB",
        style="green" if fits else "bold red", highlight=False,
    )  # fmt: skip
    batch = f"{w.global_batch} rows of {w.seq:,} tokens"
    console.print(table(f"training, FLOPs of a step ({batch})", estimate.flops, "PFLOP", 1e15, 1))
    tokens_per_second = w.seq * w.global_batch / estimate.seconds
    console.print(
        f"{estimate.seconds:,.1f} s a step, {tokens_per_second:,.0f} tokens/s at {mfu:.0%} of the peak "
        f"({device.flops:.3g} FLOP/s: {device.source})",
        highlight=False,
    )
    title = f"decoding on one {device.name}, {w.compute}, sequences of {w.seq:,} tokens"
    console.print(decoding_table(title, estimate.evicted, estimate.full))
    if estimate.full.tokens_per_second:
        ratio = estimate.evicted.tokens_per_second / estimate.full.tokens_per_second
        console.print(
            f"evicted / full: {ratio:.1f}x tokens/s, {estimate.evicted.slots / estimate.full.slots:.1f}x slots"
        )
    console.print(f"bandwidth {device.bandwidth:.3g} bytes/s: {device.source}", highlight=False)
    console.print(f"in short: {summary(estimate, w, device, mfu)}", highlight=False)


def run(arguments: EstimateArguments, console: Console) -> Estimate:
    """Estimate, print, write.

    Raises:
        ValueError: one sentence that names the setting and the fix.
    """
    w = workload(arguments)
    if arguments.output is not None:
        check_file(arguments.output, "--output")
    device = find_device(arguments.device)
    a = read_architecture(arguments.model_config, arguments.r)
    estimate = make_estimate(a, w, device, arguments.mfu)
    show(a, w, device, estimate, arguments.mfu, console)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        values = {"architecture": asdict(a), "workload": asdict(w), "device": asdict(device), **asdict(estimate)}
        arguments.output.write_text(json.dumps(values, indent=1) + "\n")
    return estimate


def arguments_of(recipe: Recipe) -> EstimateArguments:
    """What a recipe would do, on one device. Rows are as long as it admits (`data.max_length`)."""
    trained_for, training = recipe.trained_for(), recipe.training
    tiny = recipe.model.name == "tiny"
    preset = Path(recipe.model.name).name.lower()
    stored = recipe.model.dtype if recipe.model.quantization == "none" else recipe.model.quantization
    if stored == "auto":
        stored = "float32" if tiny else "bfloat16"
    longest = recipe.data.packing_length or recipe.data.max_length or (TINY_ROW if tiny else EstimateArguments.seq)
    return EstimateArguments(
        model_config=str(MODEL_PATH) if tiny else preset if preset in preset_names() else recipe.model.name,
        seq=longest, budget=trained_for.budget or 0, window=trained_for.window,
        rows=training.batch_per_device, global_batch=training.global_batch, weights=cast(Weights, stored),
        checkpointing=recipe.model.gradient_checkpointing, r=recipe.lora.r,
        objective="distill" if training.has_teacher else "sft",
    )  # fmt: skip


def parse(rest: Sequence[str]) -> tuple[EstimateArguments, Recipe | None]:
    """A command line, and the recipe that it names; options given beside a recipe replace what the recipe says."""
    if not rest or rest[0].startswith("-"):
        return tyro.cli(EstimateArguments, args=rest, prog="vkvtrain plan"), None
    recipe = load_recipe(find_recipe(rest[0]))
    return tyro.cli(EstimateArguments, args=rest[1:], prog="vkvtrain plan", default=arguments_of(recipe)), recipe


def main(rest: Sequence[str]) -> None:
    """The command line of `vkvtrain plan`."""
    arguments, recipe = parse(rest)
    console = Console()
    run(arguments, console)
    if recipe is None:
        return
    console.print(f"the recipe takes {recipe.training.steps} such steps", highlight=False)
    if recipe.training.objective == "on_policy":
        console.print(
            f"on_policy also generates {recipe.training.global_batch} responses of at most "
            f"{recipe.training.rollout_tokens} tokens in each step, beside the seconds of a step: see decoding",
            highlight=False,
        )
