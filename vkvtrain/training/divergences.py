"""What a token costs, from the logits that predict it: cross-entropy, and divergences to a teacher.

p is the teacher and q the student, both softmax(logits / T). Every function returns one number for each position, in
nats. Tensors in, tensors out.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vkvtrain.training.settings import TrainingSettings


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = `sum_y p(y) (log p(y) - log q(y))`: the student covers what the teacher does (Hinton et al. 2015).

    Args:
        log_p, log_q: log-probabilities [N, outcomes] of teacher and student, as in every function here.

    Returns:
        [N].
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = `sum_y q(y) (log q(y) - log p(y))`: the student keeps to the teacher's modes (arXiv 2306.08543)."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Generalised Jensen-Shannon divergence `w KL(p || m) + (1 - w) KL(q || m)`, `m = w p + (1 - w) q`, 0 < w < 1.

    w = 0.5 is the symmetric one. Divided by w it tends to the forward KL as w goes to 0; divided by 1 - w, to the
    reverse KL as w goes to 1. Source: GKD (Agarwal et al., arXiv 2306.13649).
    """
    w = torch.tensor(weight, dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logaddexp(log_p + w.log(), log_q + (1 - w).log())
    return w * forward_kl(log_p, log_m) + (1 - w) * forward_kl(log_q, log_m)


def coarsen(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k most likely outcomes, and all others as one: log-probabilities [N, k + 1] of both sides.

    The student's tail is thus held to the mass of the teacher's, and free in how it spreads it. A divergence of the
    coarse distributions is at most that of the full ones (data processing inequality). Unchanged where k is the
    vocabulary or more.
    """
    if k >= log_p.shape[-1]:
        return log_p, log_q
    top = log_p.topk(k, dim=-1).indices
    sides = []
    for side in (log_p, log_q):
        tail = side.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        sides.append(torch.cat([side.gather(-1, top), tail], dim=-1))
    return sides[0], sides[1]


def divergence(student: Tensor, teacher: Tensor, settings: TrainingSettings) -> Tensor:
    """The recipe's divergence of each position, times T^2 so that gradients keep their size (Hinton et al. 2015).

    Args:
        student, teacher: logits [N, vocabulary] in float32 or float64; no gradient reaches the teacher.
        settings: `divergence`, `jsd_weight`, `temperature`, `top_k`.

    Returns:
        [N].
    """
    t = settings.temperature
    log_p, log_q = (teacher.detach() / t).log_softmax(-1), (student / t).log_softmax(-1)
    if settings.top_k is not None:
        log_p, log_q = coarsen(log_p, log_q, settings.top_k)
    if settings.divergence == "jsd":
        return t**2 * jsd(log_p, log_q, settings.jsd_weight)
    return t**2 * (forward_kl if settings.divergence == "forward_kl" else reverse_kl)(log_p, log_q)


def token_losses(student: Tensor, teacher: Tensor | None, targets: Tensor, settings: TrainingSettings) -> Tensor:
    """Loss, cross-entropy, divergence and teacher's entropy of each token, [N, 4]; float32, or float64 as the logits.

    The loss is `u (divergence + ce_weight * cross-entropy)` with `u = 1 + entropy_weight * H`, H the teacher's entropy
    at T = 1; without a teacher it is the cross-entropy. Gradients flow through the loss alone.

    Args:
        student, teacher: logits [N, vocabulary] of any floating type.
        targets: int64 [N], the tokens that came next.
        settings: the objective.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student = student.to(dtype)
    crossed = cross_entropy(student, targets, reduction="none")
    if teacher is None:
        nothing = torch.zeros_like(crossed)
        return torch.stack([crossed, crossed.detach(), nothing, nothing], dim=-1)
    teacher = teacher.detach().to(dtype)
    diverged = divergence(student, teacher, settings)
    log_p = teacher.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (1 + settings.entropy_weight * entropy) * (diverged + settings.cross_entropy_weight * crossed)
    return torch.stack([loss, crossed.detach(), diverged.detach(), entropy], dim=-1)
