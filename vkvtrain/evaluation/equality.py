r"""Whether two values are equal. The first one is the gold: it decides whether an order, a name or a base matters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from vkvtrain.evaluation.answers import OR
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


@dataclass(frozen=True)
class Piece:
    """A piece of the real line."""

    start: Any
    end: Any
    has_start: bool
    has_end: bool


def same(gold: Value, answer: Value) -> bool:
    """Whether an answer's value is the gold's."""
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    if isinstance(gold, Relation):
        return _same_relation(gold, answer)
    if isinstance(answer, Relation) and set(answer.operators) <= {EQUAL, ABOUT, ELEMENT}:
        return not _contradicts(answer, gold) and same(gold, _stated(answer, gold))
    if (pieces := _pieces(gold)) is not None and (held := _pieces(answer)) is not None:
        return _same_pieces(pieces[1], held[1])
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
    """A list or set in any order, a tuple or interval in the gold's, with the gold's brackets or none."""
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.opening in ("", "{"):
        return answer.opening in ("", "{") and _same_in_any_order(gold.parts, answer.parts)
    if (answer.opening, answer.closing) not in ((gold.opening, gold.closing), ("", "")) or answer.joint == OR:
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
    if isinstance(last, Scalar) and last.expression == 0 and not _is_name(first) and _has_variables(first):
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
        return answer.sides[-1] if _is_name(before) else before
    return answer.sides[-1]


def _is_name(side: Value) -> bool:
    if isinstance(side, Group):
        return all(_is_name(part) for part in side.parts)
    return isinstance(side, Words) or (
        isinstance(side, Scalar) and isinstance(side.expression, (sympy.Symbol, AppliedUndef))
    )


def _same_relation(gold: Relation, answer: Value) -> bool:
    if set(gold.operators) <= {ELEMENT}:
        return same(gold.sides[-1], answer)
    if set(gold.operators) <= {EQUAL, ABOUT}:
        if not isinstance(answer, Relation):
            return _is_name(gold.sides[0]) and same(gold.sides[-1], answer)
        return set(answer.operators) <= {EQUAL, ABOUT} and _same_equation(gold, answer)
    if (pieces := _pieces(gold)) is not None and (held := _pieces(answer)) is not None:
        return None in (held[0], pieces[0]) or held[0] == pieces[0] if _same_pieces(pieces[1], held[1]) else False
    return isinstance(answer, Relation) and _same_inequality(gold, answer)


def _same_equation(gold: Relation, answer: Relation) -> bool:
    """The same sides, either way round; if neither solves for a name, the same up to a factor."""
    (first, last), (one, other) = ((chain.sides[0], chain.sides[-1]) for chain in (gold, answer))
    if (same(first, one) and same(last, other)) or (same(first, other) and same(last, one)):
        return True
    if _is_name(first) and isinstance(last, Scalar) and not getattr(last.expression, "free_symbols", True):
        return False
    return (ratio := _ratio_of_sides(gold, answer)) is not None and ratio != 0


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


def _pieces(value: Value) -> tuple[str | None, list[Piece]] | None:
    """(variable, pieces) of intervals and of what denotes them: an inequality that is solved for one variable."""
    if isinstance(value, Relation):
        return (
            (None, held[1]) if value.operators == (ELEMENT,) and (held := _pieces(value.sides[1])) else _solved(value)
        )
    if isinstance(value, Union):
        return _combined(value.parts, lambda held: [piece for one in held for piece in one])
    if isinstance(value, Scalar) and value.expression == sympy.S.Reals:
        return None, [Piece(-sympy.oo, sympy.oo, False, False)]
    if not isinstance(value, Group):
        return None
    if not value.opening and all(isinstance(part, Relation) for part in value.parts):
        either = value.joint == OR
        return _combined(
            value.parts, (lambda held: [one for part in held for one in part]) if either else _intersection
        )
    if value.opening not in ("(", "[") or value.closing not in (")", "]") or len(value.parts) != 2:
        return None
    start, end = (_endpoint(part) for part in value.parts)
    if start is None or end is None or not _below(start, end):
        return None
    return None, [Piece(start, end, value.opening == "[", value.closing == "]")]


def _combined(
    parts: Sequence[Value], combine: Callable[[list[list[Piece]]], list[Piece] | None]
) -> tuple[str | None, list[Piece]] | None:
    held = [_pieces(part) for part in parts]
    known = [one for one in held if one is not None]
    names = {name for name, _ in known}
    if len(known) < len(held) or len(names) != 1 or (pieces := combine([pieces for _, pieces in known])) is None:
        return None
    return names.pop(), pieces


def _intersection(held: list[list[Piece]]) -> list[Piece] | None:
    """What two pieces have in common."""
    if len(held) != 2 or any(len(pieces) != 1 for pieces in held):
        return None
    (one,), (other,) = held
    late = other if _below(one.start, other.start) else one
    early = one if _below(one.end, other.end) else other
    return [Piece(late.start, early.end, late.has_start, early.has_end)] if _below(late.start, early.end) else None


def _solved(chain: Relation) -> tuple[str | None, list[Piece]] | None:
    """`x > 5`, `5 < x`, `-1 < x < 6` and `x \\ne 3`, with one variable by itself."""
    sides, operators = chain.sides, chain.operators
    names = [str(side.expression) for side in sides if isinstance(side, Scalar) and _is_name(side)]
    ends = [_endpoint(side) for side in sides if not _is_name(side)]
    if len(names) != 1 or len(names) + len(ends) != len(sides) or None in ends:
        return None
    if operators == (UNEQUAL,):
        return names[0], [Piece(-sympy.oo, ends[0], False, False), Piece(ends[0], sympy.oo, False, False)]
    if set(operators) <= set(GREATER):
        turned = tuple(LESS[GREATER.index(operator)] for operator in reversed(operators))
        return _solved(Relation(sides[::-1], turned))
    if not set(operators) <= set(LESS):
        return None
    holds = [operator == LESS[1] for operator in operators]
    if len(sides) == 3 and _is_name(sides[1]) and _below(*ends):
        return names[0], [Piece(ends[0], ends[1], holds[0], holds[1])]
    if len(sides) != 2:
        return None
    if _is_name(sides[0]):
        return names[0], [Piece(-sympy.oo, ends[0], False, holds[0])]
    return names[0], [Piece(ends[0], sympy.oo, holds[0], False)]


def _endpoint(side: Value) -> Any:
    """A real number or an infinity; None for everything else."""
    if not isinstance(side, Scalar) or not isinstance(side.expression, sympy.Expr) or side.expression.free_symbols:
        return None
    return side.expression if side.expression.evalf(15).is_extended_real else None


def _below(one: Any, other: Any) -> bool:
    return bool(one.evalf(30) < other.evalf(30))


def _same_pieces(gold: list[Piece], answer: list[Piece]) -> bool:
    gold, answer = (sorted(pieces, key=lambda piece: piece.start.evalf(30)) for pieces in (gold, answer))
    return len(gold) == len(answer) and all(
        (one.has_start, one.has_end) == (other.has_start, other.has_end)
        and equal_expressions(one.start, other.start)
        and equal_expressions(one.end, other.end)
        for one, other in zip(gold, answer, strict=True)
    )
