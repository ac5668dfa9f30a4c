"""A layer with a sliding window of its own: the newest W tokens of each row in a ring. Nothing is chosen here."""

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.cache.step import Counters, Ring
from vkvtrain.cache.storage import Storage
from vkvtrain.logits import LayerInputs, attend


class SlidingLayer(RowLayer):
    """Storage [rows, Hkv, W, D]; token i of a row lies in slot `i % W`. transformers' own layer would do for a padded
    batch, but its rows cannot have seen different numbers of tokens.
    """

    is_sliding = True

    def __init__(self, shared: Shared, index: int, window: int) -> None:
        super().__init__(shared, index)
        self.window = window

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One token is stored at once, over the oldest; a chunk attends to the ring and to itself before."""
        held, new = self.storage, key.shape[2]
        self.step = self.shared.step(self.counters, new, key.device, evicts=False)
        if new > 1:
            return torch.cat([held.keys, key], dim=2), torch.cat([held.values, value], dim=2)
        ring = self.step.ring(self.window)
        self._store(key, value, ring)
        return held.keys[:, :, : ring.filled], held.values[:, :, : ring.filled]

    def attend(self, inputs: LayerInputs, mask: Tensor | None) -> Tensor:
        new = inputs.query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(inputs, mask, is_causal=mask is None)
            self._take_prompt(inputs.key, inputs.value, mask)
            return out.transpose(1, 2)
        step = self.take_step()
        ring = step.ring(self.window)
        out = attend(inputs, ring.visible if new == 1 else ring.visible_to_chunk)
        if new > 1:
            self._store(inputs.key[:, :, self.window :], inputs.value[:, :, self.window :], ring)
        self.finish(step)
        return out.transpose(1, 2)

    def held_bytes(self, row: int) -> tuple[int, int]:
        held = min(self.counters.seen[row], self.window) * self.storage.entry_bytes
        return held, held

    def _take_prompt(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        rows, heads, width, _ = key.shape
        lengths = self.shared.row_lengths(mask, rows, width)
        keys = key.new_zeros(rows, heads, self.window, key.shape[-1])
        values = value.new_zeros(rows, heads, self.window, value.shape[-1])
        self.columns = width
        self.counters = Counters.of_prompts(lengths)
        for row, length in enumerate(lengths):
            newest = min(length, self.window)
            slot = torch.arange(length - newest, length, device=key.device) % self.window
            keys[row, :, slot] = key[row, :, width - newest :]
            values[row, :, slot] = value[row, :, width - newest :]
        self._storage = Storage(keys, values)
        self.shared.finish()

    def _store(self, key: Tensor, value: Tensor, ring: Ring) -> None:
        """Write the newest tokens into the ring, [rows, Hkv, q, D]."""
        for held, new in ((self.storage.keys, key), (self.storage.values, value)):
            newest = new[:, :, -self.window :]
            held.scatter_(2, ring.slot.expand(newest.shape), newest)
