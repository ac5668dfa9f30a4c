r"""Whether two sympy expressions are equal: rational numbers exactly, others in many digits, expressions at points.

Nothing is simplified, and no number beyond `BITS` is computed, so that a text cannot take hours.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

PRECISION = Fraction(1, 10**6)
"""Relative: how near a decimal must be to a number that no decimal is equal to."""
DIGITS = 60
"""Digits that are computed of irrational numbers, and of expressions at points; all but 15 must agree."""
BITS = 300_000
"""Longest number that is computed; longer ones are equal if they are written in the same parts."""
_POINTS = tuple(sympy.Rational(*point) for point in ((7, 5), (29, 17), (41, 23), (-13, 11), (-3, 19)))
_NUMBER = (sympy.Rational, sympy.Float)
_INFINITE = (sympy.oo, -sympy.oo)


def equal_expressions(gold: Any, answer: Any, gold_is_decimal: bool = False, answer_is_decimal: bool = False) -> bool:
    """Whether two expressions are equal.

    Args:
        gold: an unevaluated expression, without floating-point numbers.
        answer: another.
        gold_is_decimal: whether the gold may be rounded: then a number that no decimal is equal to may be near it.
        answer_is_decimal: the same for the answer.
    """
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return type(gold) is type(answer) and gold == answer
    if any(one.has(sympy.nan, sympy.zoo) for one in (gold, answer)):
        return False
    if gold == answer:
        return True
    if gold.has(*_INFINITE) or answer.has(*_INFINITE):
        return gold.doit() == answer.doit() if max(_bits(gold), _bits(answer)) <= BITS else False
    if max(_bits(gold), _bits(answer)) > BITS:
        return _written_equally(gold, answer)
    names = {one: sympy.Symbol(str(one), real=True) for side in (gold, answer) for one in side.atoms(AppliedUndef)}
    gold, answer = gold.xreplace(names), answer.xreplace(names)
    if gold.free_symbols or answer.free_symbols:
        return _equal_at_points(gold, answer)
    return _equal_numbers(gold, answer, gold_is_decimal, answer_is_decimal)


def is_finite_decimal(number: Fraction | None) -> bool:
    """Whether a decimal is equal to the number, not only near it."""
    if number is None:
        return False
    below = number.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _equal_numbers(gold: Any, answer: Any, gold_is_decimal: bool, answer_is_decimal: bool) -> bool:
    exact_gold, exact_answer = exact(gold), exact(answer)
    if exact_gold is not None and exact_answer is not None and exact_gold == exact_answer:
        return True
    may_be_rounded = (answer_is_decimal and not is_finite_decimal(exact_gold)) or (
        gold_is_decimal and not is_finite_decimal(exact_answer)
    )
    if exact_gold is not None and exact_answer is not None:
        return may_be_rounded and abs(exact_gold - exact_answer) <= PRECISION * max(abs(exact_gold), abs(exact_answer))
    return _near(_digits(gold), _digits(answer), sympy.Rational(PRECISION) if may_be_rounded else None)


def _equal_at_points(gold: Any, answer: Any) -> bool:
    compared = 0
    for values in _at_points(gold, answer):
        if values[0].is_real != values[1].is_real:
            continue  # outside of the domain of one
        if not _near(*values):
            return False
        compared += 1
    return compared > 1


def ratio_at_points(gold: Any, answer: Any) -> Any:
    """The constant that the quotient of two expressions is; None if it is not constant."""
    ratios = [other / one for one, other in _at_points(gold, answer) if one != 0 and other != 0]
    return ratios[0] if len(ratios) > 1 and all(_near(ratios[0], ratio) for ratio in ratios[1:]) else None


def _at_points(gold: Any, answer: Any) -> Iterator[tuple[Any, Any]]:
    """The values of two expressions where both have one; no two variables have the same value."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for number, point in enumerate(_POINTS):
        place = {one: point * (1 + sympy.Rational(index, 7 + number)) for index, one in enumerate(symbols)}
        values = _digits(gold, place), _digits(answer, place)
        if values[0] is not None and values[1] is not None:
            yield values


def _digits(expression: Any, place: dict[Any, Any] | None = None) -> Any:
    """The value in `DIGITS` digits, of what a point puts for the symbols; None if it has none."""
    number = expression.evalf(DIGITS, subs=place, maxn=4 * DIGITS)
    real, imaginary = number.as_real_imag()
    if not all(isinstance(part, _NUMBER) and part.is_finite for part in (real, imaginary)):
        return None
    parts = [sympy.S.Zero if isinstance(part, sympy.Float) and part._prec < 20 else part for part in (real, imaginary)]
    return parts[0] + sympy.I * parts[1]  # sympy says by the precision of a number that no digit of it is certain


def _near(gold: Any, answer: Any, precision: Any = None) -> bool:
    if gold is None or answer is None:
        return False
    precision = sympy.Float(f"1e-{DIGITS - 15}") if precision is None else precision
    return bool(abs(gold - answer) <= precision * max(abs(gold), abs(answer)))


def exact(number: Any) -> Fraction | None:
    """The value of a number that sums, products, whole powers, factorials and binomials make of rational ones."""
    if isinstance(number, sympy.Rational):
        return Fraction(int(number.p), int(number.q))
    parts = [exact(part) for part in number.args]
    if not parts or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    whole = all(part.denominator == 1 and part >= 0 for part in known)
    if isinstance(number, sympy.Add):
        return sum(known, Fraction(0))
    if isinstance(number, sympy.Mul):
        return math.prod(known, start=Fraction(1))
    if isinstance(number, sympy.Pow) and known[1].denominator == 1 and (known[0] or known[1] > 0):
        return known[0] ** int(known[1])
    if isinstance(number, sympy.factorial) and whole:
        return Fraction(math.factorial(int(known[0])))
    if isinstance(number, sympy.binomial) and whole:
        return Fraction(math.comb(int(known[0]), int(known[1])))
    if isinstance(number, sympy.Abs):
        return abs(known[0])
    return known[0] if isinstance(number, sympy.UnevaluatedExpr) else None


def _bits(expression: Any) -> float:
    """An upper bound of the length of every number that evaluation would compute."""
    if isinstance(expression, sympy.Rational):
        return max(int(expression.p).bit_length(), int(expression.q).bit_length())
    if not expression.args:
        return 8
    parts = [_bits(part) for part in expression.args]
    if isinstance(expression, sympy.Pow):
        return max(parts[1], (parts[0] + 1) * _magnitude(expression.args[1], parts[1]))
    if isinstance(expression, sympy.Mul):
        return sum(parts)
    if isinstance(expression, (sympy.factorial, sympy.gamma, sympy.binomial)):
        size = max(_magnitude(part, bits) for part, bits in zip(expression.args, parts, strict=True))
        return size * max(math.log2(size), 1) if size < BITS else math.inf
    if isinstance(expression, (sympy.exp, sympy.sinh, sympy.cosh)):
        return 2 * _magnitude(expression.args[0], parts[0])
    return max(parts) + len(parts)


def _magnitude(expression: Any, bits: float) -> float:
    """An upper bound of the absolute value, at least 1."""
    if isinstance(expression, sympy.Rational):
        return max(1.0, abs(float(expression))) if bits < 1000 else math.inf
    return 2.0**bits if bits < 60 else math.inf


def _written_equally(gold: Any, answer: Any) -> bool:
    return gold == answer or (
        gold.func == answer.func
        and 0 < len(gold.args) == len(answer.args)
        and all(equal_expressions(*parts) for parts in zip(gold.args, answer.args, strict=True))
    )
