"""`vkvtrain quickstart`: what eviction does to the embedded model, and what training under eviction changes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

import torch
import tyro
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats
from transformers import AutoTokenizer
from transformers.utils import logging

from vkvtrain.config import EvictionConfig
from vkvtrain.ends import encode, end_tokens
from vkvtrain.generation import Request, generate
from vkvtrain.inspection.survival import Survival, survival
from vkvtrain.loading import load_weights
from vkvtrain.threads import choose_threads
from vkvtrain.tiny import ADAPTERS, ADAPTERS_PATH, MODEL_PATH
from vkvtrain.tiny.task import KeyedSum, grade, problems

WINDOW, LONGEST = 16, 160
NEXT = """What next:
  make demo                               trains both adapters and answers 400 problems through lm-eval (in a checkout)
  vkvtrain train tiny                     trains the adapter again: runs/tiny/vase (tiny/dense is the control)
  vkvtrain inspect                        which tokens the cache keeps, layer by layer
  vkvtrain recipes                        recipes for real models; vkvtrain train qwen3-0.6b --data.source traces.jsonl
"""


@dataclass
class QuickstartArguments:
    """The embedded model (1.2M parameters) on its task, with the full and the evicting cache: untrained, and with the
    two shipped adapters, one trained densely and one under eviction, on the same data and steps."""

    problems: int = 40
    """Test problems."""
    budgets: tuple[int, ...] = (80, 64)
    """Entries that each KV head keeps after an event."""
    shown: int = 3
    """Answers that are shown in full."""
    adapters: Path = ADAPTERS_PATH
    """Directory with dense_lora and eviction_lora, such as runs/demo."""
    seed: int = 0
    """Seed of the policy's noise."""


@dataclass(frozen=True)
class Answer:
    """A response to a problem."""

    tokens: list[int]
    text: str
    whole: bool
    """Whether it is the solution, character by character."""
    digit: bool
    passcode: bool
    evictions: int


def load_models(adapters: Path) -> dict[str, Any]:
    """The untrained model and both adapters, by name; raises ValueError where an adapter is missing."""
    for name in ADAPTERS:
        if not (adapters / name / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"there is no adapter in {adapters / name}: train both by make demo, then --adapters runs/demo"
            )

    def base() -> Any:
        return load_weights(str(MODEL_PATH), "model").eval()

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 reads the old name
        adapted = {name: PeftModel.from_pretrained(base(), str(adapters / name)).eval() for name in ADAPTERS}
    return {"base": base(), **adapted}


def answers(model: Any, config: EvictionConfig, posed: Sequence[KeyedSum], tokenizer: Any) -> list[Answer]:
    """Greedy responses by the slot engine, all problems at once."""
    prompts = encode(tokenizer, [problem.prompt for problem in posed])
    requests = [Request(tuple(prompt), LONGEST, (place, 0)) for place, prompt in enumerate(prompts)]
    ends = end_tokens(tokenizer, model.generation_config)
    completions = generate(model, config, requests, slots=len(requests), end_tokens=ends)
    graded = []
    for problem, completion in zip(posed, completions, strict=True):
        text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
        digit, passcode = grade(text, problem.answer, problem.passcode)
        graded.append(Answer(completion.tokens, text, text == problem.response, digit, passcode, completion.evictions))
    return graded


def percent(outcomes: Sequence[bool]) -> str:
    """A share and Wilson's 95% interval of it."""
    interval = stats.binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return f"{mean(outcomes):.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def results_table(cells: dict[tuple[str, int | None], list[Answer]]) -> Table:
    """A row for each model and cache."""
    count = len(next(iter(cells.values())))
    made = Table(
        "model", "cache", "whole response right [95%]", "final digit right [95%]", "passcode right", "evictions",
        title=f"{count} test problems, vase_attnv, window {WINDOW}",
    )  # fmt: skip
    for (model, budget), graded in cells.items():
        made.add_row(
            model, "full" if budget is None else f"budget {budget}",
            *(percent([getattr(answer, name) for answer in graded]) for name in ("whole", "digit")),
            f"{mean(answer.passcode for answer in graded):.0%}", f"{mean(answer.evictions for answer in graded):.1f}",
        )  # fmt: skip
    return made


def marked(answer: str, solution: str) -> Text:
    """An answer, red from where it leaves the solution."""
    same = next((place for place, (a, b) in enumerate(zip(answer, solution, strict=False)) if a != b), None)
    same = min(len(answer), len(solution)) if same is None else same
    verdict = "right" if answer == solution else f"wrong from character {same + 1} of {len(solution)}"
    return Text(answer[:same], "green") + Text(answer[same:], "bold red") + Text(f"   {verdict}", "dim")


def events_table(survived: Survival) -> Table:
    """What each event left of the prompt: mean over layers and KV heads, and the least of them."""
    made = Table("event", "after token", "entries held", "share of the prompt held", "in the head that holds least")
    for event in survived.events:
        prompt = survived.held(event.position + 1)[:, :, : survived.prompt].float().mean(-1)
        made.add_row(
            str(event.index + 1), str(event.position + 1), f"{event.live} -> {survived.config.budget}",
            f"{prompt.mean():.0%}", f"{prompt.min():.0%}",
        )  # fmt: skip
    return made


def show(
    place: int, problem: KeyedSum, models: dict[str, Any], given: dict[str, Answer], config: EvictionConfig,
    tokenizer: Any, console: Console,
) -> None:  # fmt: skip
    """One problem: its solution, what each model answered with the evicting cache, and what was evicted when."""
    console.print(f"\nproblem {place + 1}: {problem.prompt}", highlight=False, style="bold")
    console.print(Text(f"  {'solution':<14}{problem.response}"), soft_wrap=True)
    for name, answer in given.items():
        console.print(Text(f"  {name:<14}") + marked(answer.text, problem.response), soft_wrap=True)
    (prompt,) = encode(tokenizer, [problem.prompt])
    ids = [*prompt, *given["eviction_lora"].tokens[:-1]]  # the last token is never given to the cache
    console.print(f"  what was evicted while eviction_lora answered (budget {config.budget}):", highlight=False)
    console.print(events_table(survival(models["eviction_lora"], ids, config, len(prompt), (place, 0))))


def telling(cells: dict[tuple[str, int | None], list[Answer]], budget: int, count: int) -> list[int]:
    """The first problems that the untrained model gets wrong under eviction and the trained one right, then others."""
    base, trained = cells["base", budget], cells["eviction_lora", budget]
    order = sorted(range(len(base)), key=lambda place: not (trained[place].whole and not base[place].whole))
    return sorted(order[:count])


def run(arguments: QuickstartArguments, console: Console) -> dict[tuple[str, int | None], list[Answer]]:
    """Answer, show, tabulate; returns the answers by (model, budget), None being the full cache.

    Raises:
        ValueError: settings that do not hold, or adapters that are not there.
    """
    if arguments.problems < 1 or arguments.shown < 0:
        raise ValueError("--problems must be at least 1 and --shown at least 0")
    if not arguments.budgets:
        raise ValueError("--budgets: give at least one")
    configs: dict[int | None, EvictionConfig] = {None: EvictionConfig(policy="full")}
    for budget in arguments.budgets:
        configs[budget] = EvictionConfig(policy="vase_attnv", budget=budget, window=WINDOW, seed=arguments.seed)
    began = monotonic()
    models = load_models(arguments.adapters)
    choose_threads(models["base"])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    posed = list(problems("test", 0, arguments.problems))
    console.print(
        "A prompt states keyed digits and a passcode; the response adds the digits in the order of their keys, looking "
        "each up in the prompt, and closes with total@passcode. What the cache has evicted cannot be looked up.",
        soft_wrap=True,
    )
    cells = {}
    for name, model in models.items():
        for budget, config in configs.items():
            console.print(f"{name}, {'full cache' if budget is None else f'budget {budget}'} ...", style="dim")
            cells[name, budget] = answers(model, config, posed, tokenizer)
    smallest = min(arguments.budgets)
    for place in telling(cells, smallest, arguments.shown):
        given = {name: cells[name, smallest][place] for name in models}
        show(place, posed[place], models, given, configs[smallest], tokenizer, console)
    console.print()
    console.print(results_table(cells))
    console.print(
        "The final digit alone is right one time in ten by chance, the whole response is not. dense_lora is the "
        "control: the same data and steps without eviction.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print(
        f"{monotonic() - began:.0f} s, {torch.get_num_threads()} thread(s)\n\n{NEXT}",
        highlight=False,
        end="",
        soft_wrap=True,
    )
    return cells


def main(rest: Sequence[str]) -> None:
    """The command line of `vkvtrain quickstart`."""
    console = Console()
    arguments = tyro.cli(QuickstartArguments, args=rest, prog="vkvtrain quickstart")
    run(arguments, console if console.is_terminal else Console(width=120))
