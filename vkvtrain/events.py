"""When eviction events happen: plain integer arithmetic, the same for training and decoding.

Event times depend on lengths alone, never on scores, so both passes know them without asking a device. Knows nothing of
tensors. What entry, budget, window and event mean stands in `docs/how-it-works.md`, with the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

Chunks = Sequence[tuple[int, int]]
"""Half-open [start, end) ranges of positions that decoding appends without eviction: the prompt and later turns."""


@dataclass(frozen=True)
class Event:
    """One eviction event of one sequence."""

    index: int
    """Number of the event in its sequence, from 0."""
    position: int
    """The token that was just written and attended, `t`; what is dropped is gone from `t + 1` on."""
    live: int
    """Entries held when the event happens, the new token included."""


def is_due(live: int, budget: int, window: int) -> bool:
    """Whether an event follows a decode token that left `live` entries in the cache."""
    return live > budget and live % window == 0


def normalise_chunks(prompt: int | Chunks, length: int | None = None) -> list[tuple[int, int]]:
    """A prompt length, or a list of (start, end) chunks, as a checked list of chunks.

    Raises:
        ValueError: chunks that are empty, overlap, do not start at 0 or end after `length`.
    """
    try:
        chunks = [(0, prompt)] if isinstance(prompt, int) else [(index(start), index(end)) for start, end in prompt]
    except (TypeError, ValueError):
        raise ValueError(f"prompt_lengths: chunks must be (start, end) pairs of whole numbers, got {prompt}") from None
    if not chunks or chunks[0][0] != 0:
        raise ValueError(f"prompt_lengths: the first chunk must start at position 0, got {list(chunks)}")
    before = 0
    for start, end in chunks:
        if start < before or end <= start:
            raise ValueError(f"prompt_lengths: chunks must be non-empty, ascending and disjoint, got {list(chunks)}")
        before = end
    if length is not None and before > length:
        raise ValueError(f"prompt_lengths: a prompt or chunk ends at {before}, after its row's {length} tokens")
    return chunks


@dataclass(frozen=True)
class Block:
    """`window` new entries, after which a policy that accumulates attention adds up what their queries attended to."""

    end: int
    """Tokens seen at its end."""
    live: int
    """Entries held at its end, a multiple of the window."""
    event: Event | None
    """The event that follows it, if one is due."""


def blocks(prompt: int | Chunks, length: int, budget: int, window: int) -> list[Block]:
    """A sequence of `length` tokens as blocks of `window` entries; what is left at its end is no block.

    Args:
        prompt: prompt length, or the chunks that are appended without eviction.
        length: tokens that the cache has seen.
        budget: entries kept after an event.
        window: newest entries, and the number of tokens between two events.
    """
    filled: list[Block] = []
    live = position = events = 0
    for start, end in [*normalise_chunks(prompt, length), (length, length)]:
        for stop, decodes in ((start, True), (end, False)):
            while position < stop:
                step = min(window - live % window, stop - position)
                live, position = live + step, position + step
                if live % window:
                    continue
                due = decodes and is_due(live, budget, window)
                filled.append(Block(position, live, Event(events, position - 1, live) if due else None))
                if due:
                    live, events = budget, events + 1
    return filled


def events_of(prompt: int | Chunks, length: int, budget: int, window: int) -> list[Event]:
    """Every event of a sequence of `length` tokens.

    Args:
        prompt: prompt length, or the chunks that are appended without eviction.
        length: tokens that the cache has seen.
        budget: entries kept after an event.
        window: newest entries, and the number of tokens between two events.
    """
    return [block.event for block in blocks(prompt, length, budget, window) if block.event is not None]


def evictions_by(prompt_length: int | Chunks, length: int, budget: int, window: int) -> int:
    """Number of eviction events once the cache has seen `length` tokens.

    For one prompt by arithmetic, as data sets ask for it: the first event comes with the first multiple of the window
    above budget and prompt, then one every `window` tokens.
    """
    if not isinstance(prompt_length, int):
        return len(events_of(prompt_length, length, budget, window))
    normalise_chunks(prompt_length, length)
    first = (max(budget, prompt_length) // window + 1) * window
    return 0 if length < first else (length - first) // window + 1


def peak_entries(prompt_length: int | Chunks, length: int, budget: int, window: int) -> int:
    """Most entries that a KV head held at once while the cache saw `length` tokens."""
    events = events_of(prompt_length, length, budget, window)
    if not events:
        return length
    since = length - 1 - events[-1].position
    return max(*(event.live for event in events), budget + since)
