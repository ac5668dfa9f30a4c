"""What a cache layer stores, from the prompt on: tensors whose first dimension is the row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from vkvtrain.logits import LayerInputs, LogitForm, score_dtype

_MOVED = ("keys", "values", "entry_positions", "mass")
"""What has a slot for each entry, and is copied when the capacity changes."""


@dataclass(eq=False)
class Storage:
    """Keys [rows, Hkv, capacity, D] and values [rows, Hkv, capacity, Dv]."""

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        """Slots of each row and KV head."""
        return self.keys.shape[2]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's entries, all KV heads."""
        return self.keys.shape[1] * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, held) for name, held in named if isinstance(held, Tensor))

    @staticmethod
    def join(storages: "Sequence[Storage]") -> "Storage":
        """The rows of several of one kind and capacity, one after another."""
        joined = {
            name: torch.cat([getattr(storage, name) for storage in storages]) for name, _ in storages[0].tensors()
        }
        return replace(storages[0], **joined)

    def replace_row(self, row: int, source: "Storage") -> None:
        """Put the first row of another into `row`."""
        for name, held in self.tensors():
            held[row] = getattr(source, name)[0]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 [n]."""
        for name, held in self.tensors():
            setattr(self, name, held[rows])


@dataclass(eq=False)
class EntryStorage(Storage):
    """An evicting layer's (or one's that keeps everything): each row's entries in the first `live` slots, in order.

    What the policy does not read is empty: `mass` without slots, `queries` without places.
    """

    entry_positions: Tensor
    """int64 [rows, Hkv, capacity]; of a slot that is not in use, the position of the token that will take it."""
    mass: Tensor
    """Accumulated attention of each entry, [rows, Hkv, capacity]."""
    queries: Tensor
    """The newest `window` queries of each row, that of entry i at place `i % window`, [rows, Hq, R, D]."""
    philox: Tensor
    """Words of the rows' Philox keys, int64 [rows, 2]."""
    form: LogitForm
    """Scaling, soft cap and sinks of the layer's attention."""

    @classmethod
    def of_prompts(
        cls,
        inputs: LayerInputs,
        lengths: Sequence[int],
        philox: Sequence[tuple[int, int]],
        capacity: int,
        places: int,
        has_mass: bool,
    ) -> Self:
        """The prompts' entries and newest queries.

        Args:
            inputs: of the left-padded prompts.
            lengths: tokens of each row.
            philox: words of each row's Philox key.
            capacity: slots of each row.
            places: newest queries that are kept; 0 for none.
            has_mass: whether attention is accumulated.
        """
        query, key, value = inputs.query, inputs.key, inputs.value
        rows, heads, width, _ = key.shape
        storage = cls(
            keys=key.new_zeros(rows, heads, capacity, key.shape[-1]),
            values=value.new_zeros(rows, heads, capacity, value.shape[-1]),
            entry_positions=torch.arange(capacity, device=key.device).expand(rows, heads, -1).clone(),
            mass=key.new_zeros(rows, heads, capacity if has_mass else 0, dtype=score_dtype(key.dtype)),
            queries=query.new_zeros(rows, query.shape[1], places, query.shape[-1]),
            philox=torch.tensor(philox, dtype=torch.int64, device=key.device),
            form=inputs.form,
        )
        for row, length in enumerate(lengths):
            storage.keys[row, :, :length] = key[row, :, width - length :]
            storage.values[row, :, :length] = value[row, :, width - length :]
            newest = min(length, places)
            if newest:
                place = torch.arange(length - newest, length, device=key.device) % places
                storage.queries[row, :, place] = query[row, :, width - newest :]
        return storage

    def resize(self, capacity: int) -> None:
        """Another number of slots, the entries in the first ones kept."""
        if self.capacity == capacity:
            return
        kept = min(capacity, self.capacity)
        positions = self.entry_positions
        for name in _MOVED:
            old = getattr(self, name)
            if old.shape[2]:
                fresh = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
                fresh[:, :, :kept] = old[:, :, :kept]
                setattr(self, name, fresh)
        ahead = torch.arange(1, capacity - kept + 1, device=positions.device)
        self.entry_positions[:, :, kept:] = positions[:, :, kept - 1 : kept] + ahead

    def append(self, key: Tensor, value: Tensor, slot: Tensor) -> None:
        """Write new tokens' keys and values [rows, Hkv, q, D] into slots [rows, 1, q, 1]."""
        self.keys.scatter_(2, slot.expand(key.shape), key)
        self.values.scatter_(2, slot.expand(value.shape), value)

    def remember(self, query: Tensor, place: Tensor) -> None:
        """Write new tokens' queries [rows, Hq, q, D] into the ring; `place` is that of the newest ones."""
        newest = query[:, :, -self.queries.shape[2] :].to(self.queries.dtype)
        self.queries.scatter_(2, place.expand(newest.shape), newest)
