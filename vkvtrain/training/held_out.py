"""The loss on the held-out rows, full and evicted: what the adapter does to text that it was not trained on."""

from typing import Any

import torch
from accelerate import Accelerator

from vkvtrain.config import EvictionConfig
from vkvtrain.training.data import Row, collate
from vkvtrain.training.passes import simulation
from vkvtrain.training.settings import Recipe


@torch.no_grad()
def held_out_losses(
    recipe: Recipe, accelerator: Accelerator, model: Any, rows: list[Row], pad: int
) -> dict[str, float]:
    """Loss per response token on the held-out rows: full cache, and evicted at each of the recipe's settings."""
    model.eval()
    size = recipe.training.batch_per_device
    settings: list[EvictionConfig | None] = [None, *recipe.eviction_configs()]
    several = len(recipe.policies()) > 1
    losses = {}
    for config in settings:
        summed = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = collate(part, [0] * len(part), pad, accelerator.device)
            with simulation(model, config, batch) as trace:
                summed += model(batch, trace, cross_entropy_only=True)["loss"].item()
        losses[f"held_out_loss_{label(config, several)}"] = round(summed / sum(row.response_length for row in rows), 5)
    model.train()
    return losses


def label(config: EvictionConfig | None, several: bool) -> str:
    """How the log names a setting: `full`, `evicted_64`, or `snapkv_64` where a recipe has several policies."""
    if config is None:
        return "full"
    return f"{config.policy if several else 'evicted'}_{config.budget}"
