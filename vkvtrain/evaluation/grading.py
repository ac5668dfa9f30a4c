"""Whether a final answer is right. A malformed answer is wrong, never an error, and takes seconds at most.

Knows texts; knows nothing of tasks or of thinking (`thinking.final_answer` comes first). How it differs from other
graders stands in docs/grading.md.
"""

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vkvtrain.evaluation.answers import AND, OR, WORDS, last_boxed, plain
from vkvtrain.evaluation.equality import same
from vkvtrain.evaluation.quantities import without_letter
from vkvtrain.evaluation.values import Scalar, value

__all__ = [
    "expression_gold", "integer_gold", "last_boxed", "letter_gold", "same_expression", "same_integer", "same_letter",
    "same_text", "text_gold",
]  # fmt: skip

_LONGEST = 1000
_SECONDS = 5
_INTEGER = re.compile(r"([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+))(?:\.0*)?")
_OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |right )?(?i:option|choice|answer)\s*:?\s*)?(?:[(\[]([A-Z])[)\]]|([A-Z]))"
)
_AFTER_OPTION = re.compile(r"\s*(?:$|[).\]:](?=\s|$)\s*|[)\]]\s*)")
_ANOTHER_OPTION = re.compile(r"(?:and|or|[,;/&+])|\([A-Z]\)|.*[\s,;/&](?:\(([A-Z])\)|[A-Z][):](?=\s))", re.DOTALL)
_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|boxed|operatorname)\s*\{([^{}]*)\}")


class _TimeIsUp(BaseException):
    """No exception that a parser would take for its own."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_TimeIsUp` inside of the block when it has taken this long."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers are graded in the main thread: grading sets an alarm")

    def stop(*_: Any) -> None:
        raise _TimeIsUp

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again: what a finaliser raises is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:  # an alarm that was set before
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-3))


def same_expression(answer: str | None, gold: str) -> bool:
    """Whether an answer equals `gold` as mathematics, or as words; five seconds without a result are no."""
    if answer is None or not answer.strip() or len(answer) > _LONGEST:
        return False
    try:
        with _time_limit(_SECONDS):
            wanted = value(gold)
            if isinstance(wanted, Scalar) and not wanted.has_variables:
                answer = without_letter(answer)
            return same(wanted, value(answer))
    except _TimeIsUp:
        return False
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        NotImplementedError,
    ):
        return False  # whatever sympy makes of a model's text, it is a wrong answer


def same_integer(answer: str | None, gold: str | int) -> bool:
    """Whether an answer is the integer `gold`: `70`, `070`, `$70.00`, `x = 70` and `70 km` are 70, `69.99` is not."""
    return same_expression(answer, str(int(gold)))


def same_letter(answer: str | None, gold: str) -> bool:
    r"""Whether an answer names the option `gold` and no other.

    `C`, `(C)`, `\text{C}`, `option C`, `C: 12` and `C) 4 eV` name C; `C and D`, `C = 12` and `C_2` do not.
    """
    if answer is None or len(answer) > _LONGEST:
        return False
    text = " ".join(re.sub(f"[{WORDS}]", " ", plain(_FONT.sub(r"\1", answer))).split()).translate(_JOINTS)
    option = _OPTION.match(text)
    if option is None or (option[1] or option[2]) != gold:
        return False
    delimiter = _AFTER_OPTION.match(text, option.end())
    if delimiter is None and option[1] is None:
        return False
    explanation = text[delimiter.end() if delimiter else option.end() :].strip()
    return _ANOTHER_OPTION.match(explanation) is None


_JOINTS = str.maketrans({AND: " and ", OR: " or "})


def same_text(answer: str | None, gold: str) -> bool:
    """Whether an answer is `gold`, character by character, without what wraps it."""
    return answer is not None and _unwrapped(answer) == gold


def _unwrapped(answer: str) -> str:
    """An answer without dollar signs, asterisks, text commands and a final period."""
    answer = answer.strip().strip("$*").strip()
    while (inner := _FONT.sub(r"\1", answer)) != answer:
        answer = inner
    return answer.strip().rstrip(".").strip()


def integer_gold(gold: Any) -> str:
    """A gold that is an integer, in digits.

    Raises:
        ValueError: any other, or a floating-point number too large to be sure of its digits.
    """
    if isinstance(gold, float) and gold.is_integer() and abs(gold) < 2**53:
        gold = int(gold)
    number = _INTEGER.fullmatch(str(gold).strip()) if isinstance(gold, (int, str)) and gold is not True else None
    if number is None or len(number[0]) > _LONGEST:
        raise ValueError(f"the answer must be an integer in digits, got {gold!r}")
    return str(int(number[1] + number[2].replace(",", "")))


def expression_gold(gold: Any) -> str:
    """A gold that `same_expression` can read: it must equal itself.

    Raises:
        ValueError: no text or number, or a text that is not equal to itself.
    """
    is_known = isinstance(gold, (str, int)) or (isinstance(gold, float) and math.isfinite(gold))
    if isinstance(gold, bool) or not is_known or not str(gold).strip():
        raise ValueError(f"the answer must be text or a number, got {gold!r}")
    if not same_expression(str(gold), str(gold)):
        raise ValueError(f"the answer cannot be read as mathematics or words: {str(gold)[:200]!r}")
    return str(gold)


def letter_gold(gold: Any) -> str:
    """A gold that is an option's letter.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(gold, str) or re.fullmatch("[A-Z]", gold) is None:
        raise ValueError(f"the answer must be an option's capital letter, got {gold!r}")
    return gold


def text_gold(gold: Any) -> str:
    """A gold that is compared character by character.

    Raises:
        ValueError: no text, or a text that is not equal to itself when it stands in a box.
    """
    if not isinstance(gold, str) or not gold or not same_text(last_boxed(f"\\boxed{{{gold}}}"), gold):
        raise ValueError(f"the answer must be text without what wraps an answer, got {gold!r}")
    return gold
