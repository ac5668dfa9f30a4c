"""The loss on the held-out rows, full and evicted: what the adapter does to text that it was not trained on."""

from typing import Any

import torch
from accelerate import Accelerator

from vkvtrain.config import EvictionConfig
from vkvtrain.training.data import Row, collate
from vkvtrain.training.objectives import response_logits, sft_loss
from vkvtrain.training.passes import simulation
from vkvtrain.training.settings import Recipe


@torch.no_grad()
def held_out_losses(
    recipe: Recipe, accelerator: Accelerator, model: Any, rows: list[Row], pad: int
) -> dict[str, float]:
    """Loss per response token on the held-out rows: full cache, and evicted at each of the recipe's budgets."""
    model.eval()
    size = recipe.training.batch_per_device
    settings: list[EvictionConfig | None] = [None, *recipe.eviction_configs()]
    losses = {}
    for config in settings:
        summed = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = collate(part, [0] * len(part), pad, accelerator.device)
            with simulation(model, config, batch):
                summed += sft_loss(response_logits(accelerator.unwrap_model(model), batch), batch).item()
        name = "full" if config is None else f"evicted_{config.budget}"
        losses[f"held_out_loss_{name}"] = round(summed / sum(row.response_length for row in rows), 5)
    model.train()
    return losses
