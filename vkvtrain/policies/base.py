"""What a policy is: it scores candidates. Selection (protection, sampling, ties) is in `vkvtrain.selection`.

`docs/how-it-works.md` has the words, and follows one event through the code. Shapes: N sequences, Hq query heads, Hkv
KV heads (Hq a multiple of Hkv), R window queries, C candidates, D head dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, overload

import torch
from torch import Tensor

from vkvtrain.logits import LogitForm
from vkvtrain.noise import NoiseSource


class Declared:
    """A field of `Candidates` that is there for policies that declare it; reading it undeclared is a TypeError."""

    def __init__(self, is_required: bool) -> None:
        self.is_required = is_required

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, candidates: None, owner: type) -> None: ...
    @overload
    def __get__(self, candidates: "Candidates", owner: type) -> Tensor: ...
    def __get__(self, candidates: "Candidates | None", owner: type) -> Tensor | None:
        if candidates is None:  # the dataclass asks for the field's default
            if self.is_required:
                raise AttributeError(self.name)
            return None
        given = vars(candidates)[self.name]
        if given is None:
            if candidates.attention is not None and self.name in ("queries", "keys"):
                fix = "do not set only_window_attention on its class"
            else:
                fix = f"set needs_{self.name} = True on its class"
            raise TypeError(f"policy {candidates.policy!r} reads candidates.{self.name} without declaring it: {fix}")
        return given

    def __set__(self, candidates: "Candidates", value: Tensor | None) -> None:
        vars(candidates)[self.name] = value


@dataclass(frozen=True, eq=False, repr=False)
class Candidates:
    """The entries that an event chooses among, in chronological order, with what the policy declared that it needs.

    Attributes:
        positions: logical positions, int64 [N, Hkv, C], ascending.
        queries: the window's queries in chronological order [N, Hq, R, D], float32 (float64 for a float64 model).
        keys: keys as cached, after RoPE [N, Hkv, C, D], same dtype.
        values: [N, Hkv, C, D], same dtype.
        scaling: factor of the attention logits, from the model.
        noise: the random numbers of this event.
        window_keys: keys of the window's entries, which are no candidates, [N, Hkv, R, D], same dtype.
        mass: attention that each candidate has got from all queries so far, [N, Hkv, C], same dtype.
        softcap: bound c of the attention logits, `c * tanh(l / c)`, where the model has one.
        attention: `window_attention` before smoothing [N, Hkv, C], where a training pass has it from its own logits:
            for policies that declare `only_window_attention`, then without queries and keys.
        value_sizes: `value_size` of each candidate by measure, rounded [N, Hkv, C], where it is known already.
        policy: the policy's name, for the error of an undeclared read.
    """

    positions: Tensor
    queries: Declared = Declared(is_required=True)
    keys: Declared = Declared(is_required=True)
    values: Declared = Declared(is_required=True)
    scaling: float  # pyright: ignore[reportGeneralTypeIssues]
    noise: NoiseSource  # pyright: ignore[reportGeneralTypeIssues]
    window_keys: Declared = Declared(is_required=False)
    mass: Declared = Declared(is_required=False)
    softcap: float | None = None
    attention: Tensor | None = None
    value_sizes: Mapping[str, Tensor] = field(default_factory=dict)
    policy: str = ""

    def value_size(self, measure: str) -> Tensor:
        """How large the candidates' values are by a measure (see `MEASURES`), rounded, [N, Hkv, C]."""
        return self.value_sizes[measure] if measure in self.value_sizes else value_size(self.values, measure)

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention logits of every query head, [N, Hkv, Hq / Hkv, Q, K].

        Args:
            queries: [N, Hq, Q, D].
            keys: [N, Hkv, K, D].
        """
        return LogitForm(self.scaling, self.softcap).logits(queries, keys)

    def all_keys(self) -> Tensor:
        """Keys of everything held, candidates then window, [N, Hkv, C + R, D]."""
        return torch.cat([self.keys, self.window_keys], dim=2)


@dataclass(frozen=True)
class Policy:
    """Base of the policies. Fields of a subclass are its `policy_args`; everything else is declared on the class."""

    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_window_keys: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False
    """Attention accumulated over every query so far: costs a pass over all queries, the prompt's included."""
    measures: ClassVar[tuple[str, ...]] = ()
    """Measures of the values' size that the score reads (`candidates.value_size`), without the values themselves."""
    only_window_attention: ClassVar[bool] = False
    """Queries and keys are needed for `window_attention` and nothing else."""
    smooths: ClassVar[bool] = False
    """The score reads `smooth`."""
    samples: ClassVar[bool] = False
    """Scores are weights of sampling without replacement, else the highest scores are kept."""
    has_weights: ClassVar[bool] = False
    """Scores are >= 0 and differ: they can be sampled by or the highest kept, whatever the setting `retention` says."""
    needs_noise: ClassVar[bool] = False
    """Scores themselves are drawn: they read `candidates.noise`."""
    scores_single_tokens: ClassVar[bool] = False
    """A score depends on one token alone, so equal tokens tie: scores are compared at 10 mantissa bits."""
    keeps_newest: ClassVar[bool] = False
    """Scores are all equal, so that the newest are kept: training reads lifetimes off the event times."""
    protected_fraction: ClassVar[float] = 0.0
    """The policy's own share of the budget that is protected as sinks or large values."""
    keeps_everything: ClassVar[bool] = False

    def score(self, candidates: Candidates, smooth: bool) -> Tensor:
        """Scores [N, Hkv, C], higher is kept; weights >= 0 where they may be sampled by."""
        raise TypeError(f"{type(self).__name__} scores nothing")


POLICIES: dict[str, type[Policy]] = {}
"""The policies by the field's names."""


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: makes a policy known by `name`."""

    def add(policy: type[Policy]) -> type[Policy]:
        if name in POLICIES:
            raise ValueError(f"there are two policies {name!r}: {POLICIES[name].__name__} and {policy.__name__}")
        POLICIES[name] = policy
        return policy

    return add


def window_attention(candidates: Candidates, smooth: bool) -> Tensor:
    """The attention that the window pays to each candidate, `a` [N, Hkv, C].

    Softmax over the candidates only of `q.k * scaling`, mean over the R window queries, average-pooled over 5
    neighbours (stride 1, zero padding counted) if `smooth`, mean over the query heads of the KV head. Source: SnapKV
    (arXiv 2404.14469) in its decode form, as VaSE (arXiv 2606.03928) uses it.
    """
    attention = candidates.attention
    if attention is None:
        attention = candidates.logits(candidates.queries, candidates.keys).softmax(-1).mean((2, 3))
    return torch.nn.functional.avg_pool1d(attention, 5, stride=1, padding=2) if smooth else attention


def value_range(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`max_d v - min_d v` of each entry in `dtype` (its own): VaSE's measure of a large value. [..., D] -> [...]."""
    return values.amax(-1).to(dtype or values.dtype) - values.amin(-1).to(dtype or values.dtype)


def value_variance(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Variance of each entry over the head dimension, divided by D, in `dtype` (its own). [..., D] -> [...]."""
    return values.to(dtype or values.dtype).var(-1, unbiased=False)


def value_norm(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norm of each entry in `dtype` (its own). [..., D] -> [...]."""
    return torch.linalg.vector_norm(values.to(dtype or values.dtype), dim=-1)


MEASURES: dict[str, Callable[[Tensor, torch.dtype | None], Tensor]] = {
    "range": value_range,
    "variance": value_variance,
    "l2": value_norm,
}
"""Measures of the size of a value; the setting `measure` names one of them, or `random`."""


def value_size(values: Tensor, measure: str, dtype: torch.dtype | None = None) -> Tensor:
    """How large each entry is by a measure, computed in `dtype` (its own) and rounded for comparison.

    Args:
        values: [..., D].
        measure: one of `MEASURES`.
        dtype: of the result, [...].
    """
    return round_mantissa(MEASURES[measure](values, dtype))


def round_beside(x: Tensor, size: Tensor, bits: int = 10) -> Tensor:
    """`x` rounded, half to even, to the last of `bits` explicit mantissa bits of a number as large as `size`.

    A difference of equal tokens is nothing but rounding; rounded beside the tokens' own size, it is zero.
    """
    exponent = torch.frexp(size).exponent.clamp(min=-100)
    last_bit = torch.exp2((exponent - (bits + 1)).to(x.dtype))
    return torch.round(x / last_bit) * last_bit


def round_mantissa(x: Tensor, bits: int = 10) -> Tensor:
    """`x` rounded to `bits` explicit mantissa bits, half to even.

    Equal tokens get values that differ in the last bits when a prefill and a one-token product compute them; rounded,
    they tie as they should.
    """
    # ten bits: far above rounding, so that two passes seldom fall on two sides of a boundary, and far below what sets
    # tokens apart. frexp's mantissa lies in [0.5, 1): its first bit is the implicit one, `bits` more are explicit.
    mantissa, exponent = torch.frexp(x)
    return torch.round(mantissa * 2 ** (bits + 1)) * torch.exp2((exponent - (bits + 1)).to(x.dtype))
