"""Training under a data-independent policy: `evict_at` of every layer before any layer has computed anything.

Where the newest survive, it is read off the event times. Otherwise the events are walked for many layers at once: an
event is many small kernels, which on a GPU cost the same for one layer and for all.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vkvtrain.lifetimes import Schedule, Walk, walked
from vkvtrain.logits import LayerInputs, LogitForm
from vkvtrain.selection import Selector

_ENTRIES = 2**16
"""Entries held by all rows and heads of one walk on a CPU, about: an event's integers stay in its cache."""
_ENTRIES_ON_DEVICE = 2**22
"""The same for an accelerator, all layers as a rule; bounds what an event allocates (a few hundred megabytes)."""


def newest(schedule: Schedule, selector: Selector) -> Tensor:
    """`evict_at` of every KV head of every layer where the newest survive, int64 [B, 1, S].

    After an event at `end` tokens a row holds its protected prefix of `p` positions and the newest `budget - p`. So key
    `j >= p` is dropped by the first event with `end > j + budget - p`.

    Args:
        schedule: events of the batch's sequences.
        selector: one that `keeps_newest`.
    """
    never = schedule.width + 1
    ends = [[event.position + 1 for event in sequence.events] for sequence in schedule.sequences]
    most = max(map(len, ends))
    # [B, most + 1], ascending in each row so that it can be searched: an event that never comes is each row's last, and
    # fills up rows with fewer events than others
    filled = [ends_of_row + [never] * (most + 1 - len(ends_of_row)) for ends_of_row in ends]
    table = schedule.index([end for ends_of_row in filled for end in ends_of_row]).view(len(ends), -1)
    # a row without events drops nothing, and its prompt shall not warn of being too long
    prompts = [sequence.prompt if sequence.events else 0 for sequence in schedule.sequences]
    prefix = schedule.index(selector.protected_prefix(prompts))[:, None]
    position = torch.arange(schedule.width, device=schedule.device)
    dropped_by = torch.searchsorted(table, position + schedule.budget - prefix, right=True).clamp(max=most)
    until = table.gather(-1, dropped_by).masked_fill(position < prefix, never)
    return until.masked_fill(position >= schedule.lengths[:, None], 0)[:, None]


def walk_layers(schedule: Schedule, selector: Selector, layers: Sequence[int], kv_heads: int) -> list[Tensor]:
    """`evict_at` of several layers, each int64 [B, Hkv, S], by walks over the rows of many layers.

    Args:
        schedule: events of the batch's sequences.
        selector: one that is `data_independent`.
        layers: their indices, for the noise.
        kv_heads: KV heads of each of them.
    """
    limit = _ENTRIES if schedule.device.type == "cpu" else _ENTRIES_ON_DEVICE
    size = max(1, limit // (len(schedule.sequences) * kv_heads * schedule.budget))
    evict_at = []
    for first in range(0, len(layers), size):
        together = layers[first : first + size]
        repeated = replace(schedule, sequences=[*schedule.sequences] * len(together), _index={})
        layer_of_row = [layer for layer in together for _ in schedule.sequences]
        # the policy looks at no entries: of these only the shapes are read
        no_entries = torch.empty(len(layer_of_row), kv_heads, schedule.width, 0, device=schedule.device)
        inputs = LayerInputs(no_entries, no_entries, no_entries, LogitForm(scaling=1.0))
        evict_at += walked(Walk(inputs, repeated, selector, layer_of_row)).split(len(schedule.sequences))
    return evict_at


class Foresight:
    """`evict_at` of the evicting layers of one pass, decided when the first of them asks.

    Args:
        selector: one that is `data_independent`.
        layers: the layers that evict.
    """

    def __init__(self, selector: Selector, layers: Sequence[int]) -> None:
        self._selector, self._layers = selector, layers
        self._newest: dict[torch.device, Tensor] = {}
        self._by_heads: dict[int, dict[int, Tensor]] = {}
        """Of all layers, as if each had so many KV heads: how many a later layer has is known when it asks."""

    @torch.no_grad()
    def evict_at(self, layer: int, kv_heads: int, schedule: Schedule) -> Tensor:
        """`evict_at` of one layer, int64 [B, Hkv, S], on the schedule's device; shared, so not to be written to.

        Args:
            layer: its index.
            kv_heads: its KV heads.
            schedule: events of the batch's sequences, the same for all layers but for its device.
        """
        if self._selector.keeps_newest:
            if schedule.device not in self._newest:
                self._newest[schedule.device] = newest(schedule, self._selector)
            return self._newest[schedule.device].expand(-1, kv_heads, -1)
        if kv_heads not in self._by_heads:
            evict_at = walk_layers(schedule, self._selector, self._layers, kv_heads)
            self._by_heads[kv_heads] = dict(zip(self._layers, evict_at, strict=True))
        return self._by_heads[kv_heads][layer].to(schedule.device)
