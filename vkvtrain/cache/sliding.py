"""A layer with a sliding window of its own: the newest W tokens of each row in a ring. Nothing is chosen here."""

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.step import Counters, Ring
from vkvtrain.logits import LogitForm, attend


class SlidingLayer(RowLayer):
    """Storage [rows, Hkv, W, D]; token i of a row lies in slot `i % W`. transformers' own layer would do for a padded
    batch, but its rows cannot have seen different numbers of tokens.
    """

    is_sliding = True
    stored = ("keys", "values")

    def __init__(self, shared: Shared, index: int, window: int) -> None:
        super().__init__(shared, index)
        self.window = window

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One token is stored at once, over the oldest; a chunk attends to the ring and to itself before."""
        assert self.keys is not None
        assert self.values is not None
        new = key.shape[2]
        self.step = self.shared.step(self.counters, new, key.device, evicts=False)
        if new > 1:
            return torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        ring = self.step.ring(self.window)
        self._store(key, value, ring)
        return self.keys[:, :, : ring.filled], self.values[:, :, : ring.filled]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        new = query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(query, key, value, form, mask, is_causal=mask is None)
            self._take_prompt(key, value, mask)
            return out.transpose(1, 2)
        assert self.step is not None
        step, self.step = self.step, None
        ring = step.ring(self.window)
        out = attend(query, key, value, form, ring.visible if new == 1 else ring.visible_to_chunk)
        if new > 1:
            self._store(key[:, :, self.window :], value[:, :, self.window :], ring)
        self.finish(step)
        return out.transpose(1, 2)

    def held_bytes(self, row: int) -> tuple[int, int]:
        held = min(self.counters.seen[row], self.window) * self.entry_bytes()
        return held, held

    def _take_prompt(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        rows, heads, width, _ = key.shape
        lengths = self.shared.row_lengths(mask, rows, width)
        self.keys = key.new_zeros(rows, heads, self.window, key.shape[-1])
        self.values = value.new_zeros(rows, heads, self.window, value.shape[-1])
        self.columns = width
        self.is_initialized = True
        self.counters = Counters.of_prompts(lengths)
        for row, length in enumerate(lengths):
            newest = min(length, self.window)
            slot = torch.arange(length - newest, length, device=key.device) % self.window
            self.keys[row, :, slot] = key[row, :, width - newest :]
            self.values[row, :, slot] = value[row, :, width - newest :]
        self.shared.finish()

    def _store(self, key: Tensor, value: Tensor, ring: Ring) -> None:
        """Write the newest tokens into the ring, [rows, Hkv, q, D]."""
        assert self.keys is not None
        assert self.values is not None
        for storage, new in ((self.keys, key), (self.values, value)):
            newest = new[:, :, -self.window :]
            storage.scatter_(2, ring.slot.expand(newest.shape), newest)
