"""Attempts at problems with the full cache, judged one by one: a problem is attempted until it has enough traces."""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vkvtrain.config import EvictionConfig
from vkvtrain.ends import end_tokens
from vkvtrain.generation import Completion, Request, Sampling, generate
from vkvtrain.traces.problems import JudgedProblem


@dataclass(frozen=True)
class KeptTrace:
    """An accepted response."""

    text: str
    """Without its end token."""
    attempt: int
    """From 0."""
    tokens: int
    """With its end token."""


@dataclass
class Tally:
    """What became of the attempts."""

    problems: int = 0
    attempts: int = 0
    accepted: int = 0
    cut_off: int = 0
    tokens: list[int] = field(default_factory=list)
    """Lengths of the accepted responses."""
    retokenised: int = 0
    """Accepted responses whose text the tokenizer cuts into other tokens than the model did."""


def make(
    model: Any,
    tokenizer: Any,
    problems: Sequence[JudgedProblem],
    prompts: Mapping[int, Sequence[int]],
    sampling: Sampling,
    attempts: int,
    keep: int,
    max_new_tokens: int,
    slots: int,
    journal: Path,
) -> tuple[dict[int, list[KeptTrace]], Tally]:
    """The accepted traces of each problem that has some, by its number.

    Args:
        model: with `attn_implementation="vkvtrain"`, in evaluation mode.
        tokenizer: the model's.
        problems: what to solve.
        prompts: tokens of each problem's prompt, by its number.
        sampling: of every attempt; attempts differ by their stream, (problem, attempt).
        attempts: most attempts at a problem.
        keep: traces after which a problem is not attempted again.
        max_new_tokens: longest response.
        slots: sequences that are decoded at once.
        journal: file of finished attempts; a rerun goes on from it.
    """
    ends = end_tokens(tokenizer, model.generation_config)
    if not ends:
        raise ValueError("neither tokenizer, generation configuration nor template names an end token: set eos_token")
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    accepted: dict[int, list[KeptTrace]] = {}
    tally = Tally(problems=len(problems))
    for attempt in range(attempts):
        pending = [one for one in problems if len(accepted.get(one.number, ())) < keep]
        if not pending:
            break
        requests = []
        for one in pending:
            prompt = tuple(prompts[one.number])
            room = min(max_new_tokens, limit - len(prompt))
            requests.append(Request(prompt, room, (one.number, attempt), sampling))
        done = generate(
            model, EvictionConfig(policy="full"), requests, slots=slots, end_tokens=ends,
            progress=f"attempt {attempt + 1} of {attempts}", journal=journal,
        )  # fmt: skip
        for one, request, completion in zip(pending, requests, done, strict=True):
            text = tokenizer.decode(response_of(completion, ends))
            tally.attempts += 1
            tally.cut_off += not completion.finished
            if completion.finished and one.accepts(tokenizer.decode(list(request.prompt)), text):
                tally.accepted += 1
                tally.tokens.append(len(completion.tokens))
                tally.retokenised += is_retokenised(text, completion, tokenizer, ends)
                accepted.setdefault(one.number, []).append(KeptTrace(text, attempt, len(completion.tokens)))
    return accepted, tally


def response_of(completion: Completion, ends: Collection[int]) -> list[int]:
    """The response's tokens without its end token."""
    return completion.tokens[:-1] if completion.tokens[-1] in ends else completion.tokens


def is_retokenised(text: str, completion: Completion, tokenizer: Any, ends: Collection[int]) -> bool:
    """Whether training on the text will see other tokens than were generated."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != response_of(completion, ends)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
