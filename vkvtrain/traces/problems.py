"""Problems to solve, and what judges an answer: generated tasks, reasoning-gym's, problems with known answers.

A judge sees the final answer only, the part of a response after its thoughts. Knows nothing of models.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

from vkvtrain import ledger
from vkvtrain.config import nearest
from vkvtrain.evaluation.answers import last_boxed
from vkvtrain.evaluation.thinking import final_answer
from vkvtrain.tiny import task
from vkvtrain.training.data.rows import Record
from vkvtrain.training.data.sources import KEYED_SUM, is_generated, read_records
from vkvtrain.training.settings import DataSettings

GYM = "reasoning_gym:"
"""Prefix of a source that reasoning-gym generates."""
QUESTIONS = ("problem", "question", "prompt")
"""Columns that may hold a problem."""
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_GSM8K = re.compile(r".*####\s*(.+?)\s*$", re.DOTALL)


@dataclass(frozen=True)
class JudgedProblem:
    """A problem and its judge."""

    number: int
    """In its source, from 0: names the randomness of its attempts."""
    where: str
    """Source and row, for an error."""
    text: str
    answer: str
    is_conversation: bool
    """Whether the problem is a user's message, or text that the model continues."""
    accepts: Callable[[str, str], bool]
    """Whether a response, thoughts included, is right; given the prompt as the model saw it, and the response."""


def problems(
    source: str, rows: int | None, seed: int, config: str | None, split: str, think_end: str | None = None
) -> tuple[str, Iterator[JudgedProblem]]:
    """(verifier, problems) of a source.

    Args:
        source: `tiny:keyed_sum`, `ledger:<dial>`, `reasoning_gym:<task>`, or a file or data set with problems and
            `answer`.
        rows: how many; all of a file by default.
        seed: of what reasoning-gym generates.
        config, split: of a data set on the Hub.
        think_end: what ends the model's thoughts; default `</think>`.

    Raises:
        ValueError: a source that cannot be had, or a row without problem, or without an answer that can be graded.
    """
    if is_generated(source):
        if rows is None:
            raise ValueError(f"--rows is required for {source}: say how many problems to generate")
        if source == KEYED_SUM:
            return KEYED_SUM, (_keyed_sum(i, one) for i, one in enumerate(task.problems("train", 0, rows)))
        dial = ledger.Dial.parse(source)
        return "ledger", (_ledger(source, i, one) for i, one in enumerate(ledger.problems("train", rows, dial)))
    if source.startswith(GYM):
        return GYM.rstrip(":"), _gym(source.removeprefix(GYM), rows, seed, think_end)
    if find_spec("math_verify") is None:
        raise ValueError("answers are verified by math-verify: pip install 'vkvtrain[eval]'")
    settings = DataSettings(source=source, config=config, split=split, held_out=0)
    records = read_records(settings)[0]
    return "math_verify", (_math(record, think_end) for record in islice(records, rows))


def _keyed_sum(number: int, one: task.KeyedSum) -> JudgedProblem:
    def accepts(prompt: str, response: str) -> bool:
        return all(task.grade(response, one.answer, one.passcode))

    return JudgedProblem(
        number, f"tiny:keyed_sum, problem {number}", one.prompt, f"{one.answer}@{one.passcode}", False, accepts
    )


def _ledger(source: str, number: int, one: ledger.Problem) -> JudgedProblem:
    def accepts(prompt: str, response: str) -> bool:
        return ledger.grade(one.prompt, response, one.response).trace

    return JudgedProblem(number, f"{source}, problem {number}", one.prompt, one.answer, False, accepts)


def _gym(name: str, rows: int | None, seed: int, think_end: str | None) -> Iterator[JudgedProblem]:
    if find_spec("reasoning_gym") is None:
        raise ValueError(f"{GYM} sources need reasoning-gym: pip install 'vkvtrain[gym]'")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"--source: reasoning-gym has no task {name!r}{nearest(name, sorted(DATASETS))}")
    if rows is None:
        raise ValueError(f"--rows is required for {GYM}{name}: say how many problems to generate")
    tasks: Any = reasoning_gym.create_dataset(name, seed=seed, size=rows)

    def one(number: int) -> JudgedProblem:
        entry, where = tasks[number], f"{GYM}{name}, problem {number}"
        if entry["answer"] is not None and tasks.score_answer(answer=str(entry["answer"]), entry=entry) != 1.0:
            raise ValueError(
                f"{where}: the answer {entry['answer']!r} is not accepted by the scorer of the task itself"
            )

        def accepts(prompt: str, response: str) -> bool:
            said = final_answer(response, prompt, think_end)
            boxed = last_boxed(said)
            return tasks.score_answer(answer=said.strip() if boxed is None else boxed, entry=entry) == 1.0

        return JudgedProblem(number, where, entry["question"], str(entry["answer"]), True, accepts)

    return (one(number) for number in range(rows))


def _math(record: Record, think_end: str | None) -> JudgedProblem:
    column = next((name for name in QUESTIONS if isinstance(record.values.get(name), str)), None)
    if column is None:
        raise ValueError(f"{record.where} has no problem: name its text {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}")
    answer = record.values.get("answer")
    if answer is None or answer == "":
        raise ValueError(f"{record.where} has no 'answer', so a response cannot be verified: add one")
    from vkvtrain.evaluation.grading import expression_gold  # needs math-verify

    marked = _GSM8K.fullmatch(str(answer))
    try:
        gold = expression_gold(marked[1] if marked else answer)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None

    def accepts(prompt: str, response: str) -> bool:
        return same_answer(final_answer(response, prompt, think_end), gold)

    return JudgedProblem(record.number, record.where, record.values[column], gold, True, accepts)


def same_answer(answer: str, gold: str) -> bool:
    """Whether the last box of a final answer equals `gold` as mathematics, as evaluation grades it."""
    from vkvtrain.evaluation.grading import same_expression  # needs math-verify

    return same_expression(last_boxed(answer), gold)
