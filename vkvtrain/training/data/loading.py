"""The tokenised rows of a recipe: read, understood, templated, and left out where they are too long."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from vkvtrain.clock import fixed_date
from vkvtrain.training.data.formats import detect, examples_of
from vkvtrain.training.data.rows import Example, Record, Row, TrainingData
from vkvtrain.training.data.sources import read_records
from vkvtrain.training.data.templates import tokenise
from vkvtrain.training.settings import DataSettings


@dataclass
class Reading:
    """The examples of one part of a source, and how many of its records had none."""

    records: Iterator[Record]
    settings: DataSettings
    progress: str | None = None
    unusable: int = 0
    conversations: int = 0
    """Examples with messages for a prompt."""
    form: str | None = None
    """The format; None before the first record."""

    def __iter__(self) -> Iterator[Example]:
        self.form = None if self.settings.format == "auto" else self.settings.format
        for record in tqdm(self.records, desc=self.progress, disable=self.progress is None, mininterval=2, leave=False):
            self.form = self.form or detect(record)
            found = False
            for example in examples_of(record, self.form, self.settings):
                found = True
                self.conversations += not isinstance(example.prompt, str)
                yield example
            self.unusable += not found


def load_data(settings: DataSettings, tokenizer: Any, progress: bool = False, ends: Sequence[int] = ()) -> TrainingData:
    """The tokenised rows of a recipe.

    Args:
        settings: what to read.
        tokenizer: the model's.
        progress: whether to show a bar.
        ends: tokens at which the model's generation configuration ends a response.

    Raises:
        ValueError: a source that is missing or malformed, or of which nothing is left to train on.
    """
    parts: list[list[Row]] = []
    all_lengths: list[int] = []
    too_long: list[tuple[int, int]] = []
    unusable = conversations = 0
    form = None
    limit = settings.max_length
    for name, records in zip(("training rows", "held-out rows"), read_records(settings), strict=True):
        reading = Reading(records, settings, name if progress else None)
        kept = []
        with fixed_date(tokenizer, settings.date):
            for row in tokenise(reading, tokenizer, settings, ends):
                all_lengths.append(row.length)
                if limit is None or row.length <= limit:
                    kept.append(row)
                else:
                    too_long.append((row.index, row.length))
        if not all_lengths:
            raise ValueError(
                f"{settings.source}: none of the {reading.unusable} training rows has a correct generation; set "
                "data.choose to 'first' to take them as they are"
            )
        if not kept and not parts:
            raise ValueError(
                f"data.max_length ({limit}) leaves no row: the shortest has {min(all_lengths)} tokens; raise it"
            )
        parts.append(kept)
        unusable += reading.unusable
        conversations += reading.conversations
        form = form or reading.form
    for line in without_effect(settings, form, conversations):
        warnings.warn(line, stacklevel=2)
    check_packing(settings, parts[0])
    taught = {row.input_ids[-1] for part in parts for row in part}
    return TrainingData(parts[0], parts[1], too_long, unusable, frozenset({*ends, *taught}))


def without_effect(settings: DataSettings, form: str | None, conversations: int) -> Iterator[str]:
    """A sentence for each setting that changes nothing in these data; what the recipe alone tells is refused there.

    Args:
        settings: of the data.
        form: their format.
        conversations: how many examples have messages for a prompt.
    """
    problems = form == "problem_generations"
    if settings.instruction and not problems:
        yield (
            f"data.instruction has no effect: it is said after the problem of 'problem_generations', and {form!r} rows "
            "have none: write it into the prompts, or set data.instruction to ''"
        )
    if settings.choose != "first_correct" and not problems:
        yield f"data.choose ({settings.choose}) has no effect: {form!r} rows have one response each: leave it out"
    if settings.turns == "each" and form not in ("messages", "conversations"):
        yield f"data.turns (each) has no effect: {form!r} rows have one response each: leave it out"
    if not conversations:
        for name, plain in (("system", None), ("template_kwargs", {})):
            if getattr(settings, name) != plain:
                yield f"data.{name} has no effect: every prompt is text, and no chat template is used: leave it out"
        if settings.response == "rendered":
            yield "data.response (rendered) has no effect: every prompt is text, and no chat template is used"


def check_packing(settings: DataSettings, rows: list[Row]) -> None:
    """Raise ValueError if a row does not fit into a packed one: nothing is truncated."""
    longest = max(rows, key=lambda row: row.length)
    if settings.packing_length is not None and longest.length > settings.packing_length:
        raise ValueError(
            f"data.packing_length ({settings.packing_length}) is shorter than the longest row ({longest.length} tokens)"
            ": raise it, or leave long rows out with data.max_length"
        )
