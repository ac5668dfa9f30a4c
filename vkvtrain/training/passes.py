"""A training pass over a batch, with or without simulated eviction, and what happened in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vkvtrain.attention import Trace, simulated_eviction
from vkvtrain.config import EvictionConfig
from vkvtrain.training.data import Batch


@contextmanager
def simulation(model: Any, config: EvictionConfig | None, batch: Batch) -> Iterator[Trace | None]:
    """Simulated eviction of a batch, or nothing on a dense step; the backward pass belongs inside."""
    if config is None:
        yield None
        return
    with simulated_eviction(model, config, batch.prompt_lengths, batch.streams) as trace:
        yield trace


def what_happened(trace: Trace, batch: Batch) -> tuple[float, float]:
    """(evictions, share of its keys still held at its end) of the mean sample, over the evicting layers."""
    plan_rows = trace.rows
    events = sum(len(row.events) for row in plan_rows) / len(plan_rows)
    real = batch.attention_mask.bool()[:, None]
    width = batch.input_ids.shape[1]
    shares = [((at > width) & real).sum(-1).float().mean(-1) / real.sum((-2, -1)) for at in trace.evict_at.values()]
    return events, torch.stack(shares).mean().item()
