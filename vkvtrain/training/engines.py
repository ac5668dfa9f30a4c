"""What differs between distributed engines: where gradients, trained weights and optimiser state are.

Everything is read and written whole and by name, whatever way an engine shards it, so a checkpoint knows nothing of
engines: one written by ZeRO-3 on eight devices continues on one. Adapters are small; the base is never gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vkvtrain.training.launch import is_asked_for
from vkvtrain.training.settings import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, beside its count of steps."""
TIMEOUT = timedelta(minutes=15)
"""After which a rank that no longer answers fails the run; loading a model or an evaluation must take less."""


def make_accelerator(recipe: Recipe, trackers: list[str]) -> Accelerator:
    """The accelerator of the launch, with what the recipe says about clipping and batch sizes."""
    deepspeed = is_asked_for("ACCELERATE_USE_DEEPSPEED")
    backend = "gloo" if deepspeed and not torch.cuda.is_available() else None  # deepspeed alone would look for another
    accelerator = Accelerator(
        log_with=list(trackers) or None, project_dir=recipe.output,
        # the loop accumulates; given as a number, a variable of the environment would replace it and divide gradients
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)],
    )  # fmt: skip
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # accumulation is the loop's, over a whole step; clipping can only be the engine's
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": recipe.training.batch_per_device,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.optim.max_grad_norm,
        }
    return accelerator


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model: FSDP and ZeRO-3."""
    plugin = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


@contextmanager
def accumulating(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:
    """A backward pass of which gradients are exchanged only if it is the step's last."""
    accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed updates the weights in the last backward pass
    if last:
        yield
        return
    with accelerator.no_sync(model):
        yield


def trained(model: Any) -> dict[str, Any]:
    """The trained parameters of an unwrapped model by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def whole(value: Any) -> Tensor:
    """A tensor on the CPU, gathered if it is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()


def gather_weights(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    """The trained weights by name, whole and in float32; every process calls it."""
    if is_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: whole(safe_get_full_fp32_param(weight)) for name, weight in trained(model).items()}
    return {name: whole(weight) for name, weight in trained(model).items()}


def gather_moments(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Tensor]:
    """AdamW's moments, `{moment}/{parameter}`, whole; every process calls it."""
    moments = {}
    for name, weight in trained(model).items():
        for moment in MOMENTS:
            if is_deepspeed(accelerator):
                from deepspeed.utils import safe_get_full_optimizer_state

                value = safe_get_full_optimizer_state(weight, moment)
            else:
                value = optimizer.state[weight][moment]
            moments[f"{moment}/{name}"] = whole(value)
    return moments


def restore_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Put trained weights back into a model that no engine has prepared yet."""
    for name, weight in trained(model).items():
        weight.data.copy_(weights[name])


def restore_moments(
    accelerator: Accelerator, model: Any, optimizer: Any, weights: dict[str, Tensor], moments: dict[str, Tensor],
    step: int,
) -> None:  # fmt: skip
    """Put AdamW's moments after `step` steps back into a fresh optimiser; every process calls it.

    Args:
        accelerator, model, optimizer: as prepared; `model` unwrapped.
        weights, moments: what `gather_weights` and `gather_moments` gave.
        step: steps that they were taken after.
    """
    deepspeed = optimizer.optimizer if is_deepspeed(accelerator) else None
    inner = optimizer.optimizer if deepspeed is None else deepspeed.optimizer
    for weight in trained(model).values() if deepspeed is None else _flat_weights(deepspeed):
        fresh = {moment: torch.zeros_like(weight, requires_grad=False) for moment in MOMENTS}
        inner.state[weight] = {"step": torch.tensor(float(step)), **fresh}
    if deepspeed is not None:
        _restore_deepspeed(model, deepspeed, weights, moments)
        return
    for name, weight in trained(model).items():
        for moment in MOMENTS:
            value, into = moments[f"{moment}/{name}"], inner.state[weight][moment]
            if isinstance(into, DTensor):
                value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
            into.copy_(value)


def _flat_weights(deepspeed: Any) -> list[Tensor]:
    """This process's parts of the float32 copies of the weights, for which DeepSpeed's optimiser has its state."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(deepspeed, DeepSpeedZeroOptimizer_Stage3):
        return deepspeed.fp32_partitioned_groups_flat
    return deepspeed.single_partition_of_fp32_groups


def _restore_deepspeed(model: Any, deepspeed: Any, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """Its optimiser works on flat float32 copies of the weights, which may be finer than what the model holds."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if isinstance(deepspeed, DeepSpeedZeroOptimizer):
        deepspeed._lazy_init_hp_params_optimizer_state()  # it does so itself only after a first step
    for name, weight in trained(model).items():
        safe_set_full_fp32_param(weight, weights[name])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(weight, moments[f"{moment}/{name}"], moment)
