"""The `vkvtrain` command: names, help and dispatch.

A module of its own beside the package: `import vkvtrain` registers the attention implementation, for which it loads
torch and transformers, and neither `--help` nor a mistyped command should wait for them.
"""

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

_HELP = """usage: vkvtrain [-h] [--version] COMMAND ...

Fine-tune models while their KV cache is being evicted, and evaluate them with the evicting cache. In the order of use:

  quickstart  the embedded model, untrained, trained densely and trained under eviction, answers with the full and the
              evicting cache, side by side; about a minute, nothing is downloaded
  train       train an adapter; a shipped recipe's name or a YAML file, and any setting of it:
              vkvtrain train qwen3-0.6b --data.source traces.jsonl
              vkvtrain train qwen3-8b --gpus 8             # through accelerate launch
  recipes     what is shipped, with memory and what was measured; vkvtrain recipes copy qwen3-0.6b to change one
  plan        memory per device, FLOPs and time of a training step, slots and tokens/s of decoding, with formulas:
              vkvtrain plan qwen3-8b --gpus 8 --strategy fsdp2 --device h100
  data        generate: traces by the model itself under the full cache, kept if a verifier says they are right:
              vkvtrain data generate --model Qwen/Qwen3-0.6B --source problems.jsonl --output traces.jsonl
              preview: rows as the trainer sees them, their lengths, evictions and loss masks:
              vkvtrain data preview qwen3-0.6b --data.source traces.jsonl
  inspect     what a policy keeps of a text, as a table, a picture and a page; without arguments, of the embedded
              model's own task: vkvtrain inspect --model Qwen/Qwen3-0.6B --text story.txt --compare snapkv
  lm-eval     lm-eval with the model `vkv`, whose generation uses the evicting cache; takes lm-eval's own arguments
              (peft=... adds an adapter; without policy= the cache is full): vkvtrain lm-eval run --model vkv
              --model_args pretrained=...,policy=vase_attnv,budget=2048,window=64 --tasks ... --output_path ...
  ablate      a grid of models, policies, budgets, tasks and seeds with its controls, each cell an lm-eval process;
              a rerun continues: vkvtrain ablate quickstart --limit 50
  results     list, filter and export what a sweep measured:
              vkvtrain results runs/sweeps/quickstart --where "budget = 64"
  report      Markdown and a page of a sweep, with intervals, comparisons and curves:
              vkvtrain report runs/sweeps/quickstart
  publish     a finished run as a directory or Hub repository that stands on its own: adapter or merged weights,
              eviction setting, tokenizer, model card with what was measured:
              vkvtrain publish runs/x --results runs/sweeps/x --to DIR --push user/name
  chat        talk to a published model or a finished run while its cache is evicted: vkvtrain chat DIR

The whole path on the embedded model is docs/walkthrough.md. Every command has its own --help.
"""
COMMANDS = {
    "quickstart": "vkvtrain.quickstart:main",
    "train": "vkvtrain.training.command:main",
    "recipes": "vkvtrain.recipes:main",
    "plan": "vkvtrain.planning.command:main",
    "data": "vkvtrain.cli:data",
    "inspect": "vkvtrain.inspection.command:main",
    "lm-eval": "vkvtrain.cli:lm_eval",
    "ablate": "vkvtrain.ablation.command:ablate",
    "results": "vkvtrain.ablation.command:results",
    "report": "vkvtrain.ablation.command:report",
    "publish": "vkvtrain.publishing.command:main",
    "chat": "vkvtrain.chat:main",
}
"""Where each command is implemented: called with its arguments, it returns an exit status, or None for 0."""


def wait_passively() -> None:
    """OpenMP threads that wait sleep instead of spinning, unless the environment says otherwise.

    A decode event is many small operations: on a CPU that does other work too, threads that spin for each other make a
    step many times slower. OpenMP reads the variable once, as torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    name = rest[0]
    if name == "--version":
        from importlib.metadata import version

        print(version("vkvtrain"))
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        print(f"vkvtrain: there is no command {name!r} ({known})", file=sys.stderr)
        return 2
    wait_passively()
    module, _, function = COMMANDS[name].partition(":")
    command: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
    try:
        return command(rest[1:]) or 0
    except ValueError as error:
        print(f"vkvtrain {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
