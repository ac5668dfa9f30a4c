"""The ledger task: generator, dial, splits, grades, and the places where it is offered."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from vkvtrain import ledger
from vkvtrain.ledger import Dial
from vkvtrain.tiny.task import SPLITS, split_of
from vkvtrain.traces.problems import problems as problems_to_solve
from vkvtrain.training.data.sources import read_records
from vkvtrain.training.settings import DataSettings

TASKS = Path(__file__).parents[1] / "eval/tasks"
PROMPT = (
    "Tom has 51, Ann has 27, Kim has 33. Kim gives 2 to Ann. Ann gives 4 to Tom. Kim gives 1 to Tom. "
    "How much has Ann?\n"
)
TRUTH = """\
Kim 33-2=31, Ann 27+2=29.
Ann 29-4=25, Tom 51+4=55.
Kim 31-1=30, Tom 55+1=56.
Answer: 25"""


@st.composite
def dials(draw):
    people, events = draw(st.integers(2, len(ledger.NAMES))), draw(st.integers(1, 20))
    age = draw(st.none() | st.integers(1, events if people > 2 else 1))
    return Dial(people, events, age, draw(st.integers(0, 50)))


@given(st.sampled_from(SPLITS), st.integers(0, 10**6), dials())
def test_a_problem_is_solved_by_its_own_response(split, index, dial):
    problem = ledger.problem(split, index, dial)
    assert ledger.problem(split, index, dial) == problem
    assert split_of(problem.prompt) == split
    stated, told = problem.prompt.split(". ", 1)
    balance = {name: int(amount) for name, amount in re.findall(r"(\w+) has (\d\d)", stated)}
    assert len(balance) == dial.people
    events = re.findall(r"(\w+) gives ([1-9]) to (\w+)\.", told)
    assert len(events) == dial.events
    *lines, answer = problem.response.split("\n")
    touched = {}
    for number, (line, (giver, amount, receiver)) in enumerate(zip(lines, events, strict=True)):
        before = dict(balance)
        balance[giver] -= int(amount)
        balance[receiver] += int(amount)
        given = f"{giver} {before[giver]}-{amount}={balance[giver]}"
        assert line == f"{given}, {receiver} {before[receiver]}+{amount}={balance[receiver]}."
        assert all(10 <= value <= 99 for value in balance.values())
        touched[giver] = touched[receiver] = number
    (asked,) = re.findall(r"How much has (\w+)\?\n$", problem.prompt)
    assert answer == f"Answer: {problem.answer}" == f"Answer: {balance[asked]}"
    grade = ledger.grade(problem.prompt, problem.response, problem.response)
    assert grade.answer
    assert grade.trace
    assert all(line.right and line.follows for line in grade.lines)
    assert grade.age == dial.events - touched[asked]
    assert dial.age in (None, grade.age)


@given(st.integers(0, 10**6), dials())
def test_the_age_of_a_line_is_that_of_the_older_balance_it_needs(index, dial):
    problem = ledger.problem("train", index, dial)
    grade = ledger.grade(problem.prompt, problem.response, problem.response)
    pairs = [re.match(r"(\w+) \d+-\d=\d+, (\w+) ", line).groups() for line in problem.response.split("\n")[:-1]]
    for number, (line, pair) in enumerate(zip(grade.lines, pairs, strict=True)):
        needed = [max((i for i in range(number) if name in pairs[i]), default=-1) for name in pair]
        assert line.age == number - min(needed)


@given(st.integers(0, 10**6), dials())
def test_what_a_line_needs_is_where_it_was_stated(index, dial):
    problem = ledger.problem("train", index, dial)
    text = problem.prompt + problem.response
    found = ledger.needs(problem)
    assert len(found) == 2 * dial.events
    for need in found:
        start, end = need.stated
        assert end <= need.at
        assert text[start:end] == text[need.at : need.at + 2]
        assert text[start - 1] in " ="  # stated by the prompt or by a result, never by what a line had repeated
    ages = [max(pair) for pair in zip([n.age for n in found[::2]], [n.age for n in found[1::2]], strict=True)]
    assert ages == [line.age for line in ledger.grade(problem.prompt, problem.response, problem.response).lines]


def test_splits_are_disjoint_whatever_the_seed_and_the_dial():
    prompts = {
        split: {
            one.prompt
            for seed in range(20)
            for people in (2, 4)
            for one in ledger.problems(split, 60, Dial(people, 1, seed=seed))
        }
        for split in SPLITS
    }
    assert all(len(of) > 1000 for of in prompts.values())
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_seeds_and_problems_differ():
    dial = Dial()
    assert len({one.prompt for one in ledger.problems("train", 300, dial)}) == 300
    assert next(ledger.problems("train", 1, dial)) != next(ledger.problems("train", 1, Dial(seed=1)))
    assert list(ledger.problems("test", 3, dial)) == [ledger.problem("test", index, dial) for index in range(3)]


def test_every_person_and_every_age_is_asked_for():
    ages, asked = Counter(), Counter()
    for one in ledger.problems("train", 600, Dial(people=4, events=6)):
        ages[ledger.grade(one.prompt, one.response, one.response).age] += 1
        asked[re.findall(r"has (\w+)\?", one.prompt)[0]] += 1
    assert sorted(ages) == [1, 2, 3, 4, 5, 6]
    assert sorted(asked) == sorted(ledger.NAMES)


def test_problems_are_the_same_in_every_process():
    script = (
        "from vkvtrain import ledger; from vkvtrain.tiny.task import SPLITS; "
        "print(*(one for split in SPLITS for one in ledger.problems(split, 5, ledger.Dial())))"
    )
    expected = " ".join(str(one) for split in SPLITS for one in ledger.problems(split, 5, Dial()))
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ledger:people=1", "people must be from 2 to 9, got 1"),
        ("ledger:people=10", "people must be from 2 to 9, got 10"),
        ("ledger:events=0", "events must be at least 1, got 0"),
        ("ledger:events=3,age=4", "age must be from 1 to 3 with 4 people and 3 events, got 4"),
        ("ledger:people=2,age=2", "age must be from 1 to 1 with 2 people"),
        ("ledger:age=0", "age must be from 1 to 6"),
        ("ledger:event=3", r"a ledger has no 'event' \(did you mean 'events'\?\)"),
        ("ledger:events=3,events=4", "events is there twice"),
        ("ledger:events", "events must be a whole number, as in events=4"),
        ("ledger:events=2.5", "events must be a whole number"),
        ("ledger:events=", "events must be a whole number"),
        ("ledger:seed=x", "seed must be a whole number"),
    ],
)
def test_a_dial_that_does_not_hold_is_one_sentence(source, message):
    with pytest.raises(ValueError, match=message):
        read_records(DataSettings(source=source, rows=1))


def test_a_dial_is_written_as_it_is_read():
    assert Dial.parse("ledger:") == Dial()
    assert Dial.parse("ledger:people=5,events=7,age=3,seed=2") == Dial(5, 7, 3, 2)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'tset'"):
        ledger.problem("tset", 0, Dial())


def lines(response):
    return [(line.right, line.follows) for line in ledger.grade(PROMPT, response, TRUTH).lines]


def test_grades_of_lines():
    right, wrong, own = (True, True), (False, False), (False, True)
    first, second, third, answer = TRUTH.split("\n")
    assert lines(TRUTH) == [right, right, right]
    assert [line.age for line in ledger.grade(PROMPT, TRUTH, TRUTH).lines] == [1, 2, 2]
    assert lines("") == [wrong, wrong, wrong]
    assert lines(first) == [right, wrong, wrong]
    assert lines("\n".join([first, third, second, answer])) == [right, wrong, wrong]  # not the next event
    # Ann is 19 instead of 29: wrong in its own line, and the next one follows from what was stated
    slip = first.replace("=29", "=19")
    assert lines("\n".join([slip, "Ann 19-4=15, Tom 51+4=55.", third, "Answer: 15"])) == [wrong, own, right]
    assert lines("\n".join([slip, second, third, answer])) == [wrong, (True, False), right]
    # a line that is none leaves no balance: the last ones still hold
    assert lines("Kim gives 2 to Ann.\nAnn 27-4=23, Tom 51+4=55.") == [wrong, own, wrong]
    assert lines(f"{first}\nAnn 29-5=24, Tom 51+5=56.") == [right, wrong, wrong]  # another amount
    assert lines(f"{first}\nAnn 28-4=25, Tom 51+4=55.") == [right, wrong, wrong]  # another balance, the right result


@pytest.mark.parametrize(
    ("response", "answer", "trace"),
    [
        (TRUTH, True, True),
        (TRUTH + "\n", True, True),
        (TRUTH + "\nAnswer: 26", True, False),
        ("Answer: 25", True, False),
        ("nonsense\n Answer: 25", True, False),
        (TRUTH.replace("Answer: 25", "Answer: 26"), False, False),
        (TRUTH.replace("Answer: 25", "Answer: 255"), False, False),
        (TRUTH.replace("Answer: 25", "Answer: 25."), False, False),
        (TRUTH.replace("Answer: 25", "Answer: 26\nAnswer: 25"), False, False),
        (TRUTH.replace("=31", "=32"), True, False),
        (TRUTH.replace("\nAnswer: 25", ""), False, False),
        ("25", False, False),
        ("", False, False),
    ],
)
def test_grades_of_responses(response, answer, trace):
    grade = ledger.grade(PROMPT, response, TRUTH)
    assert (grade.answer, grade.trace) == (answer, trace)
    assert grade.age == 2


def test_it_is_a_data_source():
    settings = DataSettings(source="ledger:people=3,events=4,seed=5", rows=6, held_out=2)
    train, held_out = (list(part) for part in read_records(settings))
    dial = Dial(3, 4, seed=5)
    expected = [*ledger.problems("train", 6, dial), *ledger.problems("validation", 2, dial)]
    assert [(one.values["prompt"], one.values["completion"]) for one in (*train, *held_out)] == [
        (one.prompt, one.response) for one in expected
    ]
    assert [one.number for one in train] == list(range(6))
    assert held_out[1].where == "ledger:people=3,events=4,seed=5, validation problem 2"
    with pytest.raises(ValueError, match=r"data\.rows is required for ledger:"):
        read_records(DataSettings(source="ledger:"))


def test_data_generate_verifies_the_whole_trace():
    verifier, found = problems_to_solve("ledger:people=3,events=2", 5, 0, None, "train")
    assert verifier == "ledger"
    problems = list(ledger.problems("train", 5, Dial(3, 2)))
    for number, (one, problem) in enumerate(zip(found, problems, strict=True)):
        assert (one.number, one.text, one.answer, one.is_conversation) == (
            number,
            problem.prompt,
            problem.answer,
            False,
        )
        assert one.where == f"ledger:people=3,events=2, problem {number}"
        assert one.accepts(problem.prompt, problem.response)
        assert not one.accepts(problem.prompt, f"Answer: {problem.answer}")
        assert not one.accepts(problem.prompt, problems[number - 1].response)
    with pytest.raises(ValueError, match="--rows is required for ledger:"):
        problems_to_solve("ledger:", None, 0, None, "train")


def test_it_is_a_task_of_lm_eval():
    metadata = {"problems": 5, "people": 3, "events": 4, "age": 2, "data_seed": 7}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    task = manager.load(["vkv_ledger"])["tasks"]["vkv_ledger"]
    problems = list(ledger.problems("test", 5, Dial(3, 4, 2, 7)))
    docs = list(task.eval_docs)
    assert [(task.doc_to_text(doc), task.doc_to_target(doc)) for doc in docs] == [
        (one.prompt, one.response) for one in problems
    ]
    settings = task.config.generation_kwargs
    assert (settings["do_sample"], settings["until"]) == (False, [])
    half = "\n".join(problems[1].response.split("\n")[:2])
    graded = [
        task.process_results(docs[0], [[problems[0].response]]),
        task.process_results(docs[1], [[half]]),
    ]
    names = ("exact_match", "trace_match", "lines_right", "lines_that_follow")
    assert [[sample[name] for name in names] for sample in graded] == [[1, 1, 1, 1], [0, 0, 0.5, 0.5]]
    assert set(graded[0]) <= set(task.aggregation())
    shares = {
        age: task.aggregation()[f"follow_at_age_{age}"]([sample[f"follow_at_age_{age}"] for sample in graded])
        for age in range(1, 7)
    }
    by_hand = Counter(), Counter()
    for one, response in zip(problems[:2], (problems[0].response, half), strict=True):
        for line in ledger.grade(one.prompt, response, one.response).lines:
            by_hand[0][line.age] += 1
            by_hand[1][line.age] += line.follows
    assert shares == {age: by_hand[1][age] / by_hand[0][age] if by_hand[0][age] else 0.0 for age in range(1, 7)}


def test_the_task_has_room_for_its_response():
    """Digits and names are one token each in SmolLM2's tokenizer: 21 tokens a line, 6 of the answer with its end."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"problems": 1})
    task = manager.load(["vkv_ledger"])["tasks"]["vkv_ledger"]
    lines = task.eval_docs[0]["response"].count("\n")
    assert task.config.generation_kwargs["max_gen_toks"] > 21 * lines + 6
