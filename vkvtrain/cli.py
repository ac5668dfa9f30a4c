"""`vkvtrain data` and `vkvtrain lm-eval`; as `python -m vkvtrain.cli`, which launchers start, all commands."""

import argparse
import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from vkvtrain.shipped import TASKS, tasks_directory
from vkvtrain.yaml_files import read_mapping
from vkvtrain_cli import main

__all__ = ["data", "generation_settings", "lm_eval", "main", "with_tasks"]
_DATA_HELP = """usage: vkvtrain data {generate,preview} ...

  generate   training traces by the model itself under the full cache, kept if a verifier says they are right
  preview    rows of a recipe as the trainer sees them, their lengths, evictions and loss masks

Each has its own --help.
"""


def data(arguments: list[str]) -> None:
    """Look at training rows, or make them."""
    if arguments[:1] == ["preview"]:
        from vkvtrain.training.data.preview import main as run
    elif arguments[:1] == ["generate"]:
        from vkvtrain.traces.command import main as run
    elif arguments[:1] in (["-h"], ["--help"]):
        print(_DATA_HELP, end="")
        return
    else:
        raise ValueError("say what to do: preview or generate; see vkvtrain data --help")
    run(arguments[1:])


def generation_settings(arguments: list[str]) -> dict[str, Any]:
    """What follows `--gen_kwargs`: `name=value`, several of them separated by commas or spaces, or a JSON object."""
    from lm_eval.utils import simple_parse_args_string

    given: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--gen_kwargs":
            rest = takewhile(lambda other: not other.startswith("-"), arguments[place + 1 :])
            for part in [value] if equals else rest:
                given |= json.loads(part) if part.startswith("{") else simple_parse_args_string(part)
    return given


def with_tasks(arguments: list[str]) -> list[str]:
    """lm-eval's arguments with the shipped tasks beside its own, where no other directory is given, also in --config.

    `eval/tasks` is the shipped directory wherever the current one has none of that name.
    """
    if len(arguments) < 2 or {"-h", "--help"} & set(arguments):
        return arguments
    given, configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False), []
    given.add_argument("--include_path")
    given.add_argument("--config", "-C")
    known, rest = given.parse_known_args(arguments)
    directory = known.include_path
    if known.config is not None:
        configs = ["--config", known.config]
        if directory is None and Path(known.config).is_file():
            directory = read_mapping(Path(known.config)).get("include_path")
    return [*rest, *configs, "--include_path", tasks_directory(directory or TASKS)]


def lm_eval(arguments: list[str]) -> None:
    """lm-eval's own command line with the model `vkv` registered; 0.4.13 finds no plugins by itself."""
    if any(argument.split("=")[0] in ("--use_cache", "-c") for argument in arguments):
        raise ValueError(
            "--use_cache: lm-eval's request cache does not know the budget; the model argument journal=DIRECTORY "
            "resumes an interrupted run"
        )
    if any(argument.split("=")[0] == "--cache_requests" for argument in arguments):
        raise ValueError("--cache_requests: lm-eval's cache of prompts does not know --metadata; leave it out")
    from lm_eval.__main__ import cli_evaluate

    from vkvtrain.evaluation import lm  # noqa: F401 (importing it registers the model)
    from vkvtrain.evaluation.sampling import check_generation

    check_generation(generation_settings(arguments))
    arguments = with_tasks(arguments)
    sys.argv = ["vkvtrain lm-eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
