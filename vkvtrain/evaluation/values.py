r"""The value of an answer: a scalar, words, a list, tuple or interval, a relation, a number in a base, a ratio.

The structure is read here, what stands inside of it by math-verify's own parser. No expression is evaluated.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.math_normalization import normalize_latex

from vkvtrain.evaluation.answers import AND, OR, WORDS, bracketed, depth, plain, split, without_words
from vkvtrain.evaluation.quantities import is_thousands, quantity, without_lead

EQUAL, ABOUT, ELEMENT, UNEQUAL = "=", r"\approx", r"\in", r"\ne"
LESS, GREATER = ("<", r"\le"), (">", r"\ge")
DEEPEST = 30
"""Brackets inside of brackets, at most."""
_RELATIONS = frozenset((EQUAL, ABOUT, ELEMENT, UNEQUAL, *LESS, *GREATER))
_SET_BUILDER = re.compile(r"[a-z]\s*(?:\\mid|\\vert|\||:)\s*(.*)")
_BASED = re.compile(
    r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*_\s*(?:\{?\s*\(?(\d+)\)?\s*\}?|\{?\s*\ue000(?:base )?(\w+)\ue001\s*\}?)"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_RATIO = re.compile(r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+)\s*(?:(a|p)\.?\s*m\.?)?", re.IGNORECASE)
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]{3,}(?:[ ,.]+[\w'-]+)*")
_NORMAL = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
_TIMES = tuple(  # math-verify reads an integer before a fraction as a mixed number, and so `2(3)` as 5
    (re.compile(pattern), r"\1\\cdot ")
    for pattern in (
        r"(\))\s*(?=\(|\d|\\frac|\\binom)",
        r"((?<![_^\d.A-Za-z])\d+(?:\.\d+)?)\s*(?=\(|\\binom)",
        r"(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\(|\\frac|\\binom)",
    )
)
_UNREADABLE = re.compile(r"\\[lc]?dots|(?<![\\A-Za-z_^{\d])\d+\s+\d|\d\s*_")


@dataclass(frozen=True)
class Words:
    """An answer in words, or one that is no mathematics: equal to the same words."""

    text: str
    """Without capitals, articles and what marks them as words."""


@dataclass(frozen=True)
class Scalar:
    """An expression or a matrix."""

    expression: Any
    """sympy's, unevaluated; decimals are rational numbers."""
    is_percent: bool = False
    is_decimal: bool = False
    """Whether it is written with a decimal point, so that it may be rounded."""
    text: str = ""
    """As written, for a gold in words."""

    @property
    def has_variables(self) -> bool:
        """Whether it is more than a number."""
        return bool(getattr(self.expression, "free_symbols", True))


@dataclass(frozen=True)
class Based:
    """A whole number in another base than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """`3:4`, or the time `3:45`."""

    parts: tuple[Any, ...]
    """sympy's rational numbers."""
    half: str | None
    """`a` or `p` of a time of the day."""
    is_time: bool


@dataclass(frozen=True)
class Group:
    """Several values: a list without brackets, a set, a tuple or interval."""

    opening: str
    """`(`, `[`, `{` or empty."""
    parts: tuple["Value", ...]
    closing: str
    joint: str = ","
    """What stands between the parts: `,`, `AND` or `OR`."""


@dataclass(frozen=True)
class Union:
    """Intervals or sets joined by a cup."""

    parts: tuple["Value", ...]


@dataclass(frozen=True)
class Relation:
    """A chain: `x = 5`, `-1 < x < 6`, `x \\in [0, 1]`."""

    sides: tuple["Value", ...]
    operators: tuple[str, ...]


Value = Words | Scalar | Based | Ratio | Group | Union | Relation


@lru_cache(1024)
def value(answer: str) -> Value:
    """The value of an answer's text."""
    text = plain(answer)
    if depth(text) > DEEPEST:
        return Words(text)
    return _value(text)


def _value(text: str) -> Value:
    if re.fullmatch(rf"{WORDS[0]}[^{WORDS[1]}]*{WORDS[1]}", text) and not text[1:-1].strip(" .()")[:1].isdigit():
        return Words(without_words(text))
    text = without_lead(_unmarked_number(text))
    for read in (_union, _list, _relation, _plus_minus, _group, _based, _ratio):
        if (result := read(text)) is not None:
            return result
    return _scalar(text)


def _unmarked_number(text: str) -> str:
    """Words that hold a number and its unit, as `\\text{41 km}`."""
    return text[1:-1].strip() if re.fullmatch(rf"{WORDS[0]}[^{WORDS[1]}]*{WORDS[1]}", text) else text


def _union(text: str) -> Value | None:
    parts, between = split(text, frozenset((r"\cup",)))
    return Union(tuple(_value(part) for part in parts)) if between else None


def _list(text: str) -> Value | None:
    if _PLAIN_WORDS.fullmatch(text) and "=" not in text:
        return Words(without_words(text))
    parts, between = split(text, frozenset((AND, OR, ";")))
    pieces = [piece for part in parts for piece in _by_commas(part) if piece]
    if len(pieces) < 2:
        return None if not between else _value(pieces[0]) if pieces else Words("")
    joint = OR if OR in between else AND if AND in between else ","
    return Group("", _spread(pieces), "", joint)


def _by_commas(text: str) -> list[str]:
    return [text] if is_thousands(text) else split(text, frozenset((",",)))[0]


def _spread(parts: list[str]) -> tuple[Value, ...]:
    """Values of parts, of which one with a plus-minus sign is two."""
    values: list[Value] = []
    for part in parts:
        read = _value(part)
        values += read.parts if isinstance(read, Group) and not read.opening else (read,)
    return tuple(values)


def _relation(text: str) -> Value | None:
    sides, operators = split(text, _RELATIONS)
    if not operators:
        return None
    if not sides[0] and operators[0] in (EQUAL, ABOUT):  # `= 41`
        sides, operators = sides[1:], operators[1:]
    if not all(sides):
        return Words(without_words(text))
    if not operators:
        return _value(sides[0])
    return Relation(tuple(_value(side) for side in sides), tuple(operators))


def _plus_minus(text: str) -> Value | None:
    if len(split(text, frozenset((r"\pm",)))[0]) != 2:
        return None
    signs = [re.sub(r"\\pm(?![a-zA-Z])", sign, text) for sign in "+-"]
    return Group("", tuple(_scalar(one) for one in signs), "")


def _group(text: str) -> Value | None:
    if (brackets := bracketed(text)) is None:
        return None
    opening, content, closing = (
        re.sub(r"\\(?:[lr]angle)", lambda b: "(" if b[0][1] == "l" else ")", part) for part in brackets
    )
    opening, closing = opening.lstrip("\\"), closing.lstrip("\\")
    if opening == "{" and brackets[0] == "{":
        return _value(content)
    if opening == "{" and (condition := _SET_BUILDER.fullmatch(content)) is not None:
        return _value(condition[1])
    parts = split(content, frozenset((",", ";", AND)))[0]
    if len(parts) == 1:
        if opening == "{":
            return Group("{", _spread(parts), "}")
        return (
            _value(content)
            if (opening, closing) == ("(", ")") and split(content, frozenset((r"\pm", r"\cup")))[1]
            else None
        )
    if not all(parts):
        return None
    return Group(opening, _spread(parts) if opening == "{" else tuple(_value(part) for part in parts), closing)


def _based(text: str) -> Value | None:
    number = _BASED.fullmatch(text)
    if number is None or not number[1][0].isdigit():
        return None
    base = int(number[2]) if number[2] else _BASES.get(number[3], 0)
    return Based(number[1].upper().lstrip("0") or "0", base) if base != 10 else _scalar(number[1])


def _ratio(text: str) -> Value | None:
    ratio = _RATIO.fullmatch(re.sub(f"[{WORDS}]", "", text).replace(r"\colon", ":"))
    if ratio is None:
        return None
    parts = re.split(r"\s*:\s*", ratio[1])
    is_time = len(parts) == 2 and re.fullmatch(r"\d{1,2}:[0-5]\d", ":".join(parts)) is not None
    half = ratio[2].lower() if ratio[2] else None
    return Ratio(tuple(sympy.Rational(part) for part in parts), half, is_time)


def _scalar(text: str) -> Value:
    """An expression; words if math-verify's parser cannot read it."""
    read = quantity(text)
    if read.number is not None:
        number = sympy.Rational(read.number.numerator, read.number.denominator)
        return Scalar(number, read.is_percent, read.is_decimal, without_words(text))
    expression = None if WORDS[0] in read.text or _UNREADABLE.search(read.text) else parsed(read.text)
    if expression is None:
        return Words(without_words(text).replace(" ", ""))
    return Scalar(expression, read.is_percent, read.is_decimal, without_words(text))


def parsed(text: str) -> Any:
    """The expression of plain LaTeX; None if it cannot be read."""
    for pattern, written in _TIMES:
        text = pattern.sub(written, text)
    try:
        expression: Any = latex2sympy(normalize_latex(text, _NORMAL), is_real=True, normalization_config=None)
        decimals = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
        imaginary = {sympy.Symbol("i", real=True): sympy.I}
        with sympy.evaluate(False):
            return expression.xreplace(decimals | imaginary)
    except Exception:  # the parser raises bare exceptions, and sympy of every kind: either way nothing was read
        return None
