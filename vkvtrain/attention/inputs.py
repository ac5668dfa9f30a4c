"""What `simulated_eviction` is given, checked: prompt lengths, streams and the mask of the batch."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vkvtrain.events import Chunks, normalise_chunks
from vkvtrain.noise import Stream, stream_key


def checked_prompts(prompt_lengths: Sequence[int | Chunks]) -> list[int | list[tuple[int, int]]]:
    """Of each row its prompt length, or its chunks.

    Raises:
        ValueError: no rows, or entries that are neither positive whole numbers nor lists of chunks.
    """
    prompts = [_checked_prompt(prompt) for prompt in prompt_lengths]
    if not prompts:
        raise ValueError("prompt_lengths is empty: give one entry for each row of the batch")
    return prompts


def _checked_prompt(prompt: Any) -> int | list[tuple[int, int]]:
    """An entry of `prompt_lengths`: a positive length (Python's, NumPy's or a tensor's), or chunks."""
    try:
        length = operator.index(prompt)
    except TypeError:
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise ValueError(
                f"prompt_lengths must hold whole numbers or lists of (start, end) chunks, got {prompt!r}"
            ) from None
        return normalise_chunks(prompt)
    if length < 1:
        raise ValueError(f"prompt_lengths must be positive, got {length}")
    return length


def check_streams(seed: int, streams: Sequence[Stream] | None, rows: int) -> None:
    """Raise ValueError unless there is one stream for each row, or none at all."""
    if streams is None:
        return
    if len(streams) != rows:
        raise ValueError(f"streams has {len(streams)} entries for {rows} prompt_lengths: give one each")
    for stream in streams:
        stream_key(seed, stream)


def after_virtual_tokens(prompt: int | Chunks, count: int) -> int | Chunks:
    """A prompt length or chunks behind `count` virtual tokens, which belong to the first prompt."""
    if isinstance(prompt, int):
        return prompt + count
    (_, end), *later = prompt
    return [(0, end + count), *((start + count, stop + count) for start, stop in later)]


def right_padded_lengths(mask: Tensor, rows: int, width: int) -> list[int]:
    """Tokens of each row of a right-padded batch, from its mask [B, S].

    Raises:
        ValueError: a mask of another shape, a row without tokens, or padding elsewhere than at a row's end.
    """
    if tuple(mask.shape) != (rows, width):
        raise ValueError(
            f"simulated_eviction needs a two-dimensional attention_mask [{rows}, {width}], got {list(mask.shape)} (a "
            "copy of the model that was made inside the block makes masks of its own: copy it before the block)"
        )
    mask = mask.bool()
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} of the batch is all padding: give every row a token")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
        raise ValueError("simulated_eviction needs right-padded rows: set the tokenizer's padding_side to 'right'")
    return mask.sum(-1).tolist()
