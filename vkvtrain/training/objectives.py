"""What is minimised: sums over response tokens, so that the loop can divide by the token count of the global batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vkvtrain.training.data import Batch

_CHUNK = 1024
"""Positions whose float32 log-probabilities exist at once in a divergence."""


def response_logits(model: Any, batch: Batch) -> Tensor:
    """Logits at the positions that predict a response token, [N, vocabulary]; one forward pass."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    return logits.flatten(0, 1).index_select(0, batch.predicting)


def sft_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's response tokens."""
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL, `sum_t sum_y p(y) (log p(y) - log q(y))` with p the teacher and q the student, summed over positions.

    Computed in chunks of positions. Source: Hinton et al. 2015; the direction covers the teacher's modes.

    Args:
        student, teacher: logits [N, vocabulary]; no gradient reaches the teacher.
    """
    total = student.new_zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    for ours, theirs in zip(student.split(_CHUNK), teacher.split(_CHUNK), strict=True):
        log_q, log_p = ours.to(total.dtype).log_softmax(-1), theirs.detach().to(total.dtype).log_softmax(-1)
        total = total + torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total


@torch.no_grad()
def teacher_logits(model: Any, batch: Batch) -> Tensor:
    """Response logits of the same model with its adapter disabled; the caller sees to it that the cache is full."""
    with model.disable_adapter():
        return response_logits(model, batch)
