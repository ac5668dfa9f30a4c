"""What is measured of a generation."""

from collections.abc import Sequence


def is_looping(tokens: Sequence[int], longest: int = 64, repeats: int = 4) -> bool:
    """Whether the tokens end in one n-gram, n up to `longest`, repeated at least `repeats` times and over 16 tokens."""
    for n in range(1, min(longest, len(tokens) // repeats) + 1):
        times = max(repeats, -(-16 // n))
        tail = list(tokens[-n:])
        if len(tokens) >= times * n and list(tokens[-times * n :]) == tail * times:
            return True
    return False
