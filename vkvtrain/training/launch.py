"""What a run was launched as, and what it is.

Some launch configurations start one process, or several that do not know of each other, or DDP instead of FSDP, without
a word; a run then trains something else than its plan says. Knows launchers; knows nothing of models.
"""

import os

import psutil
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from vkvtrain.training.settings import Recipe


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


def asked_of_accelerate(command: list[str]) -> int:
    """Processes that an `accelerate launch` command asks for; 1 for any other command.

    Where accelerate drops processes it sets no variable, so only its own command line can tell.
    """
    launcher = next((place for place, part in enumerate(command[:4]) if "accelerate" in part), None)
    if launcher is None:
        return 1
    rest = command[launcher + 1 :]
    rest = rest[1:] if rest[:1] == ["launch"] else rest
    arguments = launch_command_parser().parse_known_args(rest)[0]
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


def check_engine(accelerator: Accelerator) -> None:
    """Raise ValueError if this run has not the engine that was asked for, or one that is not supported."""
    for variable, name, engine in (
        ("ACCELERATE_USE_FSDP", "FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type != engine:
            raise ValueError(
                f"the launcher was asked for {name} but this run has {accelerator.distributed_type.value} (accelerate "
                "shards on GPUs only): use accelerate_configs/multi_gpu.yaml, or CPU processes with "
                "ACCELERATE_USE_CPU=true torchrun --nproc_per_node"
            )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not supported: use bf16, or 'no' with model.dtype bfloat16")
