"""The embedded task: a keyed running sum that needs its own past, with a once-stated passcode.

A prompt states keyed digits in random order and, somewhere among them, a two-digit passcode; the response visits the
keys in alphabetical order, restates each key and its digit, adds it to the running total modulo 10, and closes with the
total and the passcode::

    prompt     c1a3@58b7?
    response   <think>a:3+0=3;b:7+3=0;c:1+0=1;</think>1@58

Every step looks its key up in the prompt, so a cache that lost the entry cannot continue; the passcode is stated once
and used once, after everything else. Knows nothing of models or eviction.
"""

import hashlib
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MAX_PAIRS = 16
KEYS = string.ascii_lowercase[:MAX_PAIRS]
"""Keys in the order of the response; a problem with n pairs uses the first n."""
ALPHABET = string.digits + KEYS + "@?:+=;"
THINK, END_THINK = "<think>", "</think>"

_ANSWER = re.compile(r"^(\d)")
_PASSCODE = re.compile(r"^\d@(\d\d)")


@dataclass(frozen=True)
class KeyedSum:
    """One problem: `prompt` and `response` as text, and what is graded of the response."""

    prompt: str
    response: str
    answer: str
    passcode: str


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, a function of its text alone: splits are disjoint by construction."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def problem(split: Split, seed: int, index: int, pairs: int = MAX_PAIRS) -> KeyedSum:
    """Problem `index` of a split: the same for the same arguments, on every machine.

    Args:
        split: `train`, `validation` or `test`.
        seed: the data seed.
        index: which problem, from 0.
        pairs: how many keyed digits, 1 to 16.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 1 <= pairs <= MAX_PAIRS:
        raise ValueError(f"pairs must be from 1 to {MAX_PAIRS}, got {pairs}")
    rng = random.Random(f"{split}/{seed}/{index}/{pairs}")
    while True:
        digits = {key: rng.randrange(10) for key in KEYS[:pairs]}
        passcode = f"{rng.randrange(100):02d}"
        stated = [f"{key}{digits[key]}" for key in rng.sample(sorted(digits), pairs)]
        stated.insert(rng.randint(min(2, pairs), pairs), f"@{passcode}")  # never where sinks would keep it
        prompt = "".join(stated) + "?"
        if split_of(prompt) == split:
            break
    total, steps = 0, []
    for key, digit in digits.items():
        steps.append(f"{key}:{digit}+{total}={(total + digit) % 10};")
        total = (total + digit) % 10
    response = f"{THINK}{''.join(steps)}{END_THINK}{total}@{passcode}"
    return KeyedSum(prompt, response, str(total), passcode)


def problems(split: Split, seed: int, count: int, pairs: int = MAX_PAIRS) -> Iterator[KeyedSum]:
    """The first `count` problems of a split."""
    return (problem(split, seed, index, pairs) for index in range(count))


def grade(response: str, answer: str, passcode: str) -> tuple[bool, bool]:
    """(the total is right, the passcode is right) of a generated response; an unfinished chain has neither."""
    _, closed, final = response.partition(END_THINK)
    total, fact = _ANSWER.match(final), _PASSCODE.match(final)
    return bool(closed and total and total[1] == answer), bool(closed and fact and fact[1] == passcode)
