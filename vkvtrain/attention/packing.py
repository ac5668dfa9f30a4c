"""Packed batches: several documents one after another in a row. Each becomes a right-padded row of its own.

So documents never see each other, and each has its own prompt, randomness and events, by the same code as one that lies
alone in its row.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vkvtrain.events import Chunks


def checked_documents(documents: Any, prompts: Sequence[int | Chunks]) -> list[list[int]]:
    """Token lengths of the documents of each row, as lists of Python ints.

    Args:
        documents: of each row the lengths of its documents, in order.
        prompts: of each document, in order, its prompt length or chunks.

    Raises:
        ValueError: lengths that are no positive whole numbers, another number of prompts than of documents, or a prompt
            that is longer than its document.
    """
    try:
        lengths = [[operator.index(length) for length in row] for row in documents]
    except TypeError:
        raise ValueError(
            f"documents must hold a list of token lengths for each row, such as [[12, 9], [30]], got {documents!r}"
        ) from None
    for row, documents_of_row in enumerate(lengths):
        if not documents_of_row or min(documents_of_row) < 1:
            raise ValueError(
                f"documents: every row needs at least one document of at least one token, row {row}: {documents_of_row}"
            )
    flat = [length for documents_of_row in lengths for length in documents_of_row]
    if len(flat) != len(prompts):
        raise ValueError(
            f"prompt_lengths has {len(prompts)} entries for {len(flat)} documents: give one for each document, in order"
        )
    for number, (length, prompt) in enumerate(zip(flat, prompts, strict=True)):
        end = prompt if isinstance(prompt, int) else prompt[-1][1]
        if end > length:
            raise ValueError(
                f"prompt_lengths: the prompt of document {number} ends at {end}, after the document's {length} tokens"
            )
    return lengths


class Layout:
    """Where the tokens of a packed batch [B, S] lie when every document has a row, [documents, longest].

    Args:
        documents: of each row the lengths of its documents.
        lengths: tokens of each row, padding excluded.
        width: columns of the batch, S.

    Raises:
        ValueError: documents that do not add up to their row.
    """

    def __init__(self, documents: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> None:
        if len(documents) != len(lengths):
            raise ValueError(f"documents has {len(documents)} rows for a batch of {len(lengths)}: give a list for each")
        for row, (documents_of_row, length) in enumerate(zip(documents, lengths, strict=True)):
            if sum(documents_of_row) != length:
                raise ValueError(
                    f"documents of row {row} add up to {sum(documents_of_row)} tokens, but the row has {length}: name "
                    "every document, and mask padding at the row's end by attention_mask"
                )
        self.batch = (len(documents), width)
        self.documents = [length for documents_of_row in documents for length in documents_of_row]
        """Tokens of each document."""
        self.longest = max(self.documents)
        packed = [row * width + token for row, length in enumerate(lengths) for token in range(length)]
        alone = [n * self.longest + token for n, length in enumerate(self.documents) for token in range(length)]
        self._places = torch.tensor([packed, alone], dtype=torch.int64)
        """Of every token, its place in the flattened batch and in the flattened rows of documents."""

    def on(self, device: torch.device) -> "Layout":
        """The same layout with its indices on a device."""
        moved = object.__new__(Layout)
        moved.__dict__.update(self.__dict__, _places=self._places.to(device))
        return moved

    def apart(self, packed: Tensor) -> Tensor:
        """[B, H, S, D] -> [documents, H, longest, D]; zero at padding."""
        shape = (len(self.documents), self.longest)
        return _moved(packed.transpose(1, 2), self._places[0], self._places[1], shape).transpose(1, 2)

    def together(self, apart: Tensor) -> Tensor:
        """[documents, longest, H, D] -> [B, S, H, D]; zero at padding."""
        return _moved(apart, self._places[1], self._places[0], self.batch)


def _moved(source: Tensor, places: Tensor, to: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tokens of [n, s, H, D] from some places to others in `shape`; gradients are gathered, never added up."""
    tokens = source.flatten(0, 1).index_select(0, places)
    fresh = source.new_zeros(shape[0] * shape[1], *source.shape[2:])
    return fresh.index_copy(0, to, tokens).unflatten(0, shape)
