"""The passcode probe: a fact that is stated once in long filler and asked for after everything else.

Random eviction with a pinned prompt keeps accuracy on reasoning and still loses such a fact, so a policy that reasons
well must show that it remembers too. Nothing is evicted while a prompt is written; the probes therefore make the model
decode something long (`vkv_passcode`) or have the filler decoded (`vkv_passcode_scored`) before the fact is asked for.
"""

import random
from collections.abc import Iterator
from typing import Any

import datasets

_PARTS = tuple(
    part.split(", ")
    for part in (
        "The baker, A sailor, Her uncle, The old teacher, My neighbour, A young farmer, The postman, Our gardener, "
        "The night nurse, A tired clerk, The violinist, His cousin, The carpenter",
        "watched, painted, repaired, carried, borrowed, described, washed, forgot, sketched, bought, lifted, measured",
        "a wooden chair, two blue lamps, the garden gate, an empty basket, some wet leaves, a brass key, "
        "the kitchen clock, a torn map, three small stones, the heavy curtain, a paper boat",
        "before breakfast, on a rainy Tuesday, near the harbour, behind the station, without a word, "
        "late in the evening, under the bridge, during the long winter, at the edge of town",
    )
)
"""Who, what they did, to what, and when or where."""


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end, of about nine words, in 15,444 variants."""
    while True:
        yield " ".join(rng.choice(part) for part in _PARTS) + "."


def filler(rng: random.Random, words: int) -> list[str]:
    """Sentences of at least `words` words in all."""
    found: list[str] = []
    count = 0
    for sentence in sentences(rng):
        if count >= words:
            break
        found.append(sentence)
        count += len(sentence.split())
    return found


def passcode(rng: random.Random) -> str:
    """Five digits, the first of them no zero."""
    return str(rng.randrange(10_000, 100_000))


def load(
    problems: int = 100, data_seed: int = 0, filler_words: int = 800, count_to: int = 100, **_: Any
) -> dict[str, datasets.Dataset]:
    """Notes that state a passcode once, and what to do before it is asked for.

    Args:
        problems: how many.
        data_seed: of all of them.
        filler_words: words around the passcode; it stands in the middle half.
        count_to: the model counts from 1 to this before it answers, so that something is decoded and evicted.
    """
    _check(problems=problems, filler_words=filler_words, count_to=count_to)
    rows = []
    for index in range(problems):
        rng = random.Random(f"passcode/{data_seed}/{index}")
        code, notes = passcode(rng), filler(rng, filler_words)
        notes.insert(rng.randint(len(notes) // 4, 3 * len(notes) // 4), f"The passcode is {code}.")
        rows.append({"notes": " ".join(notes), "count_to": count_to, "answer": code})
    return {"test": datasets.Dataset.from_list(rows)}


def load_scored(
    problems: int = 100, data_seed: int = 0, filler_words: int = 800, **_: Any
) -> dict[str, datasets.Dataset]:
    """A passcode in a short context, and four continuations: the same long filler, then the passcode or another one.

    The filler is the continuation's, so it is decoded, and the budget is reached whatever the model would say. Any
    model can be asked, with or without a chat template; guessing is right a quarter of the time.
    """
    _check(problems=problems, filler_words=filler_words)
    rows = []
    for index in range(problems):
        rng = random.Random(f"scored/{data_seed}/{index}")
        code = passcode(rng)
        before, after = " ".join(filler(rng, 40)), " ".join(filler(rng, filler_words))
        codes = [code]
        while len(codes) < 4:
            other = passcode(rng)
            if other not in codes:
                codes.append(other)
        codes.sort()
        rows.append(
            {
                "context": f"{before} The passcode is {code}.",
                "choices": [f"{after} The passcode is {candidate}" for candidate in codes],
                "answer": codes.index(code),
            }
        )
    return {"test": datasets.Dataset.from_list(rows)}


def _check(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
