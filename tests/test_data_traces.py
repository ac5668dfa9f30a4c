"""`vkvtrain data generate`: judges, resumable generation on the embedded model, and a recipe that trains on it."""

import json
import re

import pytest
import torch
from short_runs import metrics, short_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain.cli import main
from vkvtrain.tiny import MODEL_PATH, task
from vkvtrain.traces import making
from vkvtrain.traces.command import TraceArguments, run
from vkvtrain.traces.problems import problems, same_answer
from vkvtrain.training.data import load_data
from vkvtrain.training.loop import train
from vkvtrain.training.settings import DataSettings


def arguments(tmp_path, **changes):
    """Hot enough for the embedded model to err."""
    settings = {
        "model": "tiny", "source": "tiny:keyed_sum", "rows": 8, "attempts": 3, "temperature": 1.6, "top_p": 1.0,
        "max_new_tokens": 150, "slots": 8, "output": tmp_path / "traces.jsonl",
    }  # fmt: skip
    return TraceArguments(**settings | changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("traces")
    return directory, run(arguments(directory))


def test_every_trace_is_right_and_says_where_it_is_from(made):
    directory, tally = made
    rows = lines(directory / "traces.jsonl")
    assert len(rows) == tally.accepted
    assert 0 < tally.accepted < tally.attempts < 24  # some were rejected, and solved problems were not tried again
    numbers = [row["provenance"]["problem"] for row in rows]
    assert numbers == sorted(set(numbers))
    for row in rows:
        problem = task.problem("train", 0, row["provenance"]["problem"])
        assert row["prompt"] == problem.prompt
        assert task.grade(row["completion"], problem.answer, problem.passcode) == (True, True)
        assert row["answer"] == f"{problem.answer}@{problem.passcode}"
        assert (row["provenance"]["model"], row["provenance"]["verifier"]) == ("tiny", "tiny:keyed_sum")
        assert row["provenance"]["sampling"]["temperature"] == 1.6
    assert {row["provenance"]["attempt"] for row in rows} > {0}


def test_what_is_trained_on_is_what_was_generated(made):
    """Token by token, and under the full cache the likelihood is what generation recorded."""
    directory, tally = made
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    data = load_data(DataSettings(source=str(directory / "traces.jsonl"), held_out=0, response="written"), tokenizer)
    journal = {tuple(row["tokens"]): row for row in lines(directory / "traces.jsonl.journal")}
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation="vkvtrain")
    assert tally.retokenised == 0
    for row in data.train:
        response = tuple(row.input_ids[row.prompt_length :])
        with torch.no_grad():
            scores = (
                model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
            )
        found = scores.gather(1, torch.tensor(response)[:, None]).flatten()
        assert found.tolist() == pytest.approx(journal[response]["log_probs"], abs=1e-4)


def test_an_interrupted_run_goes_on_where_it_was(made, tmp_path, monkeypatch):
    directory, tally = made
    again = arguments(tmp_path)
    journal = tmp_path / "traces.jsonl.journal"
    finished = (directory / "traces.jsonl.journal").read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(finished[:5]) + finished[5][:20])  # killed while it wrote the sixth
    assert run(again) == tally
    assert (tmp_path / "traces.jsonl").read_bytes() == (directory / "traces.jsonl").read_bytes()
    asked = []
    generate = making.generate
    monkeypatch.setattr(
        making, "generate", lambda *args, **more: asked.append(more["journal"]) or generate(*args, **more)
    )
    run(again)
    assert asked
    assert len(journal.read_bytes().splitlines()) == len(finished)  # nothing was generated twice


def test_shards_together_are_the_whole(made, tmp_path):
    directory, _ = made
    rows = []
    for index in (0, 1):
        run(arguments(tmp_path, shard=f"{index}/2", output=tmp_path / f"{index}.jsonl", slots=5))
        rows += lines(tmp_path / f"{index}.jsonl")
    assert sorted(rows, key=lambda row: row["provenance"]["problem"]) == lines(directory / "traces.jsonl")


def test_a_recipe_trains_on_the_traces(made, tmp_path):
    directory, _ = made
    parts = {
        "data": {"source": str(directory / "traces.jsonl"), "response": "written", "held_out": 1},
        "eviction": {"policy": "vase_attnv", "budget": 64, "window": 16},
        "training": {"steps": 2, "global_batch": 2},
    }
    train(short_recipe(tmp_path / "run", parts))
    logged = metrics(tmp_path / "run")
    assert [row["kind"] for row in logged] == ["evicted", "evicted"]
    assert all(row["evictions"] > 1 for row in logged)


def test_judges_of_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra of its own, `gym`")
    verifier, found = problems("reasoning_gym:chain_sum", 3, 5, None, "train")
    one = next(found)
    assert verifier == "reasoning_gym"
    assert one.is_conversation
    assert str(eval(one.text.rpartition(":")[2].rstrip(" ="))) == one.answer
    for response, right in {
        f"<think>hm</think>\\boxed{{{one.answer}}}": True,
        f"<think>hm</think>It is \\boxed{{1}}, no, \\boxed{{{one.answer}}}.": True,
        f"<think>hm</think>{one.answer}": True,
        f"<think>\\boxed{{{one.answer}}}": False,  # a thought that never ended
        f"<think>\\boxed{{{one.answer}}}</think>\\boxed{{123456}}": False,
        "<think>hm</think>": False,
    }.items():
        assert one.accepts("ask", response) is right, response
    assert not one.accepts("ask <think>\n", f"\\boxed{{{one.answer}}}")  # opened by the prompt, never ended
    assert [p.text for p in problems("reasoning_gym:chain_sum", 3, 6, None, "train")[1]] != [one.text]
    with pytest.raises(ValueError, match=r"no task 'chain_smu' \(did you mean 'chain_sum'\?\)"):
        problems("reasoning_gym:chain_smu", 3, 5, None, "train")


def test_judges_of_known_answers(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"problem": "Half?", "answer": "\\frac{1}{2}"}, {"question": "Sum?", "answer": "2+2 is\n#### 4"},
        {"problem": "None?"}, {"text": "None?"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verifier, found = problems(str(path), None, 0, None, "train")
    half, total = next(found), next(found)
    assert verifier == "math_verify"
    assert (half.text, total.text, total.answer) == ("Half?", "Sum?", "4")
    assert half.accepts("", "<think>0.7?</think>It is \\boxed{0.5}.")
    assert not half.accepts("", "<think>\\boxed{0.5}</think>It is \\boxed{0.7}.")
    assert total.accepts("", "\\boxed{4}")
    with pytest.raises(ValueError, match="row 3 has no 'answer'"):
        next(found)
    _, fourth = problems(str(path), None, 0, None, "train")
    with pytest.raises(ValueError, match="row 3 has no 'answer'"):
        list(fourth)
    path.write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(ValueError, match="row 1 has no problem: name its text problem, question or prompt"):
        next(problems(str(path), None, 0, None, "train")[1])
    final = "<|channel|>analysis<|message|>\\boxed{3}<|end|><|start|>assistant<|channel|>final<|message|>\\boxed{4}"
    path.write_text(json.dumps(rows[1]) + "\n")
    one = next(problems(str(path), None, 0, None, "train", "<|channel|>final<|message|>")[1])
    assert one.accepts("", final)
    assert not one.accepts("", final.replace("4", "5"))


@pytest.mark.parametrize(
    ("answer", "right"), [("\\boxed{4}", True), ("4", False), ("\\boxed{5}", False), ("", False), ("\\boxed{", False)]
)
def test_answers_as_mathematics(answer, right):
    assert same_answer(answer, "4") is right


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--attempts": "0"}, "--attempts must be at least 1, got 0"),
        ({"--keep": "5"}, r"--keep \(5\) is more than --attempts \(4\)"),
        ({"--temperature": "0"}, "--temperature 0 gives the same response"),
        ({"--temperature": "-1"}, "temperature must be at least 0"),
        ({"--temperature": "inf"}, "temperature must be .*finite, got inf"),
        ({"--temperature": "nan"}, "temperature must be .*finite, got nan"),
        ({"--top-p": "2"}, "top_p must be above 0 and at most 1"),
        ({"--top-k": "-1"}, "top_k must be at least 0"),
        ({"--rows": "0"}, "--rows must be at least 1, got 0"),
        ({"--rows": "-1"}, "--rows must be at least 1, got -1"),
        ({"--max-new-tokens": "-5"}, "--max-new-tokens must be at least 1, got -5"),
        ({"--slots": "0"}, "--slots must be at least 1, got 0"),
        ({"--seed": "99999999999999999999"}, "--seed must fit 64 bits"),
        ({"--shard": "0/0"}, "--shard must be i/n"),
        ({"--output": "."}, "--output . is a directory: name a file"),
        ({"--output": f"{__file__}/o.jsonl"}, "--output .* cannot be written"),
        ({"--template-kwargs": "{"}, "--template-kwargs '{' is not JSON"),
        ({"--template-kwargs": "[]"}, "must be a JSON object"),
        ({"--shard": "2/2"}, "--shard must be i/n"),
        ({"--shard": "9/10"}, "--shard 9/10 of tiny:keyed_sum holds no problem"),
        ({"--source": "nowhere.jsonl"}, "no file 'nowhere.jsonl'"),
        ({"--source": "reasoning_gym:chain_sum"}, "no chat template"),
        ({"--model": "./nowhere"}, "--model './nowhere' cannot be loaded"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, changes, says):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"--model": "tiny", "--source": "tiny:keyed_sum", "--rows": "4", "--output": str(tmp_path / "o.jsonl")}
    assert main(["data", "generate", *(part for pair in (given | changes).items() for part in pair)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(says, error), error
    assert error.startswith("vkvtrain data: ")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"problem": "? " * 600, "answer": "4"},
            r"problems.jsonl, row 2: the prompt has [\d,]+ tokens, and --model tiny has",
        ),
        ({"problem": "?", "answer": ""}, "problems.jsonl, row 2 has no 'answer'"),
        ({"problem": "?", "answer": True}, "problems.jsonl, row 2: the answer must be text or a number"),
        ({"problem": "?", "answer": "\\frac{1}{0}"}, "problems.jsonl, row 2: the answer cannot be read as mathematics"),
    ],
)
def test_a_bad_problem_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, row, says):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"problem": "?", "answer": "4"}, row)))
    with pytest.raises(ValueError, match=says):
        run(arguments(tmp_path, source=str(path), rows=None))


def test_an_unwritable_journal_is_refused(tmp_path):
    (tmp_path / "traces.jsonl.journal").mkdir()
    with pytest.raises(ValueError, match=r"--output .* cannot be written .*traces.jsonl.journal: Is a directory"):
        run(arguments(tmp_path))


def test_nothing_accepted_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"none of 4 attempts was accepted \(4 were cut off\): nothing is written"):
        run(arguments(tmp_path, rows=2, attempts=2, max_new_tokens=5))
    assert not (tmp_path / "traces.jsonl").exists()


def test_say_what_to_do(capsys):
    assert main(["data"]) == 2
    assert "preview or generate" in capsys.readouterr().err
