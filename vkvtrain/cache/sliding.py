"""A layer with a sliding window of its own: the newest W tokens of each row in a ring. Nothing is chosen here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vkvtrain.cache.base import RowLayer, Shared
from vkvtrain.logits import LogitForm, attend


class SlidingLayer(RowLayer):
    """Storage [rows, Hkv, W, D]; token i of a row lies in slot `i % W`. transformers' own layer would do for a padded
    batch, but its rows cannot have seen different numbers of tokens.
    """

    is_sliding = True
    stored = ("keys", "values")
    counted = ("seen",)

    def __init__(self, shared: Shared, index: int, window: int) -> None:
        super().__init__(shared, index)
        self.window = window

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One token is stored at once, over the oldest; a chunk attends to the ring and to itself before."""
        assert self.keys is not None
        assert self.values is not None
        new = key.shape[2]
        self.columns += new
        if new > 1:
            return torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        self._store(key, value)
        filled = min(max(self.seen), self.window)
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: LogitForm) -> Tensor:
        new = query.shape[2]
        self.shared.awaiting = None
        if not self.is_initialized:
            out = attend(query, key, value, form, mask, is_causal=mask is None)
            self._take_prompt(key, value, mask)
            return out.transpose(1, 2)
        self.refuse_padding(mask, new)
        device = key.device
        if new == 1:
            seen = self.shared.index(self.seen, device)[:, None, None, None]
            every = min(self.seen) >= key.shape[2]
            visible = None if every else torch.arange(key.shape[2], device=device) < seen
            return attend(query, key, value, form, visible).transpose(1, 2)
        out = attend(query, key, value, form, self._visible_to_chunk(new, device))
        self._store(key[:, :, self.window :], value[:, :, self.window :])
        return out.transpose(1, 2)

    def held_bytes(self, row: int) -> tuple[int, int]:
        held = min(self.seen[row], self.window) * self.entry_bytes()
        return held, held

    def _take_prompt(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        rows, heads, width, _ = key.shape
        # the mask's last query sees no more than a window, which is all that is stored
        lengths = self.shared.row_lengths(mask, rows, width)
        self.keys = key.new_zeros(rows, heads, self.window, key.shape[-1])
        self.values = value.new_zeros(rows, heads, self.window, value.shape[-1])
        self.columns = width
        self.is_initialized = True
        self.seen = [0] * rows
        for row, length in enumerate(lengths):
            self._store(key[row : row + 1, :, width - length :], value[row : row + 1, :, width - length :], [row])

    def _store(self, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Write tokens that follow those seen into the ring, [rows, Hkv, q, D]."""
        assert self.keys is not None
        assert self.values is not None
        rows = range(len(self.seen)) if rows is None else rows
        device, new = key.device, key.shape[2]
        kept = min(new, self.window)
        row = self.shared.index(rows, device)[:, None]
        first = self.shared.index([self.seen[r] + new - kept for r in rows], device)[:, None]
        slot = (first + torch.arange(kept, device=device)) % self.window
        self.keys[row, :, slot] = key[:, :, new - kept :].transpose(1, 2)
        self.values[row, :, slot] = value[:, :, new - kept :].transpose(1, 2)
        for r in rows:
            self.seen[r] += new

    def _visible_to_chunk(self, new: int, device: torch.device) -> Tensor:
        """What each token of a chunk sees of the ring and of the chunk, bool [rows, 1, new, W + new]."""
        seen = self.shared.index(self.seen, device)[:, None]
        slot = torch.arange(self.window, device=device)
        age = (seen - 1 - slot) % self.window
        ring = torch.where(
            age < seen, seen - 1 - age, -self.window
        )  # positions; what was never written is out of reach
        own = seen + torch.arange(new, device=device)
        distance = own[:, :, None] - torch.cat([ring, own], dim=1)[:, None]
        return ((distance >= 0) & (distance < self.window))[:, None]
