"""The endless order of training rows, of which the global batch of every step is a slice.

A pure function of (seed, step): it depends neither on the number of processes nor on how a batch is accumulated or
packed, so a run resumes at any step. Knows lengths; knows nothing of tokens.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

GROUP = 64
"""Steps whose rows are grouped by length together: enough for batches of similar lengths, few enough to stay random."""


def sample(position: int, rows: int, seed: int) -> tuple[int, int]:
    """(row, epoch) at a position of the endless order: one seeded permutation after another."""
    epoch, offset = divmod(position, rows)
    return _permutation(rows, seed, epoch)[offset], epoch


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(rows), rows)


def step_samples(
    lengths: Sequence[int], step: int, global_batch: int, seed: int, group_by_length: bool = False
) -> list[tuple[int, int]]:
    """(row, epoch) of every sequence of a step's global batch, longest first.

    Longest first, because every n-th of them is then a fair share for each of n processes, and what is accumulated one
    after another is of similar length. `group_by_length` sorts the rows of `GROUP` steps by length, cuts them into
    global batches, and shuffles those: less padding, the same rows.

    Args:
        lengths: tokens of each row.
        step: from 0.
        global_batch: sequences of a step.
        seed: the recipe's.
        group_by_length: whether whole steps hold rows of similar length.
    """
    if not group_by_length:
        chosen = [sample(step * global_batch + offset, len(lengths), seed) for offset in range(global_batch)]
        return sorted(chosen, key=lambda one: -lengths[one[0]])  # a stable sort: equal lengths keep their order
    window, place = divmod(step, GROUP)
    first = window * GROUP * global_batch
    together = [sample(first + offset, len(lengths), seed) for offset in range(GROUP * global_batch)]
    together.sort(key=lambda one: -lengths[one[0]])
    batch = random.Random(f"{seed}/groups/{window}").sample(range(GROUP), GROUP)[place]
    return together[batch * global_batch : (batch + 1) * global_batch]


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> list[list[int]]:
    """Bins of documents, first fit in order: each document goes into the first bin that has room for it.

    With documents given longest first this is first-fit decreasing, at most 11/9 of the fewest bins and a bit (Johnson
    1973).

    Args:
        lengths: tokens of each document, none above `capacity`.
        capacity: tokens of a bin.
        multiple: the number of bins is made a multiple of this, for as many in every process, by halving the fullest
            bins of several documents. Needs as many documents.

    Returns:
        Indices into `lengths`; fullest bins first, so that every n-th of them is a fair share.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for document, length in enumerate(lengths):
        place = next((i for i, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(document)
        room[place] -= length

    def tokens(documents: list[int]) -> int:
        return sum(lengths[document] for document in documents)

    while len(bins) % multiple:
        fullest = max((one for one in bins if len(one) > 1), key=tokens)
        bins.remove(fullest)
        bins += [fullest[::2], fullest[1::2]]
    return sorted(bins, key=lambda one: -tokens(one))
