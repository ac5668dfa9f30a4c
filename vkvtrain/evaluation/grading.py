"""Whether a final answer is right. A malformed answer is wrong, never an error, and takes seconds at most.

Knows texts; knows nothing of tasks or of thinking (`thinking.final_answer` comes first).
"""

import re

from math_verify import parse, verify

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LONGEST = 1000
_SECONDS = 5
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|operatorname)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)(\d+)(?:\.0*)?")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!)+(?=\d{3}(?!\d))")
_LETTER = re.compile(r"[(\[]?([A-Z])(?![A-Za-z])")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; None if there is none or its braces are not balanced."""
    openings = list(_BOX.finditer(text))
    if not openings:
        return None
    start = place = openings[-1].end()
    depth = 1
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1  # what follows is escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:place].strip()
        place += 1
    return None


def _unwrapped(answer: str) -> str:
    """An answer without dollar signs, text commands and a final period."""
    answer = answer.strip().strip("$").strip()
    while (inner := _WRAPPED.sub(r"\1", answer)) != answer:
        answer = inner
    return answer.strip().rstrip(".").strip()


def same_integer(answer: str | None, gold: str | int) -> bool:
    """Whether an answer is the integer `gold`: `70`, `070`, `70.0` and `x = 70` are 70, `69.9999999` is not."""
    if answer is None or len(answer) > _LONGEST:
        return False
    whole = _INTEGER.fullmatch(_THOUSANDS.sub("", _unwrapped(answer)))
    if whole is not None and len(whole[2]) < 100:
        return int(whole[1] + whole[2]) == int(gold)
    return not re.search(r"\d\.\d", answer) and same_expression(answer, str(int(gold)))


def same_expression(answer: str | None, gold: str) -> bool:
    """Whether an answer equals `gold` as mathematics, by math-verify; a timeout is no.

    math-verify sets an alarm, so this belongs into the main thread.
    """
    if answer is None or not answer.strip() or len(answer) > _LONGEST:
        return False
    try:
        wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=_SECONDS)
        found = parse(f"\\boxed{{{answer}}}", parsing_timeout=_SECONDS)
        return bool(verify(wanted, found, timeout_seconds=_SECONDS))
    except (Exception, RecursionError):  # whatever a parser makes of a model's text, it is a wrong answer
        return False


def same_letter(answer: str | None, gold: str) -> bool:
    """Whether an answer names the option `gold`: `C`, `(C)`, `\\text{C}` and `C) 4 eV` name C."""
    letter = _LETTER.match(_unwrapped(answer or ""))
    return letter is not None and letter[1] == gold


def same_text(answer: str | None, gold: str) -> bool:
    """Whether an answer is `gold`, character by character, without what wraps it."""
    return answer is not None and _unwrapped(answer) == gold
