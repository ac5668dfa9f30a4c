"""From a step to the tensors of its forward passes: right-padded rows, or several documents packed into each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vkvtrain.training.data.order import pack, step_samples
from vkvtrain.training.data.rows import Row
from vkvtrain.training.settings import Recipe


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, of one document each or of several packed one after another."""

    input_ids: Tensor
    """int64 [B, S]."""
    attention_mask: Tensor
    """int64 [B, S]."""
    predicting: Tensor
    """int64 [N], positions in [B * S] whose next token is a response token."""
    targets: Tensor
    """int64 [N], those next tokens."""
    prompt_lengths: list[int]
    """Of each document."""
    streams: list[tuple[int, int, int]]
    """(row index, 0, epoch) of each document."""
    documents: list[list[int]] | None = None
    """Tokens of the documents in each row, in order; None where every row is one document."""
    position_ids: Tensor | None = None
    """int64 [B, S], from 0 in each document; None where every row is one document."""


def collate(rows: Sequence[Row], epochs: Sequence[int], pad: int, device: torch.device) -> Batch:
    """A right-padded batch of one document a row.

    Args:
        rows: its rows.
        epochs: the epoch that each row is in.
        pad: token of the padding.
        device: where the tensors go.
    """
    bins = [[place] for place in range(len(rows))]
    return _batch(rows, epochs, bins, pad, device, packed=False)


def collate_packed(
    rows: Sequence[Row], epochs: Sequence[int], bins: Sequence[Sequence[int]], pad: int, device: torch.device
) -> Batch:
    """A batch whose rows hold several documents, one after another.

    Args:
        rows: the documents.
        epochs: the epoch that each document is in.
        bins: for each row of the batch the places of its documents in `rows`.
        pad: token of the padding.
        device: where the tensors go.
    """
    return _batch(rows, epochs, bins, pad, device, packed=True)


def _batch(
    rows: Sequence[Row],
    epochs: Sequence[int],
    bins: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    packed: bool,
) -> Batch:
    documents = [[rows[place].length for place in places] for places in bins]
    width = max(map(sum, documents))
    ids = torch.full((len(bins), width), pad, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    predicting = []
    for b, places in enumerate(bins):
        start = 0
        for row in (rows[place] for place in places):
            ids[b, start : start + row.length] = torch.tensor(row.input_ids)
            positions[b, start : start + row.length] = torch.arange(row.length)
            predicting.append(b * width + start - 1 + torch.arange(row.prompt_length, row.length))
            start += row.length
    mask = (torch.arange(width) < torch.tensor([[sum(lengths)] for lengths in documents])).long()
    at = torch.cat(predicting)
    order = [place for places in bins for place in places]
    return Batch(
        ids.to(device), mask.to(device), at.to(device), ids.flatten()[at + 1].to(device),
        prompt_lengths=[rows[place].prompt_length for place in order],
        streams=[(rows[place].index, 0, epochs[place]) for place in order],
        documents=documents if packed else None,
        position_ids=positions.to(device) if packed else None,
    )  # fmt: skip


def step_batches(
    recipe: Recipe, rows: Sequence[Row], step: int, rank: int, processes: int, pad: int, device: torch.device
) -> list[Batch]:
    """The batches of a process's share of a step, as many as every other process has.

    Args:
        recipe: whose `global_batch` is a multiple of `processes`.
        rows: the training rows.
        step: from 0.
        rank, processes: this process and how many there are.
        pad: token of the padding.
        device: where the tensors go.
    """
    size = recipe.training.batch_per_device
    if not recipe.data.packing:
        return in_batches(step_rows(recipe, rows, step, rank, processes), size, pad, device)
    chosen = step_rows(recipe, rows, step, 0, 1)
    documents, epochs = [row for row, _ in chosen], [epoch for _, epoch in chosen]
    bins = pack([row.length for row in documents], packing_length(recipe, rows), processes)[rank::processes]
    parts = [bins[start : start + size] for start in range(0, len(bins), size)]
    return [collate_packed(documents, epochs, part, pad, device) for part in parts]


def step_rows(recipe: Recipe, rows: Sequence[Row], step: int, rank: int, processes: int) -> list[tuple[Row, int]]:
    """(row, epoch) of a process's share of a step, longest first: every n-th row of the global batch."""
    lengths = [row.length for row in rows]
    training, data = recipe.training, recipe.data
    chosen = step_samples(lengths, step, training.global_batch, recipe.seed, data.group_by_length)
    return [(rows[index], epoch) for index, epoch in chosen[rank::processes]]


def in_batches(rows: Sequence[tuple[Row, int]], size: int, pad: int, device: torch.device) -> list[Batch]:
    """Batches of at most `size` rows, given with their epochs, in order."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collate([row for row, _ in part], [epoch for _, epoch in part], pad, device) for part in parts]


def packing_length(recipe: Recipe, rows: Sequence[Row]) -> int:
    """Tokens of a packed row: `data.packing_length`, or what the longest row needs."""
    return recipe.data.packing_length or max(row.length for row in rows)
