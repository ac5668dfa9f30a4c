"""Slots that fit and the roof of tokens per second of decoding, with the evicting and with the full cache."""

from dataclasses import dataclass

from vkvtrain.planning.architecture import Architecture
from vkvtrain.planning.devices import Device
from vkvtrain.planning.training import BYTES, Item, keys_seen

USABLE = 0.9
"""Share of a device's memory that weights and cache may take."""


@dataclass(frozen=True)
class Decoding:
    """Sequences that grow to `seq` tokens, in slots."""

    seq: int
    budget: int | None
    """None: the full cache."""
    window: int = 64
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Roof:
    """What a device could do at best."""

    items: list[Item]
    slots: int
    tokens_per_second: float


def roof(a: Architecture, d: Decoding, device: Device) -> Roof:
    """Slots that fit, and tokens per second if a step took as long as its bytes or its FLOPs at the device's peak.

    A slot is allocated at its largest; a step reads what is live, on average over a sequence that grows from nothing to
    `seq` tokens.
    """
    b = BYTES[d.dtype]
    entry = 2 * a.kv_heads * a.head_dim * b
    most = d.seq if d.budget is None else min(d.seq, d.budget + d.window)
    live = keys_seen(d.seq, d.budget, d.window) / d.seq
    beside = (a.layers - a.evicting) * min(d.seq, a.sliding_window)
    slot, read = entry * (a.evicting * most + beside), entry * (a.evicting * live + beside)
    weights = a.parameters * b
    free = USABLE * device.memory - device.overhead - weights
    slots = max(0, int(free / slot))
    touched = min(1.0, slots * a.expert_share)  # every sequence is sent to other experts
    streamed = (a.parameters - a.expert_parameters * (1 - touched)) * b
    seconds = (streamed + slots * read) / device.bandwidth
    products = slots * (2 * a.active + 4 * a.heads * a.head_dim * (a.evicting * live + beside)) / device.flops
    most_name = "seq" if d.budget is None else "min(seq, budget + window)"
    items = [
        Item("weights", f"{a.parameters:,} x {b:g}", weights),
        Item("a slot", f"2 KV heads D x {b:g} x ({a.evicting} layers x {most_name}{_beside(a)})", slot),
        Item("slots", f"({USABLE:g} memory - weights - context) / a slot", slots),
        Item("entries read", "mean over a sequence's growth", live),
        Item("bytes read a step", "weights + slots x entries read", streamed + slots * read),
        Item("FLOPs a step", "slots x (2 active parameters + 4 heads D x entries read)", products * device.flops),
        Item("bandwidth bound, s a step", f"bytes / {device.bandwidth:.3g}", seconds),
        Item("FLOP bound, s a step", f"FLOPs / {device.flops:.3g}", products),
    ]
    return Roof(items, slots, slots / max(seconds, products) if slots else 0.0)


def _beside(a: Architecture) -> str:
    return f" + {a.layers - a.evicting} layers x {a.sliding_window}" if a.evicting < a.layers else ""
