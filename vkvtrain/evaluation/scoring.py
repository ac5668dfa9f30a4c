"""Log-likelihoods under eviction: one parallel pass that sees what decoding token by token would see.

A context is written like a prompt, without eviction; the continuation is decoded. Knows tokens and models, and nothing
of lm-eval's requests.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vkvtrain.attention import simulated_eviction
from vkvtrain.config import EvictionConfig
from vkvtrain.noise import Stream


@dataclass(frozen=True)
class Continuation:
    """Tokens to score, and what comes before them."""

    context: tuple[int, ...]
    target: tuple[int, ...]
    """Tokens whose log-probabilities are summed."""
    stream: Stream
    prompt: int | None = None
    """Tokens that the cache is given at once; default the whole context."""

    def inputs(self, longest: int) -> tuple[list[int], int]:
        """What the model reads, cut on the left to `longest` tokens, and how much of it is the prompt.

        The last target token is predicted and never read.
        """
        tokens = [*self.context, *self.target][-(longest + 1) :][:-1]
        context = len(tokens) - (len(self.target) - 1)
        return tokens, context if self.prompt is None else min(self.prompt, context)


@torch.no_grad()
def score(
    model: Any, eviction: EvictionConfig, rows: Sequence[Continuation], longest: int, dtype: torch.dtype | None = None
) -> list[tuple[float, bool]]:
    """Of each row the log-likelihood of its target, and whether every target token is the likeliest.

    Args:
        model: a transformers model with our attention.
        eviction: the setting; one that keeps everything scores with the full cache.
        rows: scored in one batch, right-padded; a row's result does not depend on the others.
        longest: most tokens that the model reads.
        dtype: of the log-softmax; default the logits' own, at least float32.

    Raises:
        ValueError: an empty context or target, or a target of more than `longest` tokens.
    """
    for row in rows:
        if not row.context or not 1 <= len(row.target) <= longest:
            raise ValueError(
                f"cannot score {len(row.target)} tokens after {len(row.context)}: both must be positive, and the "
                f"continuation at most max_length ({longest})"
            )
    inputs, prompts = zip(*(row.inputs(longest) for row in rows), strict=True)
    width = max(map(len, inputs))
    device = model.device
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in inputs], device=device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in inputs], device=device)
    first = min(len(tokens) - len(row.target) for tokens, row in zip(inputs, rows, strict=True))
    streams = [row.stream for row in rows]
    with simulated_eviction(model, eviction, prompts, streams) if eviction.evicts else nullcontext():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first).logits
    answers = []
    for row, tokens, own in zip(rows, inputs, logits, strict=True):
        start = len(tokens) - len(row.target) - first
        own = own[start : start + len(row.target)]
        target = torch.tensor(row.target, device=device)
        log_probs = torch.log_softmax(own, -1, dtype or torch.promote_types(own.dtype, torch.float32))
        chosen = log_probs.gather(-1, target[:, None]).squeeze(-1)
        answers.append((float(chosen.double().sum()), bool((own.argmax(-1) == target).all())))
    return answers


def batches(rows: Sequence[Continuation], size: int, longest: int) -> Iterator[list[int]]:
    """Places of the rows of each batch, longest first, so that little is padded and memory runs out at once."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].inputs(longest)[0]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
