"""Scores to kept entries: protection, sampling without replacement, ties.

Exactly `budget - window` candidates are kept, chosen by one integer key per candidate whose order is total, so that two
passes, two devices or two batch layouts that agree on the scores agree on the set. Attention scores that differ from
the lowest kept one by no more than rounding count as equal to it (`tied_at_the_cut`), so that the newest is kept.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vkvtrain.config import EvictionConfig
from vkvtrain.policies import Candidates, round_mantissa

_TIED = 64
"""Ranks (units in the last place of a float32) within which attention scores tie; rounding moves them by about ten."""
_PROTECTED = 0x7FFFFFFF
"""Rank above that of any float32."""
_EXCLUDED = -0x80000000
"""Rank below that of any float32, minus infinity included."""


def ranks(score: Tensor) -> Tensor:
    """float32 scores as integers of the same order, int64; NaN ranks as minus infinity."""
    score = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0  # no -0.0
    bits = score.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def top(rank: Tensor, count: int) -> Tensor:
    """Slots of the `count` highest ranks along the last dimension, ascending; among equal ranks the newest first."""
    # one int64 key a candidate: the 32-bit rank above, the slot (older entries first) below. No two keys are equal, so
    # the set does not depend on how topk breaks ties, which differs between devices.
    slots = torch.arange(rank.shape[-1], device=rank.device)
    return (rank * 2**32 + slots).topk(count, sorted=False).indices.sort(-1).values


def tied_at_the_cut(rank: Tensor, count: int) -> Tensor:
    """The ranks, those that nearly equal the lowest of the `count` highest made equal to it, [..., C].

    Which of two equal scores rounding has made the higher one differs between the passes; the newest shall be kept.
    """
    # only at the cut does an order matter: well above it all are kept, well below it none. Snapping all ranks to a grid
    # instead would part nearly equal scores that lie on two sides of a grid line.
    cut = rank.topk(count, sorted=False).values.amin(-1, keepdim=True)
    return torch.where((rank - cut).abs() <= _TIED, cut, rank)


class Selector:
    """Chooses what survives an event under one eviction setting."""

    def __init__(self, config: EvictionConfig) -> None:
        self.policy = config.make_policy()
        if self.policy.keeps_everything or config.budget is None:
            raise ValueError(f"policy {config.policy!r} keeps everything: there is nothing to select")
        self.config = config
        self.budget = config.budget
        self.keep = config.budget - config.window
        self.large = config.large_values
        self.samples = config.samples
        self.needs_mass = self.policy.needs_mass
        self.needs_queries = self.policy.needs_queries
        self.only_window_attention = self.policy.only_window_attention
        self.needs_keys = self.policy.needs_keys
        self.needs_window_keys = self.policy.needs_window_keys
        protecting = {config.measure} if self.large and config.measure != "random" else set()
        self.measures = sorted(protecting.union(self.policy.measures))
        """Measures of the values' size that protection and scores read."""
        self.needs_values = self.policy.needs_values or bool(self.measures)
        self._warned = False

    @property
    def data_independent(self) -> bool:
        """Whether event times and noise alone decide, so that nothing a layer computes is looked at."""
        return not (
            self.needs_queries or self.needs_keys or self.needs_values or self.needs_window_keys or self.needs_mass
        )

    @property
    def keeps_newest(self) -> bool:
        """Whether the protected prefix and the newest entries survive, whatever they hold."""
        return self.policy.keeps_newest and self.data_independent and not self.large

    def protected_prefix(self, prompts: Sequence[int]) -> list[int]:
        """How many first positions are protected in each sequence: sinks, and the prompt if asked for."""
        sinks = self.config.sinks
        if not self.config.protect_prompt:
            return [sinks] * len(prompts)
        longest = max(prompts)
        if longest > self.keep - 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"protect_prompt: a prompt of {longest} tokens does not fit budget - window - 1 = {self.keep - 1}; "
                "only its first tokens are protected",
                stacklevel=2,
            )
        return [max(sinks, min(prompt, self.keep - 1)) for prompt in prompts]

    def __call__(self, candidates: Candidates, prompts: Sequence[int]) -> Tensor:
        """Slots of the kept candidates, int64 [N, Hkv, budget - window], ascending.

        Args:
            candidates: C > budget - window entries per KV head, in chronological order.
            prompts: length of the first prompt of each of the N sequences.
        """
        return self.select(self.score(candidates, prompts))

    def score(self, candidates: Candidates, prompts: Sequence[int]) -> Tensor:
        """Ranks of the candidates, int64 [N, Hkv, C]: of protected ones the highest; arguments as above."""
        positions = candidates.positions
        prefix = self.protected_prefix(prompts)
        if len(set(prefix)) == 1:
            protected = positions < prefix[0]
        else:
            protected = positions < torch.tensor(prefix, device=positions.device)[:, None, None]
        if self.large:
            protected = protected | self._large_values(candidates, protected, prefix)

        score = self.policy.score(candidates, self.config.smooth)
        if self.policy.scores_single_tokens:
            score = round_mantissa(score)
        if self.samples:
            # Gumbel-top-k on log weights: Efraimidis and Spirakis 2006; Kool et al. 2019
            score = torch.log(score.float().double()) + candidates.noise.gumbel(positions)
        return ranks(score).masked_fill(protected, _PROTECTED)

    def select(self, rank: Tensor) -> Tensor:
        """Slots of the kept candidates, int64 [N, Hkv, budget - window], ascending, by their ranks [N, Hkv, C]."""
        if not (self.samples or self.policy.scores_single_tokens or self.policy.keeps_newest):
            rank = tied_at_the_cut(rank, self.keep)
        return top(rank, self.keep)

    def _large_values(self, candidates: Candidates, protected: Tensor, prefix: Sequence[int]) -> Tensor:
        """Mask [N, Hkv, C] of the entries that are protected for their large values, or at random."""
        noise, measure = candidates.noise, self.config.measure
        size = noise.uniform(candidates.positions) if measure == "random" else candidates.value_size(measure)
        rank = ranks(size).masked_fill(protected, _EXCLUDED)
        counts = [min(self.large, self.keep - first) for first in prefix]  # the protected set never exceeds `keep`
        mask = torch.zeros_like(protected)
        if len(set(counts)) == 1:
            return mask.scatter_(-1, top(rank, counts[0]), True)
        for count in set(counts) - {0}:
            rows = torch.tensor([row for row, c in enumerate(counts) if c == count], device=rank.device)
            mask[rows] = mask[rows].scatter(-1, top(rank[rows], count), True)
        return mask
