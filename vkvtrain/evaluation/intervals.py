r"""Intervals of real numbers, and the inequalities that denote them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from vkvtrain.evaluation.answers import OR
from vkvtrain.evaluation.numbers import equal_expressions
from vkvtrain.evaluation.values import ELEMENT, GREATER, LESS, UNEQUAL, Group, Relation, Scalar, Union, Value, Words


@dataclass(frozen=True)
class Piece:
    """A piece of the real line."""

    start: Any
    end: Any
    has_start: bool
    has_end: bool


def is_name(side: Value) -> bool:
    """Whether a side of a relation is a variable, a function of one, words, or several of them."""
    if isinstance(side, Group):
        return all(is_name(part) for part in side.parts)
    return isinstance(side, Words) or (
        isinstance(side, Scalar) and isinstance(side.expression, (sympy.Symbol, AppliedUndef))
    )


def pieces(value: Value) -> tuple[str | None, list[Piece]] | None:
    """(variable, pieces) of intervals and of what denotes them: an inequality that is solved for one variable."""
    if isinstance(value, Relation):
        return (None, held[1]) if value.operators == (ELEMENT,) and (held := pieces(value.sides[1])) else _solved(value)
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
    held = [pieces(part) for part in parts]
    known = [one for one in held if one is not None]
    names = {name for name, _ in known}
    if len(known) < len(held) or len(names) != 1 or (together := combine([one for _, one in known])) is None:
        return None
    return names.pop(), together


def _intersection(held: list[list[Piece]]) -> list[Piece] | None:
    """What two pieces have in common."""
    if len(held) != 2 or any(len(one) != 1 for one in held):
        return None
    (one,), (other,) = held
    late = other if _below(one.start, other.start) else one
    early = one if _below(one.end, other.end) else other
    return [Piece(late.start, early.end, late.has_start, early.has_end)] if _below(late.start, early.end) else None


def _solved(chain: Relation) -> tuple[str | None, list[Piece]] | None:
    """`x > 5`, `5 < x`, `-1 < x < 6` and `x \\ne 3`, with one variable by itself."""
    sides, operators = chain.sides, chain.operators
    names = [str(side.expression) for side in sides if isinstance(side, Scalar) and is_name(side)]
    ends = [_endpoint(side) for side in sides if not is_name(side)]
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
    if len(sides) == 3 and is_name(sides[1]) and _below(*ends):
        return names[0], [Piece(ends[0], ends[1], holds[0], holds[1])]
    if len(sides) != 2:
        return None
    if is_name(sides[0]):
        return names[0], [Piece(-sympy.oo, ends[0], False, holds[0])]
    return names[0], [Piece(ends[0], sympy.oo, holds[0], False)]


def _endpoint(side: Value) -> Any:
    """A real number or an infinity; None for everything else."""
    if not isinstance(side, Scalar) or not isinstance(side.expression, sympy.Expr) or side.expression.free_symbols:
        return None
    return side.expression if side.expression.evalf(15).is_extended_real else None


def _below(one: Any, other: Any) -> bool:
    return bool(one.evalf(30) < other.evalf(30))


def same_pieces(gold: list[Piece], answer: list[Piece]) -> bool:
    """Whether pieces have equal ends, which all of them hold or not."""
    gold, answer = (sorted(side, key=lambda piece: piece.start.evalf(30)) for side in (gold, answer))
    return len(gold) == len(answer) and all(
        (one.has_start, one.has_end) == (other.has_start, other.has_end)
        and equal_expressions(one.start, other.start)
        and equal_expressions(one.end, other.end)
        for one, other in zip(gold, answer, strict=True)
    )
