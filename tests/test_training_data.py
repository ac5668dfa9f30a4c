"""Training rows: reading, tokenising, order, collation; and the embedded task that generates them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vkvtrain import EvictionConfig
from vkvtrain.tiny import MODEL_PATH, task
from vkvtrain.training.data import Example, Record, Row, collate, load_data, sample, step_samples
from vkvtrain.training.data.order import GROUP
from vkvtrain.training.data.sources import read_jsonl, read_records
from vkvtrain.training.data.templates import tokenise as tokenised
from vkvtrain.training.settings import DataSettings


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(MODEL_PATH))


def merging_tokenizer(template=None, **special):
    """BPE over `a` and `b` that merges `ab`; the template puts special tokens around a text."""
    vocabulary = {"<bos>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}
    fast = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        fast.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=fast, **{"eos_token": "<eos>", **special})


def tokenise(examples, tokenizer):
    return list(tokenised(examples, tokenizer, DataSettings(source="x")))


def examples(*pairs):
    return [Example(prompt, completion, f"row {number}") for number, (prompt, completion) in enumerate(pairs, 1)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(tmp_path, count, length=lambda index: 1):
    """A file whose rows tell their number by the prompt: `a0?`, `a1?`, ..."""
    rows = [{"prompt": f"a{index}?", "completion": "1" * length(index)} for index in range(count)]
    return str(write(tmp_path / "rows.jsonl", rows))


def test_rows_are_read_in_order_and_told_by_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "é", "completion": "1", "other": [2]}\n\n  \n{"completion": " ", "prompt": ""}\n', encoding="utf-8"
    )
    assert list(read_jsonl(path)) == [
        Record({"prompt": "é", "completion": "1", "other": [2]}, f"{path}, row 1", 0),
        Record({"completion": " ", "prompt": ""}, f"{path}, row 4", 1),
    ]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"data.source: there is no file .*none.jsonl.*tiny:keyed_sum"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_prompt_and_response_are_tokenised_apart():
    """Generation sees the prompt's tokens and appends; a merge across the border is never what it sees."""
    merging = merging_tokenizer()
    assert merging("ab")["input_ids"] == [4]
    assert tokenise(examples(("a", "b"), ("ab", "ab")), merging) == [Row(0, [2, 3, 1], 1), Row(1, [4, 4, 1], 1)]


def test_special_tokens_open_the_prompt_and_close_the_response():
    opening = merging_tokenizer("<bos> $A")
    assert tokenise(examples(("a", "b")), opening) == [Row(0, [0, 2, 3, 1], 2)]
    closing = merging_tokenizer("<bos> $A <eos>")  # closes every text: the prompt must go on all the same
    assert closing("a")["input_ids"] == [0, 2, 1]
    assert tokenise(examples(("a", "b")), closing) == [Row(0, [0, 2, 3, 1], 2)]
    # what is written out stays, and an end that is written out is not doubled
    assert tokenise(examples(("a<eos>", "b<eos>")), opening) == [Row(0, [0, 2, 1, 3, 1], 3)]


def test_the_end_of_sequence_is_part_of_the_response(tokenizer):
    (row,) = tokenise(examples(("a3b7?", "12")), tokenizer)
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "<bos>a3b7?"
    assert tokenizer.decode(row.input_ids[row.prompt_length :]) == "12<eos>"
    assert (row.length, row.prompt_length, row.response_length) == (9, 6, 3)


def test_what_cannot_be_tokenised_says_so():
    with pytest.raises(ValueError, match="no eos_token"):
        tokenise(examples(("a", "b")), merging_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="row 2: the prompt has no tokens"):
        tokenise(examples(("a", "b"), ("", "b")), merging_tokenizer())
    assert tokenise([], merging_tokenizer()) == []


rows_strategy = st.lists(
    st.tuples(st.lists(st.integers(3, 40), min_size=1, max_size=9), st.lists(st.integers(3, 40), max_size=9)),
    min_size=1, max_size=5,
)  # fmt: skip


@given(rows_strategy, st.data())
def test_collation_against_a_naive_loop(texts, data):
    rows = [Row(7 * index, [*prompt, *response, 2], len(prompt)) for index, (prompt, response) in enumerate(texts)]
    epochs = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    batch = collate(rows, epochs, 0, torch.device("cpu"))
    width = max(len(prompt) + len(response) + 1 for prompt, response in texts)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    expected = []
    for b, (prompt, response) in enumerate(texts):
        tokens = [*prompt, *response, 2]
        for column in range(width):
            real = column < len(tokens)
            assert batch.input_ids[b, column] == (tokens[column] if real else 0)
            assert batch.attention_mask[b, column] == int(real)
            if real and column >= len(prompt):  # predicted by the position before it, the prompt's last for the first
                expected.append((b, column - 1, tokens[column]))
    found = [(at // width, at % width, token) for at, token in zip(batch.predicting, batch.targets, strict=True)]
    assert found == expected
    assert batch.prompt_lengths == [len(prompt) for prompt, _ in texts]
    assert batch.streams == [(7 * index, 0, epoch) for index, epoch in enumerate(epochs)]
    assert {batch.input_ids.dtype, batch.predicting.dtype, batch.targets.dtype} == {torch.int64}


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_a_permutation_of_the_rows(rows, seed, epoch):
    drawn = [sample(position, rows, seed) for position in range(epoch * rows, (epoch + 1) * rows)]
    assert sorted(index for index, _ in drawn) == list(range(rows))
    assert {at for _, at in drawn} == {epoch}


def test_the_order_is_a_function_of_position_and_seed_alone():
    order = [sample(position, 50, 3) for position in range(200)]
    backwards = [sample(position, 50, 3) for position in reversed(range(200))]  # asked for in any order
    assert backwards[::-1] == order
    epochs = [[index for index, _ in order[start : start + 50]] for start in range(0, 200, 50)]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert epochs[0] != list(range(50))
    assert [sample(position, 50, 4) for position in range(200)] != order
    firsts = Counter(sample(0, 10, seed)[0] for seed in range(2000))  # no row is favoured
    assert sorted(firsts) == list(range(10))
    assert max(firsts.values()) - min(firsts.values()) < 120


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_steps_are_slices_of_an_endless_order(rows, global_batch, seed, group):
    """Grouped or not, every `GROUP` steps hold the rows of the endless order, each step as its own function."""
    lengths = [(7 * row) % 13 + 1 for row in range(rows)]
    steps = [step_samples(lengths, step, global_batch, seed, group) for step in range(2 * GROUP)]
    assert all(len(step) == global_batch for step in steps)
    for step in steps:
        assert [lengths[row] for row, _ in step] == sorted((lengths[row] for row, _ in step), reverse=True)
    for window in range(2):
        first = window * GROUP * global_batch
        expected = [sample(first + offset, rows, seed) for offset in range(GROUP * global_batch)]
        found = [one for step in steps[window * GROUP : (window + 1) * GROUP] for one in step]
        assert sorted(found) == sorted(expected)
    backwards = [step_samples(lengths, step, global_batch, seed, group) for step in reversed(range(2 * GROUP))]
    assert backwards[::-1] == steps


def test_without_grouping_a_step_is_its_slice_of_the_permutations():
    for step in range(9):
        chosen = [sample(step * 6 + offset, 20, 3) for offset in range(6)]
        assert sorted(step_samples([5] * 20, step, 6, 3)) == sorted(chosen)


def test_grouping_saves_padding_and_keeps_the_order_of_steps_random():
    lengths = [1 + (37 * row) % 400 for row in range(400)]

    def padded(group):
        steps = [step_samples(lengths, step, 8, 0, group) for step in range(GROUP)]
        return sum(8 * max(lengths[row] for row, _ in step) for step in steps), steps

    (plain, _), (grouped, steps) = padded(False), padded(True)
    real = sum(lengths[row] for step in steps for row, _ in step)
    assert grouped < 1.05 * real < 1.5 * real < plain
    longest = [lengths[step[0][0]] for step in steps]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path, tokenizer):
    source = numbered(tmp_path, 9, lambda index: [1, 20, 5][index % 3])
    data = load_data(DataSettings(source=source, held_out=3, max_length=12), tokenizer)
    assert [row.index for row in data.train] == [0, 2, 3, 5]  # a row keeps the number that names its randomness
    assert len(data.held_out) == 2
    assert data.left_out == 3
    assert max(row.length for row in [*data.train, *data.held_out]) <= 12
    longest = 4 + 5 + 1  # <bos>a2? and the response with its end
    exact = load_data(DataSettings(source=source, held_out=3, max_length=longest), tokenizer)
    assert exact == data
    with pytest.raises(ValueError, match=r"data.max_length \(5\) leaves no row: the shortest has 6 tokens; raise it"):
        load_data(DataSettings(source=source, held_out=3, max_length=5), tokenizer)
    assert load_data(DataSettings(source=source, held_out=3), tokenizer).left_out == 0


def test_training_rows_come_first_and_held_out_rows_last(tmp_path):
    source = numbered(tmp_path, 10)

    def split(**settings):
        parts = read_records(DataSettings(source=source, **settings))
        return [[int(record.values["prompt"][1:-1]) for record in part] for part in parts]

    assert split(held_out=3) == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert split(held_out=3, rows=4) == [[0, 1, 2, 3], [7, 8, 9]]
    assert split(held_out=3, rows=7) == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert split(held_out=0) == [list(range(10)), []]


@pytest.mark.parametrize(("rows", "held_out"), [(8, 3), (None, 10), (None, 32), (11, 0)])
def test_a_file_that_is_too_small(tmp_path, rows, held_out):
    source = numbered(tmp_path, 10)
    with pytest.raises(ValueError, match=rf"has 10 rows, too few .*data.held_out \({held_out}\): lower one"):
        read_records(DataSettings(source=source, rows=rows, held_out=held_out))


def test_an_empty_file_is_too_small(tmp_path):
    with pytest.raises(ValueError, match="has 0 rows, too few"):
        read_records(DataSettings(source=str(write(tmp_path / "rows.jsonl", [])), held_out=0))


def test_generated_rows_are_the_task_s_own_splits(tokenizer):
    settings = DataSettings(source="tiny:keyed_sum", rows=30, held_out=10)
    train, held_out = (list(part) for part in read_records(settings))
    problems = [*task.problems("train", 0, 30), *task.problems("validation", 0, 10)]
    assert [(one.values["prompt"], one.values["completion"]) for one in (*train, *held_out)] == [
        (p.prompt, p.response) for p in problems
    ]
    assert "validation problem 1" in held_out[0].where
    data = load_data(settings, tokenizer)
    for row, problem in zip([*data.train, *data.held_out], problems, strict=True):
        assert tokenizer.decode(row.input_ids) == f"<bos>{problem.prompt}{problem.response}<eos>"
    with pytest.raises(ValueError, match=r"data\.rows is required for tiny:keyed_sum"):
        read_records(DataSettings(source="tiny:keyed_sum"))
    with pytest.raises(ValueError, match=r"no 'tiny:keyed' \(did you mean 'tiny:keyed_sum'\?\)"):
        read_records(DataSettings(source="tiny:keyed", rows=1))


def test_the_tokenizer_knows_every_character_of_the_task(tokenizer):
    unknown = set(tokenizer.all_special_ids)
    for text in [*task.ALPHABET, task.THINK, task.END_THINK]:
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert token not in unknown, text
    for problem in task.problems("train", 1, 50):
        assert set(problem.prompt) <= set(task.ALPHABET)


@given(st.sampled_from(task.SPLITS), st.integers(0, 50), st.integers(0, 10**6), st.integers(1, task.MAX_PAIRS))
def test_a_problem_is_solved_by_its_own_response(split, seed, index, pairs):
    problem = task.problem(split, seed, index, pairs)
    assert task.problem(split, seed, index, pairs) == problem
    assert task.split_of(problem.prompt) == split
    stated = re.fullmatch(r"((?:[a-z]\d)*)@(\d\d)((?:[a-z]\d)*)\?", problem.prompt)
    assert stated[2] == problem.passcode
    digits = {pair[0]: int(pair[1]) for pair in re.findall(r"[a-z]\d", stated[1] + stated[3])}
    assert len(digits) == pairs
    chain = re.fullmatch(r"<think>(.*);</think>(\d)@(\d\d)", problem.response)
    total = 0
    for key, step in zip(sorted(digits), chain[1].split(";"), strict=True):
        total = (total + digits[key]) % 10
        assert step[0] == key
        assert str(digits[key]) in step
        assert step.endswith(f"={total}")
    assert problem.answer == chain[2] == str(total)
    assert chain[3] == problem.passcode
    assert task.grade(problem.response, problem.answer, problem.passcode) == (True, True)


def test_splits_are_disjoint_and_seeds_differ():
    prompts = {split: {p.prompt for p in task.problems(split, 0, 300)} for split in task.SPLITS}
    assert [len(prompts[split]) for split in task.SPLITS] == [300, 300, 300]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    # even the shortest problems, of which there are few, belong to one split each
    short = {split: {task.problem(split, seed, 0, 1).prompt for seed in range(300)} for split in task.SPLITS}
    assert not short["train"] & short["test"]
    assert not short["train"] & short["validation"]
    assert prompts["test"].isdisjoint(p.prompt for p in task.problems("test", 1, 300))
    assert list(task.problems("test", 0, 3)) == [task.problem("test", 0, index) for index in range(3)]


def test_problems_are_the_same_in_every_process():
    """Python's own string hashes differ between processes; nothing may depend on them."""
    script = (
        "import runpy, sys; task = runpy.run_path(sys.argv[1]); "
        "print(*(one for split in task['SPLITS'] for one in task['problems'](split, 0, 5)))"
    )
    expected = " ".join(str(one) for split in task.SPLITS for one in task.problems(split, 0, 5))
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script, task.__file__], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected


def test_a_tenth_of_the_prompts_is_for_testing():
    shares = Counter(task.split_of(str(number)) for number in range(20000))
    assert [round(shares[split] / 20000, 1) for split in task.SPLITS] == [0.8, 0.1, 0.1]


def test_arguments_that_name_no_problem():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'tset'"):
        task.problem("tset", 0, 0)
    for pairs in (0, task.MAX_PAIRS + 1):
        with pytest.raises(ValueError, match=f"pairs must be from 1 to {task.MAX_PAIRS}, got {pairs}"):
            task.problem("test", 0, 0, pairs)


@given(st.sampled_from(task.SPLITS), st.integers(0, 10**6), st.integers(1, task.MAX_PAIRS))
def test_the_passcode_is_out_of_reach_of_the_sinks(split, index, pairs):
    problem = task.problem(split, 0, index, pairs)
    at = problem.prompt.index(f"@{problem.passcode}") + 1
    assert at + 1 >= EvictionConfig(policy="full").sinks  # <bos> comes first
    assert at >= 5 or pairs == 1
    assert problem.prompt.count("@") == 1


def test_the_passcode_is_stated_everywhere_else():
    places = Counter(p.prompt.index("@") for p in task.problems("train", 0, 600))
    assert sorted(places) == list(range(4, 2 * task.MAX_PAIRS + 1, 2))  # after every pair but the first
    assert len({p.passcode for p in task.problems("train", 0, 600)}) > 90


@pytest.mark.parametrize(
    ("response", "graded"),
    [
        ("<think>a:3+0=3;</think>3@58", (True, True)),
        ("</think>3@58", (True, True)),
        ("<think>nonsense</think>3@58 and more", (True, True)),
        ("<think></think>3@581", (True, True)),
        ("<think></think>3@57", (True, False)),
        ("<think></think>4@58", (False, True)),
        ("<think></think>4@57", (False, False)),
        ("<think></think>3", (True, False)),
        ("<think></think>3@5", (True, False)),
        ("<think></think>358", (True, False)),
        ("<think></think>@58", (False, False)),
        ("<think></think> 3@58", (False, False)),
        ("<think></think>x3@58", (False, False)),
        ("<think>3@58", (False, False)),
        ("3@58", (False, False)),
        ("<think></think>", (False, False)),
        ("<think>4@57</think>3@58", (True, True)),
        ("<think></think>3@58</think>4@57", (True, True)),
        ("", (False, False)),
    ],
)
def test_grades(response, graded):
    assert task.grade(response, "3", "58") == graded
