"""Stop strings of one sequence: texts that end its answer, and mean nothing within its thoughts."""

from collections.abc import Sequence
from typing import Any

from vkvtrain.generation.requests import Request

_SLACK = 16
"""Tokens beyond the bytes of a text that are looked at: a token is a byte at least, or a special token."""


class Stops:
    """What ends a response as text.

    Args:
        request: whose `stop` and `thoughts` hold.
        tokenizer: decodes the response; not needed without stop strings.
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self._stop, self._thoughts, self._tokenizer = request.stop, request.thoughts, tokenizer
        self._answer = 0 if request.thoughts is None else None
        """Tokens before the answer; None as long as it has not begun."""
        self._head: str | None = None
        """Text of the answer in the token that ended the thoughts."""
        self._is_thinking = False

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the answer holds a stop string that the newest token may have completed."""
        if not self._stop:
            return False
        if self._answer is None:
            self._answer = self._answer_in(tokens)
        if self._answer is None:
            return False
        start = max(self._answer, len(tokens) - self._reach(self._stop))
        text = self._decode(tokens[start:])
        if self._head is not None and start == self._answer:  # white space behind the thoughts is not the answer's
            text = (self._head + text).lstrip()
        return any(stop in text for stop in self._stop)

    def _answer_in(self, tokens: Sequence[int]) -> int | None:
        """Tokens before the answer, if the newest token has shown where it begins."""
        thoughts = self._thoughts
        assert thoughts is not None
        if self._is_thinking:
            tail = self._decode(tokens[-self._reach(thoughts.ends) :])
            if not any(end in tail for end in thoughts.ends):
                return None
        text = self._decode(tokens)
        start = thoughts.answer_start(text, finished=False)
        if start is None:  # once the beginning is told, only an end tag changes anything
            self._is_thinking = len(text.lstrip()) > max(map(len, thoughts.ends))
            return None
        self._head = text[start:] if start else None
        return len(tokens) if start else 0

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    @staticmethod
    def _reach(texts: Sequence[str]) -> int:
        return max(len(text.encode()) for text in texts) + _SLACK
