r"""Whether two values are equal. The first one is the gold: it decides whether an order, a name or a base matters."""

from collections.abc import Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from vkvtrain.evaluation.answers import OR
from vkvtrain.evaluation.intervals import is_name, pieces, same_pieces
from vkvtrain.evaluation.numbers import equal_expressions, exact, ratio_at_points
from vkvtrain.evaluation.values import (
    ABOUT,
    ELEMENT,
    EQUAL,
    GREATER,
    LESS,
    UNEQUAL,
    Group,
    Ratio,
    Relation,
    Scalar,
    Union,
    Value,
    Words,
)


def same(gold: Value, answer: Value) -> bool:
    """Whether an answer's value is the gold's."""
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    if isinstance(gold, Relation):
        return _same_relation(gold, answer)
    if isinstance(answer, Relation) and set(answer.operators) <= {EQUAL, ABOUT, ELEMENT}:
        return not _contradicts(answer, gold) and same(gold, _stated(answer, gold))
    if (wanted := pieces(gold)) is not None and (held := pieces(answer)) is not None:
        return same_pieces(wanted[1], held[1])
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _same_ratio(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _same_in_any_order(gold.parts, answer.parts)
    return _same_group(_as_group(gold), _as_group(answer)) if Group in (type(gold), type(answer)) else gold == answer


def _same_words(gold: Value, answer: Value) -> bool:
    texts = [one.text for one in (gold, answer) if isinstance(one, (Words, Scalar))]
    letters = ["".join(text.split()).strip("()[].") for text in texts]
    are_words = all(isinstance(one, Words) for one in (gold, answer)) or any(map(str.isalpha, letters[0]))
    return len(letters) == 2 and letters[0] == letters[1] != "" and are_words


def _same_scalar(gold: Scalar, answer: Scalar) -> bool:
    """Percent signs are units beside an integer gold; otherwise 15% is 15 or 0.15."""
    gold_factors = answer_factors = (sympy.S.One,)
    either = (sympy.S.One, sympy.Rational(1, 100))
    if answer.is_percent and not gold.is_percent:
        known = exact(gold.expression) if isinstance(gold.expression, sympy.Rational) else None
        answer_factors = (sympy.S.One,) if known is not None and known.denominator == 1 else either
    elif gold.is_percent and not answer.is_percent:
        gold_factors = either
    return any(
        _same_elements(_times(gold, one), _times(answer, other), gold.is_decimal, answer.is_decimal)
        for one in gold_factors
        for other in answer_factors
    )


def _times(scalar: Scalar, factor: Any) -> Any:
    if factor == 1 or not isinstance(scalar.expression, sympy.Expr):
        return scalar.expression
    return sympy.Mul(scalar.expression, factor, evaluate=False)


def _same_elements(gold: Any, answer: Any, gold_is_decimal: bool, answer_is_decimal: bool) -> bool:
    """Expressions, or matrices of them."""
    gold, answer = (one.doit() if isinstance(one, sympy.MatrixExpr) else one for one in (gold, answer))
    if not (isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase)):
        return equal_expressions(gold, answer, gold_is_decimal, answer_is_decimal)
    return gold.shape == answer.shape and all(
        equal_expressions(one, other, gold_is_decimal, answer_is_decimal)
        for one, other in zip(gold.flat(), answer.flat(), strict=True)
    )


def _same_ratio(gold: Value, answer: Value) -> bool:
    """Times are equal as written, ratios up to a factor; a ratio of two is a fraction too."""
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        if gold.is_time or answer.is_time:
            return gold.parts == answer.parts and (gold.half == answer.half or None in (gold.half, answer.half))
        return len(gold.parts) == len(answer.parts) and all(
            one * answer.parts[0] == other * gold.parts[0] for one, other in zip(gold.parts, answer.parts, strict=True)
        )
    ratio, other = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    if not (isinstance(ratio, Ratio) and isinstance(other, Scalar)) or len(ratio.parts) != 2 or ratio.parts[1] == 0:
        return False
    return ratio.half is None and equal_expressions(ratio.parts[0] / ratio.parts[1], other.expression)


def _as_group(value: Value) -> Group:
    return value if isinstance(value, Group) else Group("", (value,), "")


def _same_group(gold: Group, answer: Group) -> bool:
    """A list or set in any order, a tuple or interval in the gold's and in its brackets, which `(3, 4)` may lack."""
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.opening in ("", "{"):
        return answer.opening in ("", "{") and _same_in_any_order(gold.parts, answer.parts)
    brackets = (gold.opening, gold.closing)
    bare = ("", "") if brackets == ("(", ")") else brackets
    if (answer.opening, answer.closing) not in (brackets, bare) or answer.joint == OR:
        return False
    return all(same(one, other) for one, other in zip(gold.parts, answer.parts, strict=True))


def _same_in_any_order(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    left = list(answer)
    for one in gold:
        match = next((index for index, other in enumerate(left) if same(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _contradicts(answer: Relation, gold: Value) -> bool:
    """Whether an equation states no value (`2x - 6 = 0`), or a number that is another (`40 = 41`)."""
    first, last = answer.sides[0], answer.sides[-1]
    if isinstance(last, Scalar) and last.expression == 0 and not is_name(first) and _has_variables(first):
        return True
    return set(answer.operators) == {EQUAL} and any(
        not _has_variables(side) and not same(gold, side) for side in answer.sides[:-1]
    )


def _has_variables(side: Value) -> bool:
    return not isinstance(side, Scalar) or side.has_variables


def _stated(answer: Relation, gold: Value) -> Value:
    """The side of a chain of equations that it states: the last one, and before an approximation unless of a name."""
    if ABOUT in answer.operators and not (isinstance(gold, Scalar) and gold.is_decimal):
        before = answer.sides[answer.operators.index(ABOUT)]
        return answer.sides[-1] if is_name(before) else before
    return answer.sides[-1]


def _same_relation(gold: Relation, answer: Value) -> bool:
    if set(gold.operators) <= {ELEMENT}:
        return same(gold.sides[-1], answer)
    if set(gold.operators) <= {EQUAL, ABOUT}:
        if not isinstance(answer, Relation):
            return is_name(gold.sides[0]) and same(gold.sides[-1], answer)
        return set(answer.operators) <= {EQUAL, ABOUT} and _same_equation(gold, answer)
    if (wanted := pieces(gold)) is not None and (held := pieces(answer)) is not None:
        return (None in (wanted[0], held[0]) or wanted[0] == held[0]) and same_pieces(wanted[1], held[1])
    return isinstance(answer, Relation) and _same_inequality(gold, answer)


def _same_equation(gold: Relation, answer: Relation) -> bool:
    """The same sides, either way round; if neither solves for a name, the same up to a factor."""
    (first, last), (one, other) = ((chain.sides[0], chain.sides[-1]) for chain in (gold, answer))
    if (same(first, one) and same(last, other)) or (same(first, other) and same(last, one)):
        return True
    if is_name(first) and isinstance(last, Scalar) and not getattr(last.expression, "free_symbols", True):
        return False
    return _ratio_of_sides(gold, answer) is not None


def _same_inequality(gold: Relation, answer: Relation) -> bool:
    if len(gold.operators) != 1 or len(answer.operators) != 1:
        return gold.operators == answer.operators and all(
            same(one, other) for one, other in zip(gold.sides, answer.sides, strict=True)
        )
    (operator,), (other,) = gold.operators, answer.operators
    kinds = [UNEQUAL if one == UNEQUAL else (LESS + GREATER).index(one) % 2 for one in (operator, other)]
    if ELEMENT in (operator, other) or kinds[0] != kinds[1]:
        return False
    ratio = _ratio_of_sides(gold, answer)
    if ratio is None or operator == UNEQUAL:
        return ratio is not None
    return bool(ratio > 0) == ((operator in LESS) == (other in LESS))


def _ratio_of_sides(gold: Relation, answer: Relation) -> Any:
    sides = [side for chain in (gold, answer) for side in (chain.sides[0], chain.sides[-1])]
    expressions = [side.expression for side in sides if isinstance(side, Scalar)]
    if len(expressions) < 4 or not all(isinstance(one, sympy.Expr) for one in expressions):
        return None
    names = {one: sympy.Symbol(str(one), real=True) for side in expressions for one in side.atoms(AppliedUndef)}
    first, last, one, other = (side.xreplace(names) for side in expressions)
    return ratio_at_points(first - last, one - other)
