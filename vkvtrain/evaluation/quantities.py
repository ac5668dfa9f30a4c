r"""A number or expression with what everyday writing puts around it: units, percent, thousands separators.

Texts in, texts and exact numbers out: knows nothing of sympy.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from vkvtrain.evaluation.answers import MULTIPLES, WORDS

_NUMBER = re.compile(r"([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)")
_SCIENTIFIC = re.compile(_NUMBER.pattern + r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|(\d+))")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{?\s*(\d+)\s*\}?")
_MIXED = re.compile(
    r"(-?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\frac\s*(\d)\s*(\d)|\s(\d+)\s*/\s*(\d+))"
)
_POWER = r"(?:\^\s*(?:\{\s*-?\d+\s*\}|\d))?"
_SHORT = (
    "in|ft|yd|mi|cm|mm|km|dm|nm|kg|mg|lb|lbs|oz|ml|mL|cl|dl|hr|hrs|min|mins|sec|secs|ms|ns|kJ|kW|kWh|eV|Hz|kHz|MHz|GHz|"
    "Pa|kPa|mol|mph|kph|sq|cu|pm|am|p\\.m\\.|a\\.m\\.|USD|EUR|GBP|Rs\\.?"
)
_LETTER = re.compile(r"(?<=[\d}]) +[mgshLJNWVAK]$")
_WORD = rf"(?:{WORDS[0]}[^{WORDS[1]}]*{WORDS[1]}|(?<![A-Za-z\\])(?:(?:{_SHORT})|[A-Za-z]{{3,}}\.?)(?![A-Za-z]))"
_UNIT = rf"{_WORD}\s*{_POWER}(?:\s*/\s*[A-Za-z]+{_POWER})?"
_UNITS = re.compile(rf"(?:\s*[/*.]?\s*(?:\\cdot)?\s*(?:{_UNIT}|\\frac\s*\{{\s*{_UNIT}\s*\}}\s*\{{\s*{_UNIT}\s*\}}))+$")
_LABEL = r"[A-Za-z]{3,}(?: [A-Za-z]{2,})*\s*:|US|USD|EUR|GBP|Rs\.?|about|approximately|exactly|roughly"
_BEFORE = re.compile(rf"^{WORDS[0]}?\s*(?:{_LABEL})\s*{WORDS[1]}?\s*(?=[\d\\(.+-])")
_PART_OF_UNIT = re.compile(r"[A-Za-z.]+")
PERCENT = ("percent", "percentage", "pct")
NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and to not than least most over under above below between from times plus minus half third thirds quarter "
        "quarters if for where when unless except either neither none squared cubed dozen hundred thousand million "
        "billion trillion sin cos tan sec csc cot log exp sqrt theta alpha beta gamma lambda mod gcd lcm max infinity",
    )
)
"""Words that say more than a unit, or are mathematics."""


@dataclass(frozen=True)
class Quantity:
    """What stands in an answer beside units and percent signs."""

    text: str
    """The number or expression, plain LaTeX."""
    number: Fraction | None
    """Its value where it is written in digits alone."""
    is_percent: bool
    is_decimal: bool
    """Whether any number in it has a decimal point."""


def quantity(text: str) -> Quantity:
    """Take units, percent signs and separators off a plain text."""
    power, is_percent, text = 0, False, text.strip()
    while True:
        if text.endswith(r"\%"):
            is_percent, text = True, text[:-2].rstrip()
            continue
        units = _UNITS.search(text)
        if units is None or not _is_complete(text[: units.start()]):
            break
        first, *words = [word.casefold().rstrip(".") for word in _PART_OF_UNIT.findall(units[0])]
        is_percent |= first in PERCENT
        power += MULTIPLES.get(first, 0)
        if first not in (*PERCENT, *MULTIPLES):
            words.append(first)
        if NO_UNITS & set(words) or any(map(str.isdigit, re.sub(_POWER, "", units[0]))):
            return Quantity(text, None, is_percent, is_decimal=False)
        text = text[: units.start()].rstrip()
    number = written_number(text)
    is_decimal = re.search(r"\.\d", text) is not None
    if number is None and power:
        text = rf"({text}) \cdot 10^{{{power}}}"
    return Quantity(text, None if number is None else number * 10**power, is_percent, is_decimal)


def without_letter(text: str) -> str:
    """A text without a letter behind its number: a unit if the gold is a number, a variable if not."""
    return _LETTER.sub("", text)


def without_lead(text: str) -> str:
    """A plain text without a currency or "about" before its number, and without a label as in `Total: 41`."""
    return _BEFORE.sub("", text)


def _is_complete(text: str) -> bool:
    """Whether a value can end here: a digit, a closing bracket, a command such as a pi, a symbol or percent sign."""
    return re.search(r"(?:[\d)}\]!.]|\\%|\\(?:pi|infty)|(?<![A-Za-z\\])[a-z])\s*$", text) is not None


def written_number(text: str) -> Fraction | None:
    """The value of a number that is written in digits: `1,234`, `.5`, `-3.0`, `1 4/5`, `1.6 \\times 10^{-19}`."""
    if (mixed := _MIXED.fullmatch(text)) is not None:
        whole, *parts = mixed[2], *(part for part in mixed.groups()[2:] if part is not None)
        above, below = (int(part) for part in parts)
        value = Fraction(int(whole)) + Fraction(above, below) if below else None
        return -value if value is not None and mixed[1] else value
    if (repeating := _REPEATING.fullmatch(text)) is not None:
        sign, whole, once, digits = repeating.groups()
        value = Fraction(f"{whole or 0}.{once or 0}") + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(once))
        return -value if sign == "-" else value
    scientific = _SCIENTIFIC.fullmatch(text)
    number = scientific or _NUMBER.fullmatch(text)
    if number is None:
        return None
    value = Fraction(number[2].replace(",", "").rstrip(".")) * (-1 if number[1] == "-" else 1)
    if scientific is None:
        return value
    exponent = int(scientific[3] or scientific[4])
    return value * Fraction(10) ** exponent if abs(exponent) <= 10_000 else None


def is_thousands(text: str) -> bool:
    """Whether commas separate thousands: `1,234` is one number, `1,23` and `1, 234` are two."""
    return re.fullmatch(r"[+-]?\s*\d{1,3}(?:,\d{3})+(?:\.\d*)?(?:[^\d,].*)?", text) is not None
