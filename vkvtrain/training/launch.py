"""What a run was launched as, and what it is.

Some launch configurations start one process, or several that do not know of each other, or DDP instead of FSDP, without
a word; a run then trains something else than its plan says. Knows launchers; knows nothing of models.
"""

import os
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from vkvtrain.training.settings import Recipe

REFUSED = (
    ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "torch.compile of the training step is not supported"),
    ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16"), "only bf16 is supported, or 'no' with model.dtype bfloat16"),
    ("ACCELERATE_USE_MEGATRON_LM", ("", "false"), "Megatron-LM is not supported"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("", "false"), "tensor and context parallelism are not supported"),
)
"""Variables through which accelerate would change what is trained: name, values that change nothing, what to say."""


def is_asked_for(variable: str) -> bool:
    """Whether a flag that accelerate reads is set in the environment."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "t", "on")


def check_environment() -> None:
    """Raise ValueError for what lies around a run and would change what is trained; before accelerate reads it.

    Launchers set them from their arguments and configuration files, cluster scripts for all that they start.
    """
    for variable, harmless, says in REFUSED:
        value = os.environ.get(variable, "")
        if value.lower() not in harmless:
            raise ValueError(f"the environment or the launcher sets {variable}={value}: {says}; leave it out")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError(
            "gradients are switched off (torch.no_grad, inference_mode or set_grad_enabled): switch them on"
        )
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}, in which the adapter would be trained: set it back "
            "to float32, and choose the type of the base weights by model.dtype"
        )


def asked_processes() -> int:
    """How many processes the launcher was asked for."""
    return int(os.environ.get("WORLD_SIZE") or asked_of_accelerate(parent_command()))


def parent_command() -> list[str]:
    """The command line of the process that started this one; empty where it is not to be had."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def launcher_arguments(command: list[str]) -> list[str] | None:
    """What `accelerate launch` was given in a command line; None for any other command."""
    for place, part in enumerate(command[:4]):
        if part == "accelerate.commands.launch" or Path(part).name == "accelerate-launch":
            return command[place + 1 :]
        if Path(part).name == "accelerate" and command[place + 1 : place + 2] == ["launch"]:
            return command[place + 2 :]
        if part.endswith("accelerate/commands/launch.py"):
            return command[place + 1 :]
    return None


def launcher_process() -> int | None:
    """The process id of the launcher that started this process; None where it was started by hand or by a scheduler.

    A shell that ends must not take a run with it, a launcher must: nobody else would tell the run to stop, or see how
    it ends. Compared with `os.getppid()`, which every system has, where the kernel's own signal at a parent's end
    (PR_SET_PDEATHSIG) is Linux's alone, comes when a *thread* of the parent ends, and says nothing to a process whose
    parent is gone already.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or launcher_arguments(parent_command()) is not None
    return os.getppid() if launched else None


def asked_of_accelerate(command: list[str]) -> int:
    """Processes that an `accelerate launch` command asks for; 1 for any other command.

    Where accelerate drops processes it sets no variable, so only its own command line can tell.
    """
    given = launcher_arguments(command)
    if not given:
        return 1
    arguments = launch_command_parser().parse_known_args(given)[0]
    if arguments.num_processes is not None:
        return arguments.num_processes
    if arguments.config_file is None or not os.path.isfile(arguments.config_file):
        return 1
    config = load_config_from_file(arguments.config_file)
    return config.num_processes if isinstance(config, ClusterConfig) else 1


def check_world_size(recipe: Recipe, processes: int) -> None:
    """Raise ValueError if this run does not have the processes that were asked for, or cannot share its batch."""
    asked, batch = asked_processes(), recipe.training.global_batch
    if processes != asked:
        raise ValueError(
            f"the launcher was asked for {asked} processes but this run has {processes}: launch CPU processes with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node"
        )
    if batch % processes:
        raise ValueError(f"training.global_batch ({batch}) must be a multiple of the {processes} processes")


def check_replicated() -> None:
    """Raise ValueError where models would be loaded in parts, as transformers does by these variables alone."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if is_asked_for(variable):
            raise ValueError(
                f"the launcher or the environment sets {variable}, by which weights are sharded, and evaluation holds "
                "the whole model in every process: launch with --multi_gpu"
            )


def check_engine(accelerator: Accelerator) -> None:
    """Raise ValueError if this run has not the engine that was asked for, or one that is not supported."""
    for variable, name, engine in (
        ("ACCELERATE_USE_FSDP", "FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", DistributedType.DEEPSPEED),
    ):
        if is_asked_for(variable) and accelerator.distributed_type != engine:
            raise ValueError(
                f"the launcher was asked for {name} but this run has {accelerator.distributed_type.value} (accelerate "
                "shards on GPUs only): use accelerate_configs/multi_gpu.yaml, or CPU processes with "
                "ACCELERATE_USE_CPU=true torchrun --nproc_per_node"
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP version 1 is not supported: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does"
            )
        plugin = accelerator.state.fsdp_plugin
        if plugin is not None and plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing is not supported: set model.gradient_checkpointing in the recipe instead"
            )
    deepspeed = accelerator.state.deepspeed_plugin
    halved = deepspeed is not None and deepspeed.deepspeed_config.get("fp16", {}).get("enabled") is True
    if halved or accelerator.mixed_precision not in ("no", "bf16"):
        given = "fp16" if halved else accelerator.mixed_precision
        raise ValueError(f"mixed_precision {given} is not supported: use bf16, or 'no' with model.dtype bfloat16")
