"""Memory per device and FLOPs per step of training, item by item.

Bytes are counted where autograd and the optimiser keep them: frozen weights have no gradient and their products save no
input, but an adapter saves its own input, which peft casts to the adapter's type. Knows no kernels: what a kernel needs
for a moment is not in it. `benchmarks/plan_error.py` compares the total with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vkvtrain.planning.architecture import Architecture
from vkvtrain.planning.devices import Device
from vkvtrain.training.head import CHUNK_LOGITS

Strategy = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
_ALL = ("weights", "adapter", "gradients", "optimiser")
SHARDED = {"single": (), "ddp": (), "zero2": ("gradients", "optimiser"), "fsdp2": _ALL, "zero3": _ALL}
"""What each strategy spreads over the devices."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5 + 0.127 / 8}
"""Of a stored weight; 4-bit NormalFloat with doubly quantised scales has 0.127 bits of them (Dettmers et al. 2023)."""
ADAPTER = 4
"""Bytes of an adapter's weight: peft keeps adapters in float32."""
CHUNK_COPIES = 3
"""Float32 tensors of a chunk of logits that live together in the loss."""
BACKWARD = 2.5
"""FLOPs of attention's backward pass per forward: five products for two, as FlashAttention 2 computes scores again."""


@dataclass(frozen=True)
class Workload:
    """One training step."""

    seq: int
    """Tokens of a row."""
    budget: int | None
    """None: no eviction."""
    window: int = 64
    rows: int = 1
    """Rows of a forward pass on one device."""
    global_batch: int = 16
    gpus: int = 1
    strategy: Strategy = "single"
    weights: str = "bfloat16"
    """A key of `BYTES`."""
    compute: str = "bfloat16"
    checkpointing: bool = True
    r: int = 16
    distil: bool = False
    """Whether a teacher's forward pass is added."""


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    name: str
    formula: str
    value: float
    """Bytes, FLOPs, tokens: what the plan is of."""
    phase: Literal["", "loss", "backward"] = ""
    """When it is there, if not all the time: while the loss is computed, or in the backward pass of a layer."""


def peak(items: Sequence[Item]) -> float:
    """The largest sum at one time: what is always there, and the larger of the two phases."""
    sums = dict.fromkeys(("", "loss", "backward"), 0.0)
    for item in items:
        sums[item.phase] += item.value
    return sums[""] + max(sums["loss"], sums["backward"])


def memory(a: Architecture, w: Workload, device: Device) -> list[Item]:
    """Bytes on one device, by what they are for."""
    b, tokens, full = BYTES[w.compute], w.seq * w.rows, BYTES["float32"]

    def share(name: str) -> int:
        return w.gpus if name in SHARDED[w.strategy] else 1

    def over(name: str) -> str:
        return f" / {w.gpus}" if share(name) > 1 else ""

    inputs, note = _adapter_inputs(a, b)
    weights, formula = _weights(a, w)
    norms = 2 * a.hidden + (a.heads + a.kv_heads) * a.head_dim * a.norms_heads
    attention = 2 * (a.heads + a.kv_heads) * a.head_dim
    layer = full * norms + inputs + ADAPTER * w.r * a.adapted + b * attention + 3 * b * a.intermediate
    moment = (full + 3 * b) * a.intermediate
    items = [
        Item("weights", f"{formula}{over('weights')}", weights / share("weights")),
        Item("adapter", f"{a.adapter:,} x {ADAPTER}{over('adapter')}", a.adapter * ADAPTER / share("adapter")),
        Item("gradients", f"adapter x {ADAPTER}{over('gradients')}", a.adapter * ADAPTER / share("gradients")),
        Item("optimiser", f"adapter x 2 x {ADAPTER}{over('optimiser')}", 2 * a.adapter * ADAPTER / share("optimiser")),
    ]  # fmt: skip
    if "weights" in SHARDED[w.strategy] and w.gpus > 1:
        gathered = 2 * weights * a.layer_parameters / a.parameters
        items.append(Item("gathered layers", f"2 x weights x {a.layer_parameters:,} / {a.parameters:,}", gathered))
    saved = f"tokens x (4 norms + {note} + 4 r modules + {b:g} (q, k, v, out) + {b:g} x 3 I)"
    if w.checkpointing:
        items.append(Item("layer inputs", f"layers x tokens x {b:g} H", a.layers * tokens * b * a.hidden))
        items.append(Item("one layer's activations", saved, tokens * layer, "backward"))
    else:
        items.append(Item("activations", f"layers x {saved}", a.layers * tokens * layer))
    items.append(
        Item("gradients of one layer's activations", f"tokens x (4 + 3 x {b:g}) I", tokens * moment, "backward")
    )
    chunk = min(CHUNK_LOGITS, tokens * a.vocabulary)
    formula = f"{CHUNK_COPIES} x 4 x min(2^25, tokens x {a.vocabulary:,})"
    items.append(Item("logits, in chunks", formula, CHUNK_COPIES * 4 * chunk, "loss"))
    if w.budget is not None:
        formula = f"{a.evicting} layers x tokens x KV heads x 8"
        items.append(Item("lifetimes of the keys", formula, 8 * a.evicting * a.kv_heads * tokens))
    if device.overhead:
        items.append(Item("context, libraries, fragmentation", "assumed", device.overhead))
    return items


def _weights(a: Architecture, w: Workload) -> tuple[float, str]:
    """(bytes, formula) of the base weights; beside quantised layers peft makes the rest float32."""
    if not w.weights.endswith("bit"):
        return a.parameters * BYTES[w.weights], f"{a.parameters:,} x {BYTES[w.weights]:g}"
    rest = a.parameters - a.quantised
    stored = BYTES[w.weights]
    return a.quantised * stored + 4 * rest, f"({a.quantised:,} x {stored:.3g} + {rest:,} x 4)"


def _adapter_inputs(a: Architecture, b: float) -> tuple[float, str]:
    """(bytes a token, formula) of what the adapters of a layer save: a float32 copy each, or the inputs themselves."""
    if b < ADAPTER:
        return ADAPTER * a.adapter_inputs, "4 in"
    return b * (2 * a.hidden + a.intermediate), f"{b:g} (2 H + I)"  # the attention's output is saved already


def keys_seen(seq: int, budget: int | None, window: int) -> float:
    """Keys that the queries of a row see, summed: all before them, or under eviction half a window more than the budget
    at most."""
    if budget is None:
        return seq * seq / 2
    reach = min(seq, budget + window)
    return reach * reach / 2 + (seq - reach) * (budget + window / 2)


def flops(a: Architecture, w: Workload) -> list[Item]:
    """FLOPs of one optimiser step over all devices, by what they are for."""
    tokens = w.seq * w.global_batch
    seen = keys_seen(w.seq, w.budget, w.window)
    beside = keys_seen(w.seq, a.sliding_window, 0) if a.evicting < a.layers else 0.0
    attention = 4 * w.global_batch * a.heads * a.head_dim * (a.evicting * seen + (a.layers - a.evicting) * beside)
    products, full = 2 * a.active * tokens, keys_seen(w.seq, None, w.window)
    again = int(w.checkpointing)
    items = [
        Item("matrix products", f"2 x {a.active:,} x tokens x (forward 1 + gradient of inputs 1 + recomputed {again})",
             products * (2 + again)),
        Item("attention", f"4 x heads D x keys seen x (forward 1 + backward {BACKWARD} + recomputed {again})",
             attention * (1 + BACKWARD + again)),
        Item("adapter", f"6 x {a.adapter:,} x tokens", 6 * a.adapter * tokens),
    ]  # fmt: skip
    if w.distil:
        dense = 4 * w.global_batch * a.heads * a.head_dim * (a.evicting * full + (a.layers - a.evicting) * beside)
        items.append(Item("teacher", "one forward pass with the full cache", products + dense))
    return items
