"""`vkvtrain inspect`: what a policy keeps of a text."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from vkvtrain.adapters import check_fits, read_adapter
from vkvtrain.config import EvictionConfig
from vkvtrain.ends import encode
from vkvtrain.inspection.page import page
from vkvtrain.inspection.picture import draw
from vkvtrain.inspection.survival import Survival, policy_overlap, survival
from vkvtrain.loading import load_tokenizer, load_weights, read_config
from vkvtrain.outputs import check_directory
from vkvtrain.support import layer_kinds
from vkvtrain.tiny import MODEL_PATH, task


@dataclass
class InspectArguments:
    """Show what an eviction policy keeps of a text: a table, survival.png, tokens.html and summary.json.

    Without arguments: the embedded model on a problem of its own task.
    """

    model: str = "tiny"
    """Directory or Hub name of the model; `tiny` is the embedded one."""
    peft: str | None = None
    """Directory or Hub name of an adapter."""
    text: str | None = None
    """File with the text, `-` for standard input. Default with `tiny`: a problem and its solution."""
    prompt_tokens: int | None = None
    """First tokens that are the prompt, written without eviction. Default: 1, or the problem's own."""
    policy: str = "vase_attnv"
    """Name of the eviction policy."""
    compare: str | None = None
    """A second policy to compare with, under the same settings."""
    budget: int | None = None
    """Entries kept after an event. Default: half the text, a multiple of the window."""
    window: int = 16
    """Newest entries, always kept; tokens between two events."""
    sinks: int = 4
    """First positions, always kept."""
    protected_fraction: float | None = None
    """Share of the budget that is protected as sinks or large values. Default: the policy's own."""
    measure: Literal["range", "variance", "l2", "random"] = "range"
    """What makes a value large."""
    retention: Literal["sampled", "top_k"] | None = None
    """Whether the unprotected are sampled by their scores, or the highest kept. Default: the policy's own."""
    protect_prompt: bool = False
    """Keep the prompt."""
    policy_args: str = "{}"
    """The policy's own parameters as JSON, for example '{"rank": 20}'."""
    seed: int = 0
    """Seed of the policy's noise."""
    max_tokens: int = 4096
    """A longer text is cut to its first tokens, and it is said."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights."""
    output: Path = Path("runs/inspect")
    """Directory to write."""


def configs(arguments: InspectArguments, budget: int) -> list[EvictionConfig]:
    """The settings to show.

    Raises:
        ValueError: settings that do not hold, or policies that keep everything.
    """
    try:
        policy_args = json.loads(arguments.policy_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--policy-args {arguments.policy_args!r} is not JSON: {error}") from None
    names = ("window", "sinks", "protected_fraction", "measure", "retention", "protect_prompt", "seed")
    shared = {name: getattr(arguments, name) for name in names}
    found = [EvictionConfig(**shared, policy=arguments.policy, budget=budget, policy_args=policy_args)]
    if arguments.compare is not None:
        found.append(EvictionConfig(**shared, policy=arguments.compare, budget=budget))
    for config in found:
        if not config.evicts:
            raise ValueError(f"policy {config.policy!r} keeps everything: there is nothing to show")
    return found


def read_text(arguments: InspectArguments) -> tuple[str, str]:
    """(prompt, rest) of the text; the prompt is empty unless it is a problem of the embedded task.

    Raises:
        ValueError: no text, or one that cannot be read.
    """
    if arguments.text is None:
        if arguments.model != "tiny":
            raise ValueError("--text is required: give a file with the text to look at, or - for standard input")
        (problem,) = task.problems("validation", 0, 1)
        return problem.prompt, problem.response
    try:
        text = sys.stdin.read() if arguments.text == "-" else Path(arguments.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {arguments.text!r} cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(f"--text {arguments.text!r} is empty: give a text to look at")
    return "", text


def tokens_of(arguments: InspectArguments, tokenizer: Any, prompt: str, rest: str) -> tuple[list[int], int]:
    """(tokens, how many of them are the prompt)."""
    if prompt:
        (first,) = encode(tokenizer, [prompt])
        ids = [*first, *tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]]
    else:
        first, (ids,) = [], encode(tokenizer, [rest])
    if len(ids) > arguments.max_tokens:
        print(f"the text has {len(ids)} tokens; only the first {arguments.max_tokens} (--max-tokens) are looked at")
        ids = ids[: arguments.max_tokens]
    length = len(first) or 1
    if arguments.prompt_tokens is None and length >= len(ids):
        raise ValueError(
            f"--max-tokens {arguments.max_tokens} leaves nothing after the {length} tokens of the prompt: raise it"
        )
    if arguments.prompt_tokens is not None:
        length = arguments.prompt_tokens
        if not 1 <= length <= len(ids):
            raise ValueError(f"--prompt-tokens {length} must be from 1 to the text's {len(ids)} tokens")
    return ids, length


def load(arguments: InspectArguments, name: str) -> Any:
    """The model in evaluation mode, with its adapter if there is one; raises ValueError if it cannot be had."""
    model = load_weights(name, "--model", dtype=arguments.dtype)
    if arguments.peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.peft)
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device)


def summary(survivals: Sequence[Survival]) -> dict[str, Any]:
    """Everything that the table shows, as plain data."""
    settings = []
    for found in survivals:
        prompt = found.prompt_share()
        settings.append(
            {
                "setting": found.config.model_dump(mode="json"),
                "tokens": found.length,
                "prompt_tokens": found.prompt,
                "held_entries": int(found.held()[0, 0].sum()),
                "evictions": len(found.events),
                "head_overlap_by_chance": found.overlap_by_chance(),
                "layers": [
                    {
                        "layer": layer,
                        "prompt_held": {
                            "mean": prompt[i].mean().item(), "min": prompt[i].min().item(),
                            "max": prompt[i].max().item(),
                        },
                        "head_overlap": found.head_overlap()[i].item() if prompt.shape[1] > 1 else None,
                    }
                    for i, layer in enumerate(found.layers)
                ],
            }
        )  # fmt: skip
    result: dict[str, Any] = {"settings": settings}
    if len(survivals) == 2:
        result["policy_overlap"] = policy_overlap(*survivals).tolist()
    return result


def show(results: dict[str, Any], console: Console) -> None:
    """Print the summary: a row for each layer."""
    overlaps = results.get("policy_overlap")
    for setting in results["settings"]:
        table = Table(
            title=f"{setting['setting']['policy']}: {setting['evictions']} evictions, "
            f"{setting['held_entries']} of {setting['tokens']} tokens held, {setting['prompt_tokens']} tokens of prompt"
        )
        for column in ("layer", "prompt held (min-max over heads)", "overlap of heads"):
            table.add_column(column, justify="right")
        for row in setting["layers"]:
            prompt, overlap = row["prompt_held"], row["head_overlap"]
            table.add_row(
                str(row["layer"]),
                f"{prompt['mean']:.0%} ({prompt['min']:.0%}-{prompt['max']:.0%})",
                "one head" if overlap is None else f"{overlap:.2f} (chance {setting['head_overlap_by_chance']:.2f})",
            )
        console.print(table)
    if overlaps:
        layers = [row["layer"] for row in results["settings"][0]["layers"]]
        least = sorted(zip(overlaps, layers, strict=True))[:3]
        names = " and ".join(setting["setting"]["policy"] for setting in results["settings"])
        console.print(
            f"{names} hold the same tokens in the same heads with a Jaccard overlap of "
            f"{sum(overlaps) / len(overlaps):.2f}; they differ the most in layers "
            + ", ".join(f"{layer} ({overlap:.2f})" for overlap, layer in least)
        )


def run(arguments: InspectArguments) -> None:
    """Measure, print and write.

    Raises:
        ValueError: one sentence that names the setting and the fix, before a model is loaded where that is possible.
    """
    configs(arguments, arguments.budget or 2 * arguments.window)  # what is wrong without knowing the text's length
    if arguments.max_tokens < 2:
        raise ValueError(f"--max-tokens must be at least 2, got {arguments.max_tokens}")
    check_directory(arguments.output, "--output")
    prompt, rest = read_text(arguments)
    name = str(MODEL_PATH) if arguments.model == "tiny" else arguments.model
    base = read_config(name, "--model")
    adapter = None if arguments.peft is None else read_adapter(arguments.peft, "--peft")
    if adapter is not None:
        check_fits(adapter, base, "--peft")
    tokenizer = load_tokenizer(name, "--model")
    ids, length = tokens_of(arguments, tokenizer, prompt, rest)
    budget = arguments.budget or max(2, len(ids) // 2 // arguments.window) * arguments.window
    settings = configs(arguments, budget)
    for config in settings:
        layer_kinds(base, config)
    model = load(arguments, name)
    survivals = [survival(model, ids, config, length) for config in settings]
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"arguments": {key: str(value) for key, value in asdict(arguments).items()}, **summary(survivals)}
    (arguments.output / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(survivals, arguments.output / "survival.png")
    tokens = [tokenizer.decode([token]) for token in ids]
    shown = arguments.model if arguments.peft is None else f"{arguments.model} with {arguments.peft}"
    (arguments.output / "tokens.html").write_text(page(survivals, tokens, shown), encoding="utf-8")
    show(results, Console())
    print(f"written: {arguments.output}/survival.png, tokens.html, summary.json")


def main(rest: list[str]) -> None:
    """The command line of `vkvtrain inspect`."""
    run(tyro.cli(InspectArguments, args=rest, prog="vkvtrain inspect", config=(tyro.conf.FlagCreatePairsOff,)))
