"""`vkvtrain data generate`: its settings, its checks and its report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from vkvtrain import ends
from vkvtrain.adapters import check_fits, read_adapter
from vkvtrain.chat_templates import check_arguments
from vkvtrain.clock import day_of, fix_day
from vkvtrain.generation import Sampling
from vkvtrain.loading import load_tokenizer, load_weights, read_config
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.traces.making import Tally, make, write
from vkvtrain.traces.problems import BOXED, JudgedProblem, problems


@dataclass
class TraceArguments:
    """Let a model solve problems with the full cache, and keep what a verifier accepts as training traces (JSONL).

    A row holds `prompt` and `completion`, ready for a recipe (`data.source`, with `data.response: written`), and
    where it is from. Interrupt it and run it again: finished attempts are in the journal beside the output.

    Sources: `tiny:keyed_sum`; `ledger:people=4,events=6`, of which the whole trace must be right;
    `reasoning_gym:<task>`, judged by the task's own scorer; or a JSONL or Parquet file, or a data set on the Hub, with
    `problem` (or `question`) and `answer`, judged by math-verify.
    """

    model: str
    """Directory or Hub name of the model; `tiny` is the embedded one."""
    source: str
    """Where problems come from."""
    output: Path
    """JSONL file to write."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    peft: str | None = None
    """Directory or Hub name of an adapter."""
    config: str | None = None
    """Configuration of a data set on the Hub."""
    split: str = "train"
    """Split of a data set on the Hub."""
    rows: int | None = None
    """Problems, the first ones; all of a file by default."""
    attempts: int = 4
    """Most attempts at a problem."""
    keep: int = 1
    """Accepted traces of a problem; it is not attempted again when it has as many."""
    max_new_tokens: int = 16384
    """Longest response; one that is cut off is rejected."""
    instruction: str = BOXED
    """Said after the problem in the user's message."""
    system: str = ""
    """System prompt; none by default."""
    template_kwargs: str = "{}"
    """Arguments of the chat template as JSON, for example '{"enable_thinking": true}'."""
    date: str | None = None
    """The day that the chat template takes for today, if it writes one: `2026-11-24`."""
    think_end: str | None = None
    """What ends the model's thoughts, if not `</think>`, `[/THINK]` or gpt-oss' `<|channel|>final<|message|>`."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.95
    """Nucleus."""
    top_k: int = 0
    """Likeliest tokens; 0 is all."""
    seed: int = 0
    """Seed of sampling, and of problems that reasoning-gym generates."""
    slots: int = 16
    """Sequences that are decoded at once."""
    shard: str = "0/1"
    """`i/n`: every n-th problem from the i-th on, for n machines; together they give what one would."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights."""


def main(rest: Sequence[str]) -> None:
    """The command line of `vkvtrain data generate`."""
    run(tyro.cli(TraceArguments, args=rest, prog="vkvtrain data generate"))


def run(arguments: TraceArguments) -> Tally:
    """Generate, judge and write.

    Raises:
        ValueError: one sentence that names the setting and the fix, before a model is loaded where that is possible.
    """
    kwargs = checked(arguments)
    day = day_of(arguments.date, "--date")
    journal = writable_journal(arguments.output)
    sampling = Sampling(
        temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k, seed=arguments.seed
    )
    index, count = shard(arguments.shard)
    verifier, found = problems(
        arguments.source, arguments.rows, arguments.seed, arguments.config, arguments.split, arguments.think_end
    )
    todo = [problem for problem in found if problem.number % count == index]
    if not todo:
        raise ValueError(f"--shard {arguments.shard} of {arguments.source} holds no problem: use fewer shards")
    name = str(MODEL_PATH) if arguments.model == "tiny" else arguments.model
    tokenizer = load_tokenizer(name, "--model", arguments.revision)
    config = read_config(name, "--model", arguments.revision)
    if arguments.peft is not None:
        check_fits(read_adapter(arguments.peft, "--peft"), config, "--peft")
    fix_day(tokenizer, day, journal.with_name(journal.name + ".date"), "--date")
    prompts = {one.number: messages(one, arguments) for one in todo}
    ids = {number: encode(prompt, tokenizer, kwargs) for number, prompt in prompts.items()}
    check_lengths(todo, ids, arguments, config)
    accepted, tally = make(
        load_model(arguments, name), tokenizer, todo, ids, sampling, arguments.attempts, arguments.keep,
        arguments.max_new_tokens, arguments.slots, journal,
    )  # fmt: skip
    if not accepted:
        raise ValueError(
            f"none of {tally.attempts} attempts was accepted ({tally.cut_off} were cut off): nothing is written; raise "
            "--max-new-tokens or --attempts, or choose easier problems"
        )
    shared = {
        "model": arguments.model, "revision": arguments.revision, "peft": arguments.peft, "source": arguments.source,
        "sampling": asdict(sampling), "template_kwargs": kwargs, "verifier": verifier,
    }  # fmt: skip
    rows = (
        {
            "prompt": prompts[one.number], "completion": trace.text, "answer": one.answer,
            "provenance": {
                **shared, "problem": one.number, "attempt": trace.attempt, "tokens": trace.tokens, "accepted": True
            },
        }
        for one in todo
        for trace in accepted.get(one.number, ())
    )  # fmt: skip
    write(arguments.output, rows)
    report(arguments, tally, len(accepted), Console())
    return tally


def checked(arguments: TraceArguments) -> dict[str, Any]:
    """The template's arguments; raises ValueError for settings that do not hold."""
    for name in ("rows", "attempts", "keep", "max_new_tokens", "slots"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {given}")
    if not -(2**63) <= arguments.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, got {arguments.seed}")
    if arguments.keep > arguments.attempts:
        raise ValueError(f"--keep ({arguments.keep}) is more than --attempts ({arguments.attempts}): lower it")
    if arguments.temperature == 0 and arguments.attempts > 1:
        raise ValueError("--temperature 0 gives the same response at every attempt: set --attempts 1, or sample")
    try:
        kwargs = json.loads(arguments.template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--template-kwargs {arguments.template_kwargs!r} is not JSON: {error}") from None
    if not isinstance(kwargs, dict):
        raise ValueError(f"--template-kwargs must be a JSON object, got {arguments.template_kwargs!r}")
    return kwargs


def shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`."""
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise ValueError(f"--shard must be i/n with i from 0 to n - 1, got {text!r}")
    return int(index), int(count)


def messages(problem: JudgedProblem, arguments: TraceArguments) -> str | list[dict[str, str]]:
    """The prompt as it is written to the output: text, or messages for the chat template."""
    if not problem.is_conversation:
        return problem.text
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    asked = "\n\n".join(part for part in (problem.text, arguments.instruction) if part)
    return [*system, {"role": "user", "content": asked}]


def encode(prompt: str | list[dict[str, str]], tokenizer: Any, kwargs: dict[str, Any]) -> list[int]:
    """Tokens of a prompt, as a recipe's rows have them."""
    if isinstance(prompt, str):
        return ends.encode(tokenizer, [prompt])[0]
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template to ask problems with: use a chat model")
    check_arguments(tokenizer, kwargs, "--template-kwargs")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]


def check_lengths(
    todo: Sequence[JudgedProblem], ids: Mapping[int, Sequence[int]], arguments: TraceArguments, config: Any
) -> None:
    """Refuse a problem that leaves the model no position for a response; reads the model's configuration alone."""
    longest = config.get_text_config(decoder=True).max_position_embeddings
    for one in todo:
        if len(ids[one.number]) >= longest:
            raise ValueError(
                f"{one.where}: the prompt has {len(ids[one.number]):,} tokens, and --model {arguments.model} has "
                f"{longest:,} positions for prompt and response: take the problem out of --source"
            )


def writable_journal(output: Path) -> Path:
    """The journal beside an output; refuses an output or a journal that could not be written in the end."""
    if output.is_dir():
        raise ValueError(f"--output {output} is a directory: name a file")
    journal = output.with_name(output.name + ".journal")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
        if journal.exists():
            with journal.open("ab"):
                pass
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written ({error.filename}: {error.strerror}): name another file"
        ) from None
    return journal


def load_model(arguments: TraceArguments, name: str) -> Any:
    """The model, with its adapter if there is one, on a GPU if there is one."""
    model = load_weights(name, "--model", revision=arguments.revision, dtype=arguments.dtype)
    if arguments.peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.peft)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def report(arguments: TraceArguments, tally: Tally, solved: int, console: Console) -> None:
    """Print what was accepted, and how to train on it."""
    table = Table("", "count", "share", title=f"{arguments.model} on {arguments.source}")
    table.add_row("problems", str(tally.problems), "")
    table.add_row("  with an accepted trace", str(solved), f"{solved / tally.problems:.1%}")
    table.add_row("attempts", str(tally.attempts), "")
    table.add_row("  accepted", str(tally.accepted), f"{tally.accepted / tally.attempts:.1%}")
    table.add_row("  cut off", str(tally.cut_off), f"{tally.cut_off / tally.attempts:.1%}")
    console.print(table)
    console.print(f"accepted responses have {mean(tally.tokens):,.0f} tokens on average, {max(tally.tokens):,} at most")
    if tally.retokenised:
        console.print(
            f"{tally.retokenised} of them tokenise differently from what was generated: those are trained on a text "
            "that the model wrote in other tokens"
        )
    console.print(
        f"written: {arguments.output}; in a recipe:\ndata:\n  source: {arguments.output}\n  response: written"
    )
    if arguments.template_kwargs != "{}":
        console.print(f"  template_kwargs: {arguments.template_kwargs}", markup=False)
