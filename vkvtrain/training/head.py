"""The head in chunks: losses of a vocabulary of 150,000 without logits of the whole sequence in memory.

The gradient is taken while the loss is computed, chunk by chunk, so nothing of [positions, vocabulary] is kept or
computed twice. (Liger's fused linear cross-entropy does the same for one loss: arXiv 2410.10989.) Knows nothing of
objectives.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**25
"""Logits that exist at once, in each of the few tensors that a loss makes of them: 128 MiB in float32."""

ChunkLosses = Callable[[Tensor, slice], Tensor]
"""(hidden states [n, hidden], where they are in the whole) -> what is recorded, [n, columns]; column 0 is the loss."""


def model_logits(causal: Any, hidden: Tensor) -> Tensor:
    """Logits of final hidden states as the model itself would give them.

    Args:
        causal: a transformers causal language model.
        hidden: [..., hidden], what its decoder returns.

    Returns:
        [..., vocabulary].
    """
    logits = causal.get_output_embeddings()(hidden)
    config = causal.config.get_text_config(decoder=True)
    scaling, scale = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scaling is not None:  # Granite
        logits = logits / scaling
    if scale is not None:  # Cohere
        logits = logits * scale
    if cap is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(causal: Any, inputs: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless `model_logits` gives a model's own logits, in the last columns of a batch.

    Args:
        causal: a transformers causal language model in evaluation mode.
        inputs: what it and its decoder are called with.
    """
    own = causal(**inputs, use_cache=False, logits_to_keep=4).logits[:, -4:]
    hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, -4:]
    ours = model_logits(causal, hidden)
    # the same products in the same shapes: anything beyond the last bits is another formula
    if own.shape != ours.shape or (own - ours).abs().max() > 8 * torch.finfo(own.dtype).eps * own.abs().max():
        raise ValueError(
            f"{type(causal).__name__} makes its logits from the final hidden states in a way that is not known here "
            "(beside a head, logits_scaling, logit_scale and final_logit_softcapping): add it to "
            "vkvtrain/training/head.py, where losses are computed in chunks"
        )


def chunked_loss(losses: ChunkLosses, hidden: Tensor, head: nn.Module, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The sum of column 0 of `losses` over all positions, and all columns.

    Args:
        losses: of a chunk; it may use the head, and anything that needs no gradient.
        hidden: [N, hidden], final hidden states.
        head: the module whose trainable parameters get a gradient too, if it has any.
        vocabulary: size of the vocabulary, which decides how long a chunk is.

    Returns:
        (the sum, differentiable once; the columns [N, columns], without gradient).
    """
    size = max(1, CHUNK_LOGITS // vocabulary)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return _ChunkedLoss.apply(losses, size, torch.is_grad_enabled(), hidden, *weights)  # pyright: ignore[reportReturnType]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: ChunkLosses, size: int, grad_enabled: bool, hidden: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[3:]]
        grads = [torch.zeros_like(x) if want else None for x, want in zip((hidden, *weights), wanted, strict=True)]
        columns = []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            chunk = hidden[part].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                found = losses(chunk, part)
                total = found[:, 0].sum()
            columns.append(found.detach())
            if any(wanted):
                _add_gradients(grads, part, total, (chunk, *weights))
        ctx.save_for_backward(*grads)
        recorded = torch.cat(columns)
        ctx.mark_non_differentiable(recorded)
        return recorded[:, 0].sum(), recorded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)


def _add_gradients(grads: Sequence[Tensor | None], part: slice, loss: Tensor, inputs: Sequence[Tensor]) -> None:
    """Put a chunk's gradient of its hidden states in its place, and add those of the head's weights."""
    asked = [x for x, grad in zip(inputs, grads, strict=True) if grad is not None]
    given = iter(torch.autograd.grad(loss, asked))
    for place, grad in enumerate(grads):
        if grad is not None:
            (grad[part] if place == 0 else grad).add_(next(given))
