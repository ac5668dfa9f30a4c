"""The `vkvtrain` command."""

import json
import sys
from itertools import takewhile
from typing import Any

_HELP = """usage: vkvtrain [-h] [--version] COMMAND ...

Fine-tune models while their KV cache is being evicted, and evaluate them with the evicting cache. In the order of use:

  plan      memory per device, FLOPs and time of a training step, slots and tokens/s of decoding, each with its formula:
            vkvtrain plan --model-config qwen3-8b --seq 32768 --budget 4096 --gpus 8 --strategy fsdp2 --device h100
  data      generate: training traces by the model itself under the full cache, kept if a verifier says they are right:
            vkvtrain data generate --model Qwen/Qwen3-0.6B --source problems.jsonl --output traces.jsonl
            preview: rows as the trainer sees them, their lengths, evictions and loss masks:
            vkvtrain data preview recipes/tiny/vase.yaml
  inspect   what a policy keeps of a text, as a table, a picture and a page; without arguments, of the embedded model's
            own task: vkvtrain inspect --model Qwen/Qwen3-0.6B --text story.txt --policy vase_attnv --compare snapkv
  lm-eval   lm-eval with the model `vkv`, whose generation uses the evicting cache; takes lm-eval's own arguments
            (peft=... adds an adapter; without policy= the cache is full): vkvtrain lm-eval run --model vkv
            --model_args pretrained=...,policy=vase_attnv,budget=2048,window=64 --tasks ... --output_path ...
  ablate    a grid of models, policies, budgets, tasks and seeds with its controls, each cell an lm-eval process;
            a rerun continues: vkvtrain ablate eval/sweeps/quickstart.yaml --limit 50
  results   list, filter and export what a sweep measured: vkvtrain results runs/sweeps/quickstart --where "budget = 64"
  report    Markdown and a page of a sweep, with intervals, comparisons and curves:
            vkvtrain report runs/sweeps/quickstart
  publish   a finished run as a directory or Hub repository that stands on its own: adapter or merged weights, eviction
            setting, tokenizer, model card with what was measured:
            vkvtrain publish runs/x --results runs/sweeps/x --to DIR --push user/name
  chat      talk to a published model or a finished run while its cache is evicted: vkvtrain chat DIR

Training is launched by recipes, between data and lm-eval: see recipes/finetune.py --help. The whole path on the
embedded model is docs/walkthrough.md. Every command has its own --help.
"""
_DATA_HELP = """usage: vkvtrain data {generate,preview} ...

  generate   training traces by the model itself under the full cache, kept if a verifier says they are right
  preview    rows of a recipe as the trainer sees them, their lengths, evictions and loss masks

Each has its own --help.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if rest[0] == "--version":
        from vkvtrain import __version__

        print(__version__)
        return 0
    commands = {
        command.__name__.replace("_", "-"): command
        for command in (plan, data, inspect, lm_eval, ablate, results, report, publish, chat)
    }
    if rest[0] not in commands:
        print(f"vkvtrain: there is no command {rest[0]!r} (known: {', '.join(commands)})", file=sys.stderr)
        return 2
    try:
        commands[rest[0]](rest[1:])
    except ValueError as error:
        print(f"vkvtrain {rest[0]}: {error}", file=sys.stderr)
        return 2
    return 0


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


def plan(arguments: list[str]) -> None:
    """Memory, FLOPs and speed on paper."""
    from vkvtrain.planning.command import main as run

    run(arguments)


def inspect(arguments: list[str]) -> None:
    """What a policy keeps of a text."""
    from vkvtrain.inspection.command import main as show

    show(arguments)


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
    sys.argv = ["vkvtrain lm-eval", *arguments]
    cli_evaluate()


def ablate(arguments: list[str]) -> None:
    """Run a sweep."""
    from vkvtrain.ablation.command import ablate as run

    run(arguments)


def results(arguments: list[str]) -> None:
    """List, filter and export the results of a sweep."""
    from vkvtrain.ablation.command import results as show

    show(arguments)


def report(arguments: list[str]) -> None:
    """Write the report of a sweep."""
    from vkvtrain.ablation.command import report as write

    write(arguments)


def publish(arguments: list[str]) -> None:
    """From a finished run to a directory or Hub repository."""
    from vkvtrain.publishing.command import main as export

    export(arguments)


def chat(arguments: list[str]) -> None:
    """Talk to a model whose cache is evicted."""
    from vkvtrain.chat import main as talk

    talk(arguments)


if __name__ == "__main__":
    sys.exit(main())
