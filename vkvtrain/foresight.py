"""Training under a data-independent policy: `evict_at` of every layer before any layer has computed anything.

Where the newest survive, it is read off the event times. Otherwise the events are walked for many layers at once: an
event is many small kernels, which on a GPU cost the same for one layer and for all.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vkvtrain.lifetimes import Schedule, Walk, walked
from vkvtrain.logits import LogitForm
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
    ends = [[event.position + 1 for event in row.events] for row in schedule.sequences]
    most = max(map(len, ends))
    # an event that never comes is each row's last, and fills up rows with fewer events than others
    table = schedule.index([end for its in ends for end in its + [never] * (most + 1 - len(its))]).view(len(ends), -1)
    prefix = schedule.index(selector.protected_prefix([row.prompt if row.events else 0 for row in schedule.sequences]))[
        :, None
    ]
    position = torch.arange(schedule.width, device=schedule.device)
    dropped_by = torch.searchsorted(table, position + schedule.budget - prefix, right=True).clamp(max=most)
    until = table.gather(-1, dropped_by).masked_fill(position < prefix, never)
    return until.masked_fill(position >= schedule.lengths[:, None], 0)[:, None]


def of_layers(schedule: Schedule, selector: Selector, layers: Sequence[int], kv_heads: int) -> list[Tensor]:
    """`evict_at` of several layers, each int64 [B, Hkv, S], by walks over the rows of many layers.

    Args:
        schedule: events of the batch's sequences.
        selector: one that is `data_independent`.
        layers: their indices, for the noise.
        kv_heads: KV heads of each of them.
    """
    limit = _ENTRIES if schedule.device.type == "cpu" else _ENTRIES_ON_DEVICE
    size = max(1, limit // (len(schedule.sequences) * kv_heads * schedule.budget))
    found = []
    for first in range(0, len(layers), size):
        its = layers[first : first + size]
        repeated = replace(schedule, sequences=[row for _ in its for row in schedule.sequences], _index={})
        of_rows = [layer for layer in its for _ in schedule.sequences]
        nothing = torch.empty(len(of_rows), kv_heads, schedule.width, 0, device=schedule.device)  # to look at
        walk = Walk(nothing, nothing, nothing, repeated, selector, of_rows, LogitForm(scaling=1.0))
        found += walked(walk).split(len(schedule.sequences))
    return found


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
        """`evict_at` of one layer, int64 [B, Hkv, S], on the schedule's device; not to be written to, as others share it.

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
            found = of_layers(schedule, self._selector, self._layers, kv_heads)
            self._by_heads[kv_heads] = dict(zip(self._layers, found, strict=True))
        return self._by_heads[kv_heads][layer].to(schedule.device)
