"""The state of a training run between two steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from vkvtrain.training.data import TrainingData
from vkvtrain.training.interrupts import Interrupt
from vkvtrain.training.settings import Recipe
from vkvtrain.training.watch import Watch


@dataclass
class Run:
    """What a step reads and changes."""

    recipe: Recipe
    accelerator: Accelerator
    model: Any
    """The adapted model with its loss, as `accelerator.prepare` returns it."""
    optimizer: Any
    scheduler: Any
    data: TrainingData
    tokenizer: Any
    watch: Watch
    step: int = 0
    """Finished optimiser steps, which is also the number of the next one, from 0."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Of the main process: what checkpoints must have been made of, see `vkvtrain.training.resume.identity_of`."""
    saved: str | None = None
    """Name of the checkpoint of `step`, once there is one."""
    row: dict[str, Any] | None = None
    """What is known of the last finished step before it is in the log."""
    interrupt: Interrupt = field(default_factory=Interrupt)

    @property
    def adapted(self) -> Any:
        """The adapted model as peft made it."""
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        return unwrapped.model

    @property
    def pad(self) -> int:
        """Token that fills a batch up; it is masked, so that any will do."""
        own = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in own if token is not None), 0)
