"""The ledger task: balances that change hands, in words that a pretrained language model reads as it reads any text.

A prompt states who has how much, then events, then whose balance is asked for; the response restates event after event
with what it does to two balances, and closes with the answer::

    prompt     Tom has 51, Ann has 27, Kim has 33. Kim gives 2 to Ann. Ann gives 4 to Tom. How much has Kim?
    response   Kim 33-2=31, Ann 27+2=29.
               Ann 29-4=25, Tom 51+4=55.
               Answer: 31

A line needs the next event, which is in the prompt, and the last balances of two accounts, which may be anywhere in the
response: how many lines back is the balance's *age*, and the curve of right lines over age shows what a cache forgets.
Names and digits are single tokens of most tokenizers. Knows nothing of models or eviction.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from vkvtrain.config import nearest
from vkvtrain.tiny.task import SPLITS, Split, split_of

NAMES = ("Tom", "Max", "Ann", "Bob", "Dan", "Kim", "Sam", "Ben", "Lee")
LOW, HIGH, MOST = 10, 99, 9
"""Balances are from `LOW` to `HIGH`, always two digits; an event moves 1 to `MOST`."""
SOURCE = "ledger:"
"""Prefix of the data source: `ledger:people=4,events=6`."""

_LINE = re.compile(r"([A-Z][a-z]+) (\d+)-(\d)=(\d+), ([A-Z][a-z]+) (\d+)\+\d=(\d+)\.")
_BALANCE = re.compile(r"([A-Z][a-z]+) has (\d+)")
_ANSWER = re.compile(r"Answer: (\d+)")


@dataclass(frozen=True)
class Dial:
    """How hard a problem is.

    Raises:
        ValueError: one sentence that names the setting and the fix.
    """

    people: int = 4
    """Accounts, 2 to 9."""
    events: int = 6
    """Transfers, which are the lines of the response; at least 1."""
    age: int | None = None
    """How many lines before the answer the balance that is asked for was last stated, 1 to `events`; any by default.
    With two people every line states both balances, so that it is 1."""
    seed: int = 0
    """The data seed."""

    def __post_init__(self) -> None:
        if not 2 <= self.people <= len(NAMES):
            raise ValueError(f"ledger: people must be from 2 to {len(NAMES)}, got {self.people}")
        if self.events < 1:
            raise ValueError(f"ledger: events must be at least 1, got {self.events}")
        oldest = self.events if self.people > 2 else 1
        if self.age is not None and not 1 <= self.age <= oldest:
            raise ValueError(
                f"ledger: age must be from 1 to {oldest} with {self.people} people and {self.events} events, "
                f"got {self.age}"
            )

    @classmethod
    def parse(cls, source: str) -> Self:
        """The dial of a data source, `ledger:people=4,events=6,age=3,seed=0`; what is left out has its default.

        Raises:
            ValueError: an unknown setting, or one that is no whole number.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for part in filter(None, source.removeprefix(SOURCE).split(",")):
            name, _, value = part.partition("=")
            if name not in known:
                raise ValueError(f"{source}: a ledger has no {name!r}{nearest(name, known)}")
            if name in values:
                raise ValueError(f"{source}: {name} is there twice")
            if not re.fullmatch(r"-?[0-9]+", value):
                raise ValueError(f"{source}: {name} must be a whole number, as in {name}=4")
            values[name] = int(value)
        return cls(**values)


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` and `response` as text, and the answer."""

    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Line:
    """What is graded of a line of a response.

    Attributes:
        age: lines between this one and the older of the two balances that it needs; 1 is the line before. A balance
            that only the prompt states is as old as the line's number.
        right: the line is the one of the true trace.
        follows: it restates the next event of the prompt, and both balances follow from the last ones that the
            response itself had stated. An early mistake makes all later lines of these accounts wrong; what follows
            is judged line by line.
    """

    age: int
    right: bool
    follows: bool


@dataclass(frozen=True)
class Grade:
    """What is graded of a response.

    Attributes:
        answer: the closing answer is right.
        trace: the whole response is the true one, character by character.
        lines: one for each event, in order; a line that is missing is neither right nor does it follow.
        age: lines between the answer and the balance that it needs.
    """

    answer: bool
    trace: bool
    lines: tuple[Line, ...]
    age: int


@dataclass(frozen=True)
class Need:
    """A balance that a line needs, by characters of prompt and response as one text.

    Attributes:
        stated: where it was stated last, [start, end).
        at: where the line writes it.
        age: lines between the two; a balance of the prompt is as old as the line's number.
    """

    stated: tuple[int, int]
    at: int
    age: int


def problem(split: Split, index: int, dial: Dial) -> Problem:
    """Problem `index` of a split: the same for the same arguments, on every machine.

    A prompt's split is a function of its text (`vkvtrain.tiny.task.split_of`), so splits are disjoint whatever the
    seeds and the dial.

    Args:
        split: `train`, `validation` or `test`.
        index: which problem, from 0.
        dial: how hard, and the data seed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"ledger/{split}/{dial.seed}/{index}/{dial.people}/{dial.events}/{dial.age}")
    while True:
        made = _draw(rng, dial)
        if made is not None and split_of(made.prompt) == split:
            return made


def problems(split: Split, count: int, dial: Dial) -> Iterator[Problem]:
    """The first `count` problems of a split."""
    return (problem(split, index, dial) for index in range(count))


def _draw(rng: random.Random, dial: Dial) -> Problem | None:
    """A problem of any split; None where a balance would have left its bounds."""
    people = rng.sample(NAMES, dial.people)
    balance = {name: rng.randint(LOW, HIGH) for name in people}
    stated = ", ".join(f"{name} has {amount}" for name, amount in balance.items())
    asked = rng.choice(people)
    told, lines, last = [], [], {}
    for number in range(dial.events):
        left = dial.events - number  # the age of what this line states, seen from the answer
        giver, receiver = rng.sample(_who(people, asked, left, dial), 2)
        if dial.age == left and asked not in (giver, receiver):
            giver, receiver = (asked, receiver) if rng.random() < 0.5 else (giver, asked)
        amount = rng.randint(1, MOST)
        told.append(f"{giver} gives {amount} to {receiver}.")
        lines.append(_line(giver, amount, receiver, balance))
        balance[giver] -= amount
        balance[receiver] += amount
        if balance[giver] < LOW or balance[receiver] > HIGH:
            return None
        last[giver] = last[receiver] = number
    if dial.age is None:
        asked = rng.choice(sorted(last))
    answer = str(balance[asked])
    prompt = f"{stated}. {' '.join(told)} How much has {asked}?\n"
    return Problem(prompt, "\n".join([*lines, f"Answer: {answer}"]), answer)


def _who(people: Sequence[str], asked: str, left: int, dial: Dial) -> Sequence[str]:
    """Who may take part in the event that is `left` lines before the answer."""
    if dial.age is None or left >= dial.age:
        return people
    return [name for name in people if name != asked] if dial.people > 2 else people


def grade(prompt: str, response: str, truth: str) -> Grade:
    """The grade of a generated response.

    Args:
        prompt: the problem's prompt.
        response: what was generated; what comes after the answer's line counts for `trace` alone.
        truth: the problem's own response.
    """
    *true_lines, true_answer = truth.split("\n")
    written = response.split("\n")
    stated = {name: int(amount) for name, amount in _BALANCE.findall(prompt)}
    last = dict.fromkeys(stated, 0)
    lines = []
    for number, true_line in enumerate(true_lines, start=1):
        giver, amount, receiver = _event(true_line)
        line = written[number - 1] if number <= len(written) else ""
        age = number - min(last[giver], last[receiver])
        lines.append(Line(age, line == true_line, line == _line(giver, amount, receiver, stated)))
        last[giver] = last[receiver] = number
        stated |= _balances(line)
    asked = re.search(r"How much has ([A-Z][a-z]+)\?", prompt)
    assert asked is not None
    said = [match for line in written if (match := _ANSWER.fullmatch(line.strip()))]
    answer = bool(said) and said[0][0] == true_answer
    return Grade(answer, response.strip() == truth, tuple(lines), len(true_lines) + 1 - last[asked[1]])


def needs(problem: Problem) -> list[Need]:
    """The balances that the lines of a problem's own response need, two a line, in order."""
    stated = {match[1]: (0, match.span(2)) for match in _BALANCE.finditer(problem.prompt)}
    found = []
    for number, match in enumerate(_LINE.finditer(problem.prompt + problem.response), start=1):
        for name, before, after in ((match[1], 2, 4), (match[5], 6, 7)):
            line, where = stated[name]
            found.append(Need(where, match.start(before), number - line))
            stated[name] = number, match.span(after)
    return found


def _line(giver: str, amount: int, receiver: str, balance: Mapping[str, int]) -> str:
    """The line of an event, given the balances before it."""
    before, there = balance[giver], balance[receiver]
    return f"{giver} {before}-{amount}={before - amount}, {receiver} {there}+{amount}={there + amount}."


def _event(line: str) -> tuple[str, int, str]:
    """(giver, amount, receiver) of a true line."""
    match = _LINE.fullmatch(line)
    assert match is not None
    return match[1], int(match[3]), match[5]


def _balances(line: str) -> dict[str, int]:
    """The balances that a line leaves, as it says; none if it is no line."""
    match = _LINE.fullmatch(line)
    return {} if match is None else {match[1]: int(match[4]), match[5]: int(match[7])}
