"""The loss on the held-out rows, full and evicted: what the adapter does to text that it was not trained on.

Shared out over the processes, every row counted once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from vkvtrain.config import EvictionConfig
from vkvtrain.training.data import Batch, Row, collate
from vkvtrain.training.passes import simulation
from vkvtrain.training.run import Run


def shares(rows: Sequence[Row], size: int, rank: int, processes: int) -> list[tuple[list[Row], bool]]:
    """(rows, whether they count) of each forward pass of a rank.

    Every process has as many passes as any other, because an engine that shards weights needs all of them in each; a
    process that has nothing left repeats a row that does not count.
    """
    passes = -(-len(rows) // (size * processes))
    mine = rows[rank::processes]
    parts = [list(mine[start : start + size]) for start in range(0, size * passes, size)]
    return [(part, True) if part else ([rows[0]], False) for part in parts]


def token_loss(
    accelerator: Accelerator, model: Any, config: EvictionConfig | None, batches: Sequence[tuple[Batch, bool]]
) -> float:
    """Cross-entropy per response token of all processes' batches that count; every process calls it."""
    summed = torch.zeros(2, dtype=torch.float64, device="cpu")
    for batch, counts in batches:
        with simulation(model, config, batch) as trace:
            loss = model(batch, trace, cross_entropy_only=True)["loss"].item()
        if counts:
            summed += torch.tensor([loss, float(len(batch.targets))], dtype=torch.float64)
    total: Any = accelerator.reduce(summed.float().to(accelerator.device), "sum")
    return (total[0] / total[1]).item()


@torch.no_grad()
def losses(run: Run, batches: Sequence[tuple[Batch, bool]], name: str) -> dict[str, float]:
    """Loss per response token with the full cache and evicted at each of the recipe's settings, and what lies between.

    Args:
        run: whose model is looked at, as it is now.
        batches: this process's, and whether each counts.
        name: how the log's names begin.
    """
    several = len(run.recipe.policies()) > 1
    run.model.eval()
    full = token_loss(run.accelerator, run.model, None, batches)
    found = {f"{name}_loss_full": round(full, 5)}
    for config in run.recipe.eviction_configs():
        evicted = token_loss(run.accelerator, run.model, config, batches)
        found[f"{name}_loss_{label(config, several)}"] = round(evicted, 5)
        found[f"{name}_gap_{label(config, several)}"] = round(evicted - full, 5)
    run.model.train()
    return found


def held_out_losses(run: Run) -> dict[str, float]:
    """`losses` of the held-out rows; every process calls it."""
    accelerator, size = run.accelerator, run.recipe.training.batch_per_device
    parts = shares(run.data.held_out, size, accelerator.process_index, accelerator.num_processes)
    batches = [(collate(rows, [0] * len(rows), run.pad, accelerator.device), counts) for rows, counts in parts]
    return losses(run, batches, "held_out")


def label(config: EvictionConfig, several: bool) -> str:
    """How the log names an evicting setting: `evicted_64`, or `snapkv_64` where a recipe has several policies."""
    return f"{config.policy if several else 'evicted'}_{config.budget}"
