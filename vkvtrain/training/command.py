"""`vkvtrain train`, and what `recipes/finetune.py` runs: one training run, in this process or launched."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vkvtrain.config import nearest
from vkvtrain.shipped import shipped
from vkvtrain.training.interrupts import Interrupted
from vkvtrain.training.loop import train
from vkvtrain.training.overrides import Command, describe_settings, load_recipe, parse_command
from vkvtrain.training.run_directory import Incomplete
from vkvtrain.training.watch import Failed

HELP = """usage: vkvtrain train RECIPE [--gpus N] [--SETTING VALUE ...]

Fine-tune a model with LoRA while its KV cache is being evicted. RECIPE is the name of a shipped recipe (`vkvtrain
recipes`) or a YAML file; any setting of it can be overridden: `--optim.learning_rate 1e-3`, or `--budget 64` where the
name is unique.

    vkvtrain train tiny                                            the embedded model, on a CPU
    vkvtrain train qwen3-0.6b --data.source traces.jsonl           in this process, on a GPU if there is one
    vkvtrain train qwen3-8b --gpus 8                               `accelerate launch`, whose command is shown
    vkvtrain train qwen3-14b --gpus 8 --config_file fsdp2          with another shipped configuration, or a file

    --gpus N           processes on this machine, each with a GPU
    --config_file F    an accelerate configuration: single_gpu, multi_gpu (the default of --gpus), deepspeed_zero2,
                       deepspeed_zero3, fsdp2, cpu, or a file
    --nodes N          machines; the same command runs on each, with --node_rank and --main_address
    --node_rank I      number of this machine, from 0
    --main_address A   name of the machine of rank 0, HOST or HOST:PORT
    --dry-run          print the plan (processes, batch, trainable share, a sample with its loss mask, evictions), take
                       one step on one row, and write nothing
    --overwrite        start afresh where the output directory holds a run, finished or not

Writes the adapter, eviction_config.json, recipe.yaml, metrics.jsonl, environment.json, report.md and training.png to
`output`. A run that was killed or stopped is continued by the same command, from its newest checkpoint. Bad settings
are one sentence on standard error and exit status 2, before any model is loaded; a loss that is no use is status 1,
SIGTERM 143 and Ctrl-C 130, each after a checkpoint; something that could not be written at the end is status 1 too.
Where processes are launched the status is the launcher's (docs/distributed.md).
"""
PORT = 29500
"""Of the machine of rank 0, if none is given."""


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` is asked for."""

    gpus: int | None = None
    config_file: str | None = None
    nodes: int = 1
    node_rank: int | None = None
    main_address: str | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether processes are launched; otherwise the run is this process."""
        return self.gpus is not None or self.config_file is not None or self.nodes > 1

    def command(self, rest: Sequence[str]) -> list[str]:
        """The command that starts the processes of one machine, with `rest` for recipes/finetune.py."""
        configuration = configuration_file(self.config_file or ("single_gpu" if self.gpus == 1 else "multi_gpu"))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
        if self.gpus is not None:
            command += ["--num_processes", str(self.gpus * self.nodes)]
        if self.nodes > 1:
            host, _, port = str(self.main_address).partition(":")
            command += ["--num_machines", str(self.nodes), "--machine_rank", str(self.node_rank)]
            command += ["--main_process_ip", host, "--main_process_port", port or str(PORT)]
        return [*command, str(shipped("recipes") / "finetune.py"), *rest]


def configuration_file(given: str) -> Path:
    """An accelerate configuration by its path or the name of a shipped one; raises ValueError for an unknown one."""
    if Path(given).is_file():
        return Path(given)
    named = {path.stem: path for path in shipped("accelerate_configs").glob("*.yaml")}
    if given not in named:
        raise ValueError(
            f"--config_file: there is no accelerate configuration {given!r}{nearest(given, sorted(named))}"
        )
    return named[given]


def parse_launch(arguments: Sequence[str]) -> tuple[Launch, list[str]]:
    """What is asked of the launcher, and the arguments of the run.

    Raises:
        ValueError: an option without a value or with one that does not hold, or machines that cannot find each other.
    """
    given: dict[str, str] = {}
    rest, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name not in Launch.__dataclass_fields__:
            rest.append(argument)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = left.pop(0)
        given[name] = value
    numbers = {name: _number(name, given[name]) for name in ("gpus", "nodes", "node_rank") if name in given}
    launch = Launch(
        numbers.get("gpus"), given.get("config_file"), numbers.get("nodes", 1), numbers.get("node_rank"),
        given.get("main_address"),
    )  # fmt: skip
    if launch.nodes > 1:
        missing = [name for name in ("gpus", "node_rank", "main_address") if name not in given]
        if missing:
            raise ValueError(f"--nodes {launch.nodes} needs --{missing[0]} as well; see --help")
        if not 0 <= numbers["node_rank"] < launch.nodes:
            raise ValueError(f"--node_rank must be from 0 to {launch.nodes - 1}, got {launch.node_rank}")
    elif launch.node_rank is not None or launch.main_address is not None:
        raise ValueError("--node_rank and --main_address are for several machines: say how many by --nodes")
    return launch, rest


def _number(name: str, value: str) -> int:
    least = 0 if name == "node_rank" else 1
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"--{name} must be a whole number, at least {least}, got {value!r}")
    return int(value)


def finetune(arguments: Sequence[str], usage: str, name: str = "finetune") -> int:
    """One training run in this process; returns the exit status.

    Args:
        arguments: a recipe, flags and overrides.
        usage: what `--help` prints above the settings.
        name: what messages on standard error begin with.
    """
    try:
        command = parse_command(arguments)
        if command.help or command.recipe is None:
            print(f"{usage}\nSettings [default]:\n{describe_settings()}")
            return 0
        run(command)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (Failed, Incomplete) as failure:
        print(f"{name}: {failure}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return interrupted.status
    return 0


def run(command: Command) -> None:
    """Train what a parsed command line names."""
    assert command.recipe is not None
    train(load_recipe(command.recipe, command.overrides), dry_run=command.dry_run, overwrite=command.overwrite)


def main(arguments: list[str]) -> int:
    """The command line of `vkvtrain train`; returns the exit status.

    A launched run takes the place of this process, so that signals and the exit status are the launcher's own.
    """
    launch, rest = parse_launch(arguments)
    if not launch.is_asked_for or {"-h", "--help"} & set(rest):
        return finetune(rest, HELP, "vkvtrain train")
    command = parse_command(rest)
    if command.recipe is not None:
        load_recipe(command.recipe, command.overrides)  # refused here once, not in every process
    started = launch.command(rest)
    print(f"$ {shlex.join(started)}", flush=True)
    os.execv(started[0], started)
    return 0  # where a test put something else in its place
