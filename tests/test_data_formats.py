"""Sources and formats: files, data sets, and the shapes in which reasoning data is published."""

import json

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import chat_tokenizer

from vkvtrain.training.data import Record, load_data
from vkvtrain.training.data.formats import COLUMNS, detect, examples_of
from vkvtrain.training.data.sources import read_records
from vkvtrain.training.settings import DataSettings

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>t</think>4"}
ANSWER, TEXT = {"role": "assistant", "content": "4"}, {"prompt": "a", "completion": "b"}
OPEN_R1 = {
    "problem": "2+2?", "answer": "4", "generations": ["a", "b", "c", "d"],
    "correctness_math_verify": [False, True, True, True], "is_reasoning_complete": [True, False, True, True],
    "messages": [USER, ASSISTANT],
}  # fmt: skip
THOUGHTS = {
    "system": "Use <|begin_of_thought|>.",
    "conversations": [
        {"from": "user", "value": "2+2?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nt\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>",
        },
    ],
}


def examples(values, form=None, **settings):
    record = Record(values, "rows.jsonl, row 3", 2)
    return list(examples_of(record, form or detect(record), DataSettings(source="x", **settings)))


def test_formats_are_told_by_their_columns():
    found = {
        "prompt_completion": {"prompt": "a", "completion": "b", "other": 1},
        "messages": {"messages": [USER, ASSISTANT]},
        "conversations": THOUGHTS,
        "problem_generations": OPEN_R1,  # though it has messages as well
    }
    assert {form: detect(Record(values, "", 0)) for form, values in found.items()} == {form: form for form in COLUMNS}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"text": "a"}, "columns of no known format: text .*problem and generations; messages"),
        ({}, "columns of no known format: none"),
        ({"prompt": "a", "response": "b"}, "no 'completion'"),
        ({"problem": "a", "generation": ["b"]}, r"no 'generations' \(did you mean 'generation'\?\)"),
    ],
)
def test_columns_of_no_format(values, says):
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1 has {says}"):
        detect(Record(values, "rows.jsonl, row 1", 0))


@pytest.mark.parametrize(
    ("choose", "chosen"), [("first_correct", ["c"]), ("all_correct", ["c", "d"]), ("first", ["a"])]
)
def test_generations_are_chosen(choose, chosen):
    """The second is right, but was cut off while it was still thinking."""
    found = examples(OPEN_R1, choose=choose)
    assert [one.completion for one in found] == chosen
    assert all(one.prompt == (USER,) for one in found)


@pytest.mark.parametrize("column", ["correctness_math_verify", "is_reasoning_complete"])
@pytest.mark.parametrize(
    ("verdicts", "says"),
    [
        (["False"] * 4, "must hold true and false, got 'False' .str.: convert the column"),
        ([True, "true", True, True], "got 'true'"),
        ([True, 2, True, True], "got 2 .int."),
        ([True, 0.5, True, True], "got 0.5 .float."),
        ([[True]] * 4, "got .True. .list."),
        ([True] * 3, "must have a verdict for each generation"),
        ("[True, True]", "must have a verdict for each generation"),
    ],
)
def test_verdicts_are_true_or_false(column, verdicts, says):
    with pytest.raises(ValueError, match=f"rows.jsonl, row 3: '{column}' {says}|rows.jsonl, row 3: '{column}'.*{says}"):
        examples(OPEN_R1 | {column: verdicts})
    assert len(examples(OPEN_R1 | {column: verdicts}, choose="first")) == 1


def test_no_verdict_is_not_right():
    assert [one.completion for one in examples(OPEN_R1 | {"correctness_math_verify": [None, 0, 1.0, True]})] == ["c"]


def test_a_random_choice_is_seeded():
    drawn = [
        [
            next(examples_of(Record(OPEN_R1, "", row), "problem_generations", settings)).completion
            for row in range(40)
        ]
        for settings in (DataSettings(source="x", choose="random_correct", seed=seed) for seed in (0, 0, 1))
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {"c", "d"}


def test_problems_without_a_correct_generation():
    assert examples(OPEN_R1 | {"correctness_math_verify": [False] * 4}) == []
    for verdicts in (None, [True], [None] * 3):
        with pytest.raises(ValueError, match=r"row 3: 'correctness_math_verify'.*data.choose to 'first'"):
            examples(OPEN_R1 | {"correctness_math_verify": verdicts})
    assert examples({"problem": "p", "generations": ["a"]}, choose="first")[0].completion == "a"


def test_conversations_of_open_thoughts():
    (found,) = examples(THOUGHTS)
    assert found.completion == "<think>\nt\n</think>\n\n4"
    assert found.prompt == (USER,)  # the system prompt asks for the marks, which are gone
    plain = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>t</think>4"}]
    (found,) = examples({"conversations": plain, "system": "Think."})
    assert found.prompt == ({"role": "system", "content": "Think."}, USER)
    assert found.completion == "<think>t</think>4"


def test_one_response_of_a_conversation_or_each():
    turns = [USER, ASSISTANT, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
    assert [one.completion for one in examples({"messages": turns})] == ["6"]
    each = examples({"messages": turns}, turns="each")
    assert [(len(one.prompt), one.completion) for one in each] == [(1, "<think>t</think>4"), (3, "6")]


def test_reasoning_apart_and_null_fields():
    answer = {"role": "assistant", "content": "4", "reasoning_content": "t", "tool_calls": None}
    (found,) = examples({"messages": [USER | {"reasoning_content": None}, answer]})
    assert (found.completion, found.reasoning, found.prompt) == ("4", "t", (USER,))
    (found,) = examples({"prompt": [USER], "completion": [answer]})
    assert (found.completion, found.reasoning) == ("4", "t")


def test_system_prompts():
    own = {"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}
    assert examples(own)[0].prompt[0]["content"] == "own"
    assert examples(own, system="mine")[0].prompt == ({"role": "system", "content": "mine"}, USER)
    assert examples(own, system="")[0].prompt == (USER,)
    assert examples(OPEN_R1, system="mine")[0].prompt == ({"role": "system", "content": "mine"}, USER)
    assert examples({"prompt": "a", "completion": "b"}, system="mine")[0].prompt == "a"  # text is text


def test_a_system_column():
    system = {"role": "system", "content": "own"}
    beside = {"messages": [system, USER, ASSISTANT], "system": "own"}
    assert examples(beside)[0].prompt == (system, USER)  # they say the same
    for role in ("system", "developer"):
        other = {"messages": [{"role": role, "content": "other"}, USER, ASSISTANT], "system": "own"}
        with pytest.raises(ValueError, match=r"both a 'system' column and a system message: set data.system"):
            examples(other)
        assert examples(other, system="mine")[0].prompt == ({"role": "system", "content": "mine"}, USER)
    assert examples({"prompt": [USER], "completion": "4", "system": "own"})[0].prompt == (system, USER)
    assert examples(OPEN_R1 | {"system": "own"})[0].prompt == (system, USER)
    text = {"prompt": "a", "completion": "b", "system": "own"}
    with pytest.raises(ValueError, match="the prompt is text, so the 'system' column would be dropped"):
        examples(text)
    assert examples(text, system="")[0].prompt == "a"
    assert examples(text | {"system": None})[0].prompt == "a"


@pytest.mark.parametrize("values", [OPEN_R1, {"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"}])
def test_tools_are_not_dropped(values):
    for column in ("tools", "functions"):
        with pytest.raises(ValueError, match=f"row 3: the '{column}' column would be dropped"):
            examples(values | {column: [{"name": "search"}]})
    for nothing in (None, [], "", "[]"):
        assert examples(values | {"tools": nothing})


@pytest.mark.parametrize(
    ("values", "settings", "names"),
    [
        ({"messages": [USER, ANSWER]}, {"instruction": "Think."}, ["instruction"]),
        ({"messages": [USER, ANSWER]}, {"choose": "all_correct"}, ["choose"]),
        (TEXT, {"system": "s", "turns": "each", "response": "rendered"}, ["turns", "system", "response"]),
        (TEXT, {"template_kwargs": {"enable_thinking": False}}, ["template_kwargs"]),
        ({"messages": [USER, ANSWER]}, {"system": "s", "turns": "each", "response": "rendered"}, []),
        (OPEN_R1, {"instruction": "i", "choose": "random_correct", "seed": 3, "response": "written"}, []),
        (TEXT, {"response": "written"}, []),
    ],
)
def test_settings_that_change_nothing_say_so(values, settings, names, tmp_path, recwarn):
    (tmp_path / "rows.jsonl").write_text((json.dumps(values) + "\n") * 2)
    load_data(DataSettings(source=str(tmp_path / "rows.jsonl"), held_out=0, **settings), chat_tokenizer("phi4"))
    said = [str(one.message).split(" ")[0] for one in recwarn if "has no effect" in str(one.message)]
    assert sorted(said) == sorted(f"data.{name}" for name in names)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "x"}]}]}, "the trained turn has 'tool_calls'"),
        ({"prompt": [USER], "completion": [ASSISTANT | {"function_call": {"name": "x"}}]}, "'function_call'"),
        ({"messages": [USER, ASSISTANT], "system": ["x"]}, "'system' must be text, got list"),
        ({"messages": []}, "'messages' must be a list of turns"),
        ({"messages": "hello"}, "'messages' must be a list of turns, got str"),
        ({"messages": [USER]}, "the last turn must be the assistant's, got 'user'"),
        ({"messages": [ASSISTANT]}, "the assistant speaks first"),
        ({"messages": ["hello"]}, "must hold messages, got str"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content is no text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the assistant's turn is empty"),
        ({"conversations": [{"from": "human"}]}, "content is no text"),
        ({"prompt": [], "completion": "b"}, "'prompt' is empty"),
        ({"prompt": [USER], "completion": [USER]}, "must be an assistant's message"),
        ({"prompt": [USER], "completion": [USER, ASSISTANT]}, "must be one message, got 2"),
        ({"prompt": "a", "completion": [ASSISTANT | {"thinking": "t"}]}, "no template to write the reasoning"),
        (OPEN_R1 | {"generations": "a"}, "'generations' must be a list of texts, got str"),
        (OPEN_R1 | {"generations": ["a", "b", "", "d"]}, "'generations' holds something that is empty"),
        (OPEN_R1 | {"problem": None}, "'problem' must be text, got NoneType"),
    ],
)
def test_malformed_rows_are_named(values, says):
    with pytest.raises(ValueError, match=f"rows.jsonl, row 3:? .*{says}"):
        examples(values)


ROWS = [{"messages": [USER, {"role": "assistant", "content": f"<think>\nt\n</think>\n\n{n}"}]} for n in range(7)]


@pytest.fixture(params=["jsonl", "parquet", "directory"])
def source(request, tmp_path):
    """The same rows in a JSONL file, a Parquet file, and a directory that `datasets` loads."""
    if request.param == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return path
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path if request.param == "parquet" else path.parent


def test_every_source_gives_the_same_rows(source):
    settings = DataSettings(source=str(source), held_out=2, rows=4)
    train, held_out = (list(part) for part in read_records(settings))
    assert [record.values for record in train] == ROWS[:4]
    assert [record.values for record in held_out] == ROWS[5:]
    assert [record.number for record in (*train, *held_out)] == [0, 1, 2, 3, 5, 6]
    assert train[2].where.endswith("row 3")
    tokenizer = chat_tokenizer("qwen3")
    data = load_data(settings, tokenizer)
    assert [tokenizer.decode(row.input_ids).count("<think>") for row in data.train] == [1] * 4
    with pytest.raises(ValueError, match="has 7 rows, too few"):
        read_records(DataSettings(source=str(source), held_out=7))


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"no parquet")
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("import datasets\n")
    for source, says in {
        str(script): r"cannot be loaded: .*script\.py",
        str(broken): "is not a Parquet file",
        str(tmp_path / "none.parquet"): "there is no file",
        "nonsense": "is no file .*no data set on the Hub",
        "someone/unheard-of": r"'someone/unheard-of' \(config None, split 'train'\) cannot be loaded",
    }.items():
        with pytest.raises(ValueError, match=f"data.source.*{says}"):
            read_records(DataSettings(source=source))


def test_rows_without_a_correct_generation_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    wrong = OPEN_R1 | {"correctness_math_verify": [False] * 4}
    tokenizer = chat_tokenizer("qwen3")
    path.write_text("".join(json.dumps(row) + "\n" for row in (OPEN_R1, wrong, OPEN_R1, wrong)))
    data = load_data(DataSettings(source=str(path), held_out=1, choose="all_correct", response="written"), tokenizer)
    assert [row.index for row in data.train] == [0, 1, 2, 3]
    assert (data.held_out, data.unusable) == ([], 2)
    path.write_text("".join(json.dumps(wrong) + "\n" for _ in range(3)))
    with pytest.raises(ValueError, match="none of the 3 training rows has a correct generation"):
        load_data(DataSettings(source=str(path), held_out=0), tokenizer)
