"""On policy: the model generates with the evicting cache, and is trained on what it wrote.

Rollout and simulation draw from the same stream, so they keep the same entries, and the simulated log-probability of
every token is the one that it was generated with: their difference is logged, and is zero up to rounding. No importance
weights are needed. Knows nothing of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vkvtrain.config import EvictionConfig
from vkvtrain.ends import end_tokens
from vkvtrain.generation import Request, Sampling, generate
from vkvtrain.training.data import Row
from vkvtrain.training.engines import shards_weights
from vkvtrain.training.settings import Recipe

FULL = EvictionConfig(policy="full")


@dataclass(frozen=True)
class Rollout:
    """A generated response."""

    row: Row
    """The row's prompt and what was generated for it, the end token included."""
    epoch: int
    log_probs: list[float]
    """Log-probability of each generated token under the model at temperature 1, when it was generated."""
    finished: bool
    """Ended by itself, not by `training.rollout_tokens`."""


def check_on_policy(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise ValueError where the processes do not each hold the whole model: generating there is not supported."""
    if recipe.training.objective == "on_policy" and shards_weights(accelerator):
        raise ValueError(
            "training.objective on_policy generates on every process, which FSDP and ZeRO-3 leave without the whole "
            "model: launch with DDP or DeepSpeed ZeRO-2, or use objective distill"
        )


def roll_out(
    model: Any, tokenizer: Any, config: EvictionConfig | None, rows: Sequence[tuple[Row, int]], recipe: Recipe
) -> list[Rollout]:
    """A response of the model to each row's prompt; a function of the model, the rows and the recipe's seed.

    Args:
        model: the adapted model; it generates in evaluation mode and is left in the mode that it was in.
        tokenizer: its end tokens, its template's and the model's end a response, as they do in training rows.
        config: the eviction setting; None generates with the full cache.
        rows: (row, epoch); together they name the randomness, of sampling and of eviction.
        recipe: `training.rollout_tokens`, `training.rollout_temperature`, `training.batch_per_device`, `seed`.
    """
    training, was_training = recipe.training, model.training
    assert training.rollout_tokens is not None
    sampling = Sampling(temperature=training.rollout_temperature, seed=recipe.seed)
    requests = [
        Request(tuple(row.input_ids[: row.prompt_length]), training.rollout_tokens, (row.index, 0, epoch), sampling)
        for row, epoch in rows
    ]
    model.eval()
    completions = generate(
        model, config or FULL, requests, slots=training.batch_per_device,
        end_tokens=end_tokens(tokenizer, model.generation_config),
    )  # fmt: skip
    model.train(was_training)
    return [
        Rollout(
            Row(row.index, [*request.prompt, *completion.tokens], row.prompt_length),
            epoch,
            completion.log_probs,
            completion.finished,
        )
        for (row, epoch), request, completion in zip(rows, requests, completions, strict=True)
    ]


def log_ratios(accelerator: Accelerator, rollouts: Sequence[Rollout], log_probs: Tensor) -> dict[str, float]:
    """What is logged of a step: the largest and the mean |log p_simulation - log p_rollout|, over all processes.

    Args:
        accelerator: of this process.
        rollouts: this process's, in the order of its batches.
        log_probs: [N] of the same tokens under the simulation.

    Returns:
        `log_ratio_max`, `log_ratio_mean`, `rollout_tokens` (mean length of a response), `rollout_finished` (share).
    """
    generated = [log_prob for rollout in rollouts for log_prob in rollout.log_probs]
    distance = (log_probs.double().cpu() - torch.tensor(generated, dtype=torch.float64)).abs()
    sums = [distance.sum().item(), len(generated), sum(rollout.finished for rollout in rollouts), len(rollouts)]
    mine = torch.tensor([[distance.max().item(), *sums]], device=accelerator.device)
    every: Any = accelerator.gather(mine)
    distances, tokens, finished, responses = every[:, 1:].sum(0).tolist()
    return {
        "log_ratio_max": every[:, 0].max().item(),
        "log_ratio_mean": distances / tokens,
        "rollout_tokens": round(tokens / responses, 2),
        "rollout_finished": round(finished / responses, 4),
    }
