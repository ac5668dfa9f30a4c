"""What gives one token of every row to a model: as it comes, or as one compiled graph. Both leave the same cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from vkvtrain.cache import EvictionCache, StaticView
from vkvtrain.versions import cache_argument


def compiled(step: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """A step of fixed shapes as one graph, on a GPU a CUDA graph: a break would be slow and would not say so."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(step, fullgraph=True, dynamic=False, mode=mode)


class Eager:
    """Kernel by kernel, any number of rows.

    Args:
        model: a causal language model with `attn_implementation="vkvtrain"`.
        cache: its rows' prompts are attended.
    """

    def __init__(self, model: Any, cache: EvictionCache) -> None:
        self.model, self.cache = model, cache

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, 1, V] after one token a row, both int64 [rows, 1]."""
        return self.model(input_ids=tokens, position_ids=positions, **cache_argument(self.cache)).logits

    def replace_row(self, row: int, other: EvictionCache) -> None:
        """Put the first row of another cache in the place of `row`."""
        self.cache.replace_row(row, other)


class Compiled:
    """One graph for all steps: shapes never change, and neither does where storage lies; on a GPU a CUDA graph.

    Args:
        model: a causal language model with `attn_implementation="vkvtrain"`.
        cache: its rows' prompts are attended.
        capacity: entries of each layer's storage, for good.
    """

    def __init__(self, model: Any, cache: EvictionCache, capacity: int) -> None:
        self.model, self.cache = model, cache
        self._view = view = StaticView(cache, capacity)

        def step(tokens: Tensor) -> Tensor:
            logits = model(input_ids=tokens, position_ids=view.positions, **cache_argument(view)).logits
            view.advance()
            return logits

        self._step = compiled(step, model.device)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `Eager.forward`; the positions are those that the view counts.

        Raises:
            ValueError: a model whose step cannot be compiled.
        """
        try:
            logits = self._step(tokens)
        except TorchDynamoException as error:
            raise ValueError(
                f"compile: the decode step of {type(self.model).__name__} is no single graph "
                f"({str(error).strip().splitlines()[0]}): leave compile out; a mixture of experts can be compiled when "
                "loaded with experts_implementation='batched_mm'"
            ) from error
        self._view.finish()
        return logits

    def replace_row(self, row: int, other: EvictionCache) -> None:
        """Put the first row of another cache in the place of `row`."""
        self._view.replace_row(row, other)
