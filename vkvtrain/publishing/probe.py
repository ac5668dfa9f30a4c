"""Whether what was written is what was trained: logits of both models on fixed tokens.

A file can load cleanly and be another model: two layers that share a tensor and were merged into one after the other,
an adapter beside another base, weights rounded to a type that loses the update. Knows models; knows nothing of files.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = 64
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Root mean square of the difference of two models' logits, against that of the centred logits, that rounding of
weights and activations may cause. Measured on the embedded model over thirteen kinds of adapter: 1e-6 in float32, 1e-2
in bfloat16; a tied head that was merged wrongly: 0.1 and more."""


@dataclass(frozen=True)
class Probe:
    """What a trained model says on the fixed tokens, float32 [TOKENS, vocabulary].

    Attributes:
        trained: logits of the base model with its adapter.
        base: logits of the same with the adapter disabled.
        dtype: of the base weights.
    """

    trained: Tensor
    base: Tensor
    dtype: torch.dtype


def probe(adapted: Any) -> Probe:
    """The probe of a `PeftModel` in evaluation mode."""
    trained = logits(adapted)
    with adapted.disable_adapter():
        return Probe(trained, logits(adapted), next(adapted.get_base_model().parameters()).dtype)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of a model on the fixed tokens, float32 [TOKENS, vocabulary], on the CPU."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens.to(model.device)).logits[0].float().cpu()


def check_written(found: Probe, written: Tensor) -> str:
    """A sentence on how far the written model's logits are from the trained one's.

    Raises:
        ValueError: further than rounding in the weights' dtype explains, or further than half of what the adapter does.
    """
    if not found.trained.isfinite().all():
        raise ValueError("the trained model's logits are not finite: the adapter or its base model is damaged")
    # logits that are all equal have no size to compare with: then the difference itself counts
    size = _rms(found.trained - found.trained.mean(-1, keepdim=True)) or 1.0
    if written.shape != found.trained.shape:
        raise ValueError(
            f"the written model has {written.shape[-1]} outcomes and the trained one {found.trained.shape[-1]}: "
            "nothing is published"
        )
    off, effect = _rms(written - found.trained) / size, _rms(found.base - found.trained) / size
    tolerance = TOLERANCE.get(found.dtype, max(TOLERANCE.values()))
    kind = str(found.dtype).removeprefix("torch.")
    if not off <= tolerance:
        raise ValueError(
            f"the written model is not the trained one: its logits are {off:.2g} of their size off ({kind} explains "
            f"{tolerance:g}): nothing is published; without --merge the adapter is published as it is"
        )
    if off > effect / 2:
        raise ValueError(
            f"rounding to {kind} changes the logits by {off:.2g} of their size and the adapter by {effect:.2g}, so the "
            "written model would not show what was trained: publish the adapter alone (without --merge)"
        )
    return f"logits {off:.1e} of their size from the trained model's, which the adapter changes by {effect:.1e}"


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
