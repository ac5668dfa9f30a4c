"""Entries of [B, H, S, D] by row, head and position."""

import torch
from torch import Tensor


class Entries:
    """A view of [B, H, S, D] as rows of D numbers, whether heads or tokens come first in memory (else a copy)."""

    def __init__(self, source: Tensor) -> None:
        _, self.heads, width, self.dim = source.shape
        if source.transpose(1, 2).is_contiguous():
            self.flat = source.transpose(1, 2).flatten(0, 2)
            """[B * H * S, D]."""
            self._strides = (width * self.heads, 1, self.heads)
        else:
            self.flat = source.contiguous().flatten(0, 2)
            self._strides = (self.heads * width, width, 1)
        self._head = torch.arange(self.heads, device=source.device)[:, None] * self._strides[1]

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where entries lie in `flat`, int64 [N, H, L].

        Args:
            rows: int64 [N].
            positions: int64 [N, H, L].
        """
        base = rows[:, None, None] * self._strides[0] + self._head
        return base + (positions if self._strides[2] == 1 else positions * self._strides[2])

    def gather(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The entries at `positions` [N, H, L] of `rows` [N], [N, H, L, D]."""
        places = self.places(rows, positions)
        return self.flat.index_select(0, places.flatten()).view(*places.shape, self.dim)
