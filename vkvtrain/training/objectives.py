"""The model with its loss: one module that a wrapper (DDP, DeepSpeed, FSDP) wraps, so that its hooks see every pass.

A pass runs the decoder, then the head in chunks over the positions that predict a response token. The teacher is the
same model with its adapter disabled and the full cache. Losses are sums over response tokens, so that the loop can
divide by the token count of the global batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from vkvtrain.attention import Trace
from vkvtrain.training.data import Batch
from vkvtrain.training.divergences import token_losses
from vkvtrain.training.head import check_head, chunked_loss, model_logits
from vkvtrain.training.settings import TrainingSettings

SFT = TrainingSettings(steps=1)
"""The objective of held-out losses, whatever the model is trained by."""


class ModelWithLoss(nn.Module):
    """An adapted model whose forward takes a batch and returns its loss.

    Args:
        model: a transformers causal language model with a LoRA adapter.
        settings: the objective.
    """

    def __init__(self, model: PeftModel, settings: TrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.config = model.config  # what accelerate reads of a model
        self._no_split_modules = model.get_base_model()._no_split_modules
        self._head_is_checked = False

    def forward(self, batch: Batch, trace: Trace | None = None, cross_entropy_only: bool = False) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            batch: right-padded rows.
            trace: the simulation that the call is in, if any; the teacher's pass suspends it.
            cross_entropy_only: leave the teacher out, for held-out losses.

        Returns:
            `loss`, summed over response tokens, which alone has a gradient; summed likewise `cross_entropy`,
            `divergence` and the `entropy` of the teacher (0 without one); `log_probs` [N] of each response token.

        Raises:
            ValueError: at the first call, a model whose logits are not known how to make in chunks.
        """
        if not self._head_is_checked:
            self._check_head(batch, trace)
        settings = SFT if cross_entropy_only else self.settings
        teacher = self._teacher(batch, trace) if settings.has_teacher else None
        student = self._hidden(batch)
        causal: Any = self.model.get_base_model()
        head = causal.get_output_embeddings()
        # an adapter on the head is the student's alone
        teaching = self.model.disable_adapter if _is_adapted(head) else nullcontext

        def losses(hidden: Tensor, part: slice) -> Tensor:
            theirs = None
            if teacher is not None:
                with torch.no_grad(), teaching():
                    theirs = model_logits(causal, teacher[part])
            return token_losses(model_logits(causal, hidden), theirs, batch.targets[part], settings)

        loss, columns = chunked_loss(losses, student, head, causal.config.get_text_config(decoder=True).vocab_size)
        cross_entropy, divergence, entropy = columns[:, 1:].sum(0)
        return {
            "loss": loss, "cross_entropy": cross_entropy, "divergence": divergence, "entropy": entropy,
            "log_probs": -columns[:, 1],
        }  # fmt: skip

    def _hidden(self, batch: Batch) -> Tensor:
        """Final hidden states at the positions that predict a response token, [N, hidden]."""
        causal: Any = self.model.get_base_model()
        out = causal.get_decoder()(**model_inputs(batch), use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch.predicting)

    @torch.no_grad()
    def _teacher(self, batch: Batch, trace: Trace | None) -> Tensor:
        """The same of the base model with the full cache."""
        with _suspended(trace), self.model.disable_adapter():
            return self._hidden(batch)

    def _check_head(self, batch: Batch, trace: Trace | None) -> None:
        training = self.training
        self.model.eval()  # dropout would tell two passes apart
        with _suspended(trace):
            check_head(self.model.get_base_model(), model_inputs(batch))
        self.model.train(training)
        self._head_is_checked = True


def model_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """What a model and its decoder are called with."""
    return {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids,
    }  # fmt: skip


def _is_adapted(head: nn.Module) -> bool:
    return any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in head.modules())


@contextmanager
def _suspended(trace: Trace | None) -> Iterator[None]:
    with nullcontext() if trace is None else trace.suspended():
        yield
