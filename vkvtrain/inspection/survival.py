"""From one simulated pass to what survived: tensors in, plain numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from vkvtrain.attention import simulated_eviction
from vkvtrain.config import EvictionConfig
from vkvtrain.events import Event
from vkvtrain.noise import Stream


@dataclass(frozen=True)
class Survival:
    """What an eviction setting did to one text.

    Attributes:
        config: the setting.
        prompt: first tokens, which count as the prompt.
        layers: indices of the layers that evict.
        evict_at: int64 [L, Hkv, S] of those layers: the first query that no longer sees the token, S + 1 where never.
        events: the eviction events.
    """

    config: EvictionConfig
    prompt: int
    layers: list[int]
    evict_at: Tensor
    events: list[Event]

    @property
    def length(self) -> int:
        return self.evict_at.shape[-1]

    def held(self, seen: int | None = None) -> Tensor:
        """Whether a head holds a token once `seen` tokens were seen (default: at the end), bool [L, Hkv, S]."""
        seen = self.length if seen is None else seen
        return (self.evict_at > seen) & (torch.arange(self.length) < seen)

    def share(self) -> Tensor:
        """Share of a layer's heads that hold each token at the end, [L, S]."""
        return self.held().float().mean(1)

    def prompt_share(self) -> Tensor:
        """Share of the prompt that a head holds at the end, [L, Hkv]."""
        return self.held()[:, :, : self.prompt].float().mean(-1)

    def contested(self) -> Tensor:
        """Held at the end, of the tokens that an event could drop (no sinks, not the window), bool [L, Hkv, C]."""
        return self.held()[:, :, self.config.sinks : self.length - self.config.window]

    def head_overlap(self) -> Tensor:
        """Mean Jaccard overlap of the contested tokens that two heads of a layer hold, [L]; NaN with a single head."""
        sets = self.contested()
        pairs = [jaccard(sets[:, a], sets[:, b]) for a, b in combinations(range(sets.shape[1]), 2)]
        return torch.stack(pairs).mean(0) if pairs else torch.full((len(sets),), torch.nan)

    def overlap_by_chance(self) -> float:
        """Jaccard overlap to expect of heads that choose independently.

        A token that was a candidate of more events is less likely to be left, so the probability q that a head holds it
        is that of its peers, tokens with as many events behind them: sum q^2 / sum (2 q - q^2).
        """
        held = self.contested().float().mean((0, 1))
        position = torch.arange(self.config.sinks, self.length - self.config.window)
        newest = torch.tensor([event.position - self.config.window for event in self.events])
        endured = (position[:, None] <= newest).sum(-1)
        peers = torch.stack([held[endured == count].mean() for count in endured.tolist()])
        return (peers.square().sum() / (2 * peers - peers.square()).sum()).item()


def jaccard(ours: Tensor, theirs: Tensor) -> Tensor:
    """Size of the intersection over that of the union along the last dimension; 1 where both are empty."""
    union = (ours | theirs).sum(-1)
    return torch.where(union > 0, (ours & theirs).sum(-1) / union.clamp(min=1), 1.0)


def policy_overlap(ours: Survival, theirs: Survival) -> Tensor:
    """Mean over heads of the Jaccard overlap of what two settings hold in the same head, [L]."""
    start, end = max(ours.config.sinks, theirs.config.sinks), max(ours.config.window, theirs.config.window)
    contested = slice(start, ours.length - end)
    return jaccard(ours.held()[:, :, contested], theirs.held()[:, :, contested]).mean(1)


@torch.no_grad()
def survival(model: Any, ids: Sequence[int], config: EvictionConfig, prompt: int, stream: Stream = 0) -> Survival:
    """One simulated pass over a text.

    Args:
        model: loaded with `attn_implementation="vkvtrain"`.
        ids: the text's tokens.
        config: the eviction setting.
        prompt: first tokens, which are written without eviction.
        stream: names the text's randomness.

    Raises:
        ValueError: a text that never exceeds the budget.
    """
    with simulated_eviction(model, config, [prompt], [stream]) as trace:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    (row,) = trace.rows
    if not row.events:
        raise ValueError(
            f"budget {config.budget}: the text has {len(ids)} tokens ({prompt} of them prompt), so nothing is ever "
            "evicted; lower --budget or give a longer text"
        )
    # layers that keep everything (skip_layers, sliding windows) hold S + 1 throughout: they are not shown
    layers = [layer for layer, at in sorted(trace.evict_at.items()) if bool((at <= len(ids)).any())]
    evict_at = torch.stack([trace.evict_at[layer][0].cpu() for layer in layers])
    return Survival(config, prompt, layers, evict_at, row.events)
