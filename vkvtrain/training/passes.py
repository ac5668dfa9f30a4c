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
    """Simulated eviction of a batch, or nothing on a dense step; the backward pass belongs inside.

    A dense step of packed documents is a simulation too, of a cache that keeps everything: it keeps them apart.
    """
    if config is None and batch.documents is None:
        yield None
        return
    config = config or EvictionConfig(policy="full")
    with simulated_eviction(model, config, batch.prompt_lengths, batch.streams, documents=batch.documents) as trace:
        yield trace


def what_happened(trace: Trace, batch: Batch) -> tuple[float, float]:
    """(evictions, share of its keys still held at its end) of the mean sample, over the evicting layers."""
    events = sum(len(row.events) for row in trace.rows) / len(trace.rows)
    lengths = torch.tensor([row.length for row in trace.rows], device=batch.input_ids.device)
    width = int(lengths.max()) if batch.documents is not None else batch.input_ids.shape[1]
    real = (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
    shares = [((at > width) & real).sum(-1).float().mean(-1) / real.sum((-2, -1)) for at in trace.evict_at.values()]
    return events, torch.stack(shares).mean().item()
