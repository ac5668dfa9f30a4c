"""What the stages of the data hand on: records, examples, tokenised rows. Plain data."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation: `role`, `content`, and what a chat template may read besides."""


@dataclass(frozen=True)
class Record:
    """A row as its source holds it."""

    values: dict[str, Any]
    where: str
    """File or data set and row number, for error messages."""
    number: int
    """Row number in the source, from 0."""


@dataclass(frozen=True)
class Example:
    """A prompt and its response, before the tokenizer."""

    prompt: str | tuple[Message, ...]
    """Text as it is, or the turns before the response, which a chat template renders."""
    completion: str
    """The response as the data writes it, without the token that ends it."""
    where: str
    reasoning: str | None = None
    """Thoughts that the data keeps apart from the completion (`reasoning_content`)."""


class Row:
    """A tokenised example.

    Attributes:
        index: number among the examples of its part, from 0: names its randomness, whatever is left out around it.
        input_ids: its tokens, four bytes each.
        prompt_length: tokens of the prompt; the loss is on all after them.
    """

    __slots__ = ("index", "input_ids", "prompt_length")

    def __init__(self, index: int, input_ids: Iterable[int], prompt_length: int) -> None:
        self.index = index
        self.input_ids = array("i", input_ids)
        self.prompt_length = prompt_length

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        return len(self.input_ids) - self.prompt_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        return f"Row({self.index}, {self.input_ids.tolist()}, {self.prompt_length})"


@dataclass(frozen=True)
class TrainingData:
    train: list[Row]
    held_out: list[Row]
    too_long: list[tuple[int, int]]
    """(index, tokens) of the rows above `data.max_length`, which are left out."""
    unusable: int = 0
    """Rows of the source without a correct generation."""
    ends: frozenset[int] = frozenset()
    """Tokens that end responses: those with which rows end, and those that the model had before."""

    @property
    def left_out(self) -> int:
        """Rows longer than `data.max_length`."""
        return len(self.too_long)
