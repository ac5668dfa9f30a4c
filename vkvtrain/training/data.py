"""Training rows: read or generated, tokenised, ordered and collated.

A row is a prompt and a response; the loss is on the response, its end-of-sequence token included. Prompt and response
are tokenised apart, because that is what generation does: the prompt alone, then tokens appended. Knows nothing of
models.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vkvtrain.config import nearest
from vkvtrain.tiny import task
from vkvtrain.training.settings import DataSettings

GENERATED = ("tiny:keyed_sum",)
"""Sources that are generated instead of read."""


@dataclass(frozen=True)
class Example:
    """A prompt and its response as text, and where they come from, for error messages."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Row:
    """A tokenised example."""

    index: int
    """Number in its source, from 0: names the row's randomness, whatever is left out around it."""
    input_ids: list[int]
    prompt_length: int
    """Tokens of the prompt; the loss is on all after them."""

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class TrainingData:
    train: list[Row]
    held_out: list[Row]
    left_out: int
    """Rows longer than `data.max_length`."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows."""

    input_ids: Tensor
    """int64 [B, S]."""
    attention_mask: Tensor
    """int64 [B, S]."""
    predicting: Tensor
    """int64 [N], positions in [B * S] whose next token is a response token."""
    targets: Tensor
    """int64 [N], those next tokens."""
    prompt_lengths: list[int]
    streams: list[tuple[int, int, int]]
    """(row index, 0, epoch) of each row."""


def read_jsonl(path: Path) -> Iterator[Example]:
    """The examples of a JSONL file, with `prompt` and `completion` in each row; other keys are ignored.

    Raises:
        ValueError: a missing file, or a malformed row with its number.
    """
    if not path.is_file():
        raise ValueError(
            f"data.source: there is no file {str(path)!r} (generated data: {', '.join(GENERATED)}); give a JSONL file"
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} must be an object with 'prompt' and 'completion', got {type(row).__name__}")
            for key in ("prompt", "completion"):
                if key not in row:
                    raise ValueError(f"{where} has no {key!r}{nearest(key, list(row)) if row else ''}")
                if not isinstance(row[key], str):
                    raise ValueError(f"{where}: {key!r} must be text, got {type(row[key]).__name__}")
            if not row["completion"]:
                raise ValueError(f"{where}: 'completion' is empty, so there is nothing to train on")
            yield Example(row["prompt"], row["completion"], where)


def generate(split: task.Split, count: int) -> Iterator[Example]:
    """The first examples of a split of the embedded task; seed 0, as everywhere."""
    for number, problem in enumerate(task.problems(split, 0, count), start=1):
        yield Example(problem.prompt, problem.response, f"tiny:keyed_sum, {split} problem {number}")


def read_examples(settings: DataSettings) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of a source.

    Raises:
        ValueError: a source that is missing, malformed, or too small.
    """
    if settings.source in GENERATED:
        if settings.rows is None:
            raise ValueError(f"data.rows is required for {settings.source}: say how many problems to generate")
        return list(generate("train", settings.rows)), list(generate("validation", settings.held_out))
    if settings.source.startswith("tiny:"):
        raise ValueError(f"data.source: there is no {settings.source!r}{nearest(settings.source, list(GENERATED))}")
    examples = list(read_jsonl(Path(settings.source)))
    wanted = len(examples) - settings.held_out if settings.rows is None else settings.rows
    if wanted < 1 or wanted + settings.held_out > len(examples):
        raise ValueError(
            f"{settings.source} has {len(examples)} rows, too few for data.rows ({settings.rows or 'at least 1'}) and "
            f"data.held_out ({settings.held_out}): lower one of them"
        )
    return examples[:wanted], examples[len(examples) - settings.held_out :]


def tokenise(examples: Sequence[Example], tokenizer: Any) -> list[Row]:
    """Prompt with the tokenizer's special tokens, response without, end of sequence after it.

    Raises:
        ValueError: a tokenizer without an end-of-sequence token, or a prompt of no tokens.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token, so a response could never end: set one")
    if not examples:
        return []
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    responses = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
    rows = []
    for index, (example, prompt, response) in enumerate(zip(examples, prompts, responses, strict=True)):
        if prompt and prompt[-1] == end and not example.prompt.endswith(tokenizer.eos_token):
            prompt = prompt[:-1]  # tokenizers that close every text would end the sequence before the response
        if not prompt:
            raise ValueError(f"{example.where}: the prompt has no tokens; write at least one")
        if response[-1:] != [end]:
            response = [*response, end]
        rows.append(Row(index, [*prompt, *response], len(prompt)))
    return rows


def load_data(settings: DataSettings, tokenizer: Any) -> TrainingData:
    """The tokenised rows of a recipe.

    Raises:
        ValueError: a source that is missing or malformed, or of which `max_length` leaves nothing.
    """
    parts = [tokenise(examples, tokenizer) for examples in read_examples(settings)]
    limit = settings.max_length
    kept = [[row for row in part if limit is None or row.length <= limit] for part in parts]
    if not kept[0]:
        shortest = min(row.length for row in parts[0])
        raise ValueError(f"data.max_length ({limit}) leaves no row: the shortest has {shortest} tokens; raise it")
    return TrainingData(kept[0], kept[1], sum(map(len, parts)) - sum(map(len, kept)))


def sample(position: int, rows: int, seed: int) -> tuple[int, int]:
    """(row, epoch) at a position of the endless training order: one seeded permutation after another.

    The global batch of a step is a slice of that order, so it depends neither on the number of processes nor on how the
    batch is accumulated.
    """
    epoch, offset = divmod(position, rows)
    return _permutation(rows, seed, epoch)[offset], epoch


_permutations: dict[tuple[int, int, int], list[int]] = {}


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    key = (rows, seed, epoch)
    if key not in _permutations:
        _permutations.clear()
        _permutations[key] = random.Random(f"{seed}/{epoch}").sample(range(rows), rows)
    return _permutations[key]


def collate(rows: Sequence[Row], epochs: Sequence[int], pad: int, device: torch.device) -> Batch:
    """A right-padded batch.

    Args:
        rows: its rows.
        epochs: the epoch that each row is in.
        pad: token of the padding.
        device: where the tensors go.
    """
    width = max(row.length for row in rows)
    ids = [row.input_ids + [pad] * (width - row.length) for row in rows]
    mask = [[1] * row.length + [0] * (width - row.length) for row in rows]
    predicting = [b * width + at - 1 for b, row in enumerate(rows) for at in range(row.prompt_length, row.length)]
    targets = [token for row in rows for token in row.input_ids[row.prompt_length :]]
    return Batch(
        *(torch.tensor(values, device=device) for values in (ids, mask, predicting, targets)),
        prompt_lengths=[row.prompt_length for row in rows],
        streams=[(row.index, 0, epoch) for row, epoch in zip(rows, epochs, strict=True)],
    )
