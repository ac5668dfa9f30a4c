"""What is measured of a generation."""

import zlib
from collections.abc import Sequence

LOOP_NGRAM = 512
"""Longest n-gram, in tokens, whose repetition is looked for."""
LOOP_REPEATS = 4
LOOP_RATIO = 6.0
"""Compression ratio from which on a tail of text counts as a loop."""
_TAIL = 4096
_SHORTEST = 1024


def ends_in_a_repetition(tokens: Sequence[int], longest: int = LOOP_NGRAM, repeats: int = LOOP_REPEATS) -> bool:
    """Whether the tokens end in one n-gram, n up to `longest`, repeated at least `repeats` times and over 16 tokens."""
    for n in range(1, min(longest, len(tokens) // repeats) + 1):
        times = max(repeats, -(-16 // n))
        tail = list(tokens[-n:])
        if len(tokens) >= times * n and list(tokens[-times * n :]) == tail * times:
            return True
    return False


def compression_ratio(text: str) -> float:
    """Bytes of the last 4,096 characters over their bytes after zlib (level 9); 1 for an empty text."""
    data = text[-_TAIL:].encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data, 9)) if data else 1.0


def is_looping(tokens: Sequence[int], text: str = "") -> bool:
    """Whether a generation was looping when it ended.

    Either its tokens end in one n-gram (n up to 512) repeated at least four times and over 16 tokens, or the last 4,096
    characters of its text, of which there must be 1,024 at least, compress by a factor of 6 or more. The second finds
    loops that vary a little each time round, as reasoning models' do. Mathematics in prose compresses by 2.6 (the
    solutions of MATH-500, 5.0 at most); only large tables reach 6 without a loop.
    """
    dense = len(text) >= _SHORTEST and compression_ratio(text) >= LOOP_RATIO
    return dense or ends_in_a_repetition(tokens)
