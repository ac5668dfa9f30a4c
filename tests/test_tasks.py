"""The reasoning tasks: local data, repeats, shuffled options, probes and generated families, through lm-eval."""

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from vkvtrain.evaluation import passcode
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.evaluation.records import Generation
from vkvtrain.evaluation.tasks import MEASURED, grade_integer, grade_letter, shuffled
from vkvtrain.tiny import MODEL_PATH

TASKS = Path(__file__).parents[1] / "eval/tasks"
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "Explanation": "long",
}
ROWS = {
    "aime24": {"problem": "What is 2 + 2?", "answer": "004", "id": 60},
    "aime25": {"problem": "What is 2 + 2?", "answer": 4, "id": "0"},
    "aime26": {"problem_idx": 1, "problem": "What is 2 + 2?", "answer": 4},
    "hmmt_feb25": {
        "problem_idx": 1,
        "problem": "What is 1 / 2?",
        "answer": "\\frac{1}{2}",
        "problem_type": ["Algebra"],
    },
    "math500": {"problem": "What is 1 / 2?", "solution": "...", "answer": "\\frac{1}{2}", "level": 2},
    "amc23": {"id": 0, "question": "What is 2 + 2?", "answer": 4.0, "url": ""},
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 is <<2+2=4>>4\n#### 4"},
    "gpqa_diamond": GPQA,
}
"""One row of each benchmark, with the columns that it has on the Hub."""
RIGHT = {"hmmt_feb25": "\\boxed{0.5}", "math500": "\\boxed{\\frac{2}{4}}"}


@pytest.fixture
def data(tmp_path):
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    return tmp_path


def manager(**metadata):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def load(name, **metadata):
    return manager(**metadata).load([name])["tasks"][name]


@pytest.mark.parametrize("name", ROWS)
def test_benchmarks_load_and_grade(name, data):
    task = load(f"vkv_{name}", data=str(data), repeats=3)
    doc = task.eval_docs[0]
    text = task.doc_to_text(doc)
    assert "\\boxed{}" in text
    assert next(str(ROWS[name][key]) for key in ("problem", "question", "Question") if key in ROWS[name]) in text
    settings = task.config.generation_kwargs
    assert (settings["temperature"], settings["top_p"], settings["max_gen_toks"]) == (0.6, 0.95, 32768)
    assert settings["do_sample"]
    assert settings["until"] == []
    assert task.config.repeats == 3
    right = f"\\boxed{{{doc['answer']}}}" if name == "gpqa_diamond" else RIGHT.get(name, "so \\boxed{4}")
    graded = task.process_results(doc, [[right, f"<think>\\boxed{{9}}{right}", "</think>" + right]])
    assert graded["exact_match"] == pytest.approx(2 / 3)
    assert [row["exact_match"] for row in graded["responses"]] == [1, 0, 1]
    assert set(graded) <= set(task.aggregation())
    assert not set(MEASURED) & set(graded)  # a model that keeps no record is not measured


def test_every_task_is_ours_and_repeats_as_published():
    names = set(manager().all_tasks)
    assert names >= {f"vkv_{name}" for name in ROWS}
    assert names >= {"vkv_passcode", "vkv_passcode_scored", "tiny_keyed_sum", "vkv_gym_countdown", "vkv_ledger"}
    assert all(name.startswith("vkv_") or name == "tiny_keyed_sum" for name in names)
    for name in ("vkv_passcode", "tiny_keyed_sum", "vkv_ledger"):
        assert len(load(name, problems=3).eval_docs) == 3


def test_repeats_are_sixteen_on_small_contests(data):
    assert load("vkv_aime25", data=str(data)).config.repeats == 16
    assert load("vkv_math500", data=str(data / "math500.jsonl")).config.repeats == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "there is no file"),
        ("", "holds no problems"),
        ('{"problem": "x"}\n', "has no column 'answer' .it has problem"),
        ('{"problem": "x", "answer": 1}\n{oops\n', "line 2: not valid JSON"),
        ('{"problem": "x", "answer": 1, "id": 1}\n{"problem": "x", "answer": 1, "id": "x"}\n', "some.jsonl.*one type"),
        ("[1]\n", "line 1: must be an object"),
    ],
)
def test_bad_data_is_one_sentence(rows, message, tmp_path):
    path = tmp_path / "some.jsonl"
    if rows is not None:
        path.write_text(rows)
    with pytest.raises(ValueError, match=message):
        load("vkv_aime25", data=str(path))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime25", {"problem": "x", "answer": 2.5}, "must be an integer in digits, got '2.5'"),
        ("aime24", {"problem": "x", "answer": "n/a"}, "must be an integer in digits, got 'n/a'"),
        ("amc23", {"question": "x", "answer": 2.0**60}, "too large for a floating-point number"),
        ("math500", {"problem": "x", "answer": ""}, "must be text or a number, got ''"),
        ("math500", {"problem": "x", "answer": None}, "'answer' must be text or a number, got null"),
        ("math500", {"problem": "x", "answer": ["1"]}, r"'answer' must be text or a number, got \["),
        ("hmmt_feb25", {"problem": "x", "answer": r"\frac{1}{0}"}, "cannot be read as mathematics or words"),
        ("gsm8k", {"question": "x", "answer": "So 4."}, "must be an integer in digits, got 'So 4.'"),
        ("gpqa_diamond", GPQA | {"Correct Answer": None}, "'Correct Answer' must be text, got None"),
        ("gpqa_diamond", GPQA | {"Incorrect Answer 2": " "}, "'Incorrect Answer 2' must be text"),
        ("gpqa_diamond", {"Question": "Which?"}, "'Correct Answer' must be text, got None"),
    ],
)
def test_golds_are_read_when_problems_are_loaded(name, row, message, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"some.jsonl, line 2: .*{message}"):
        load(f"vkv_{name}", data=str(path))


def test_a_gold_of_the_hub_is_refused_with_its_row(monkeypatch):
    rows = datasets.Dataset.from_list([{"problem": "x", "answer": "4"}, {"problem": "x", "answer": "4 or 5"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(
        ValueError, match="math-ai/aime25, row 2: the answer must be an integer in digits, got '4 or 5'"
    ):
        load("vkv_aime25")


def test_an_answer_that_its_family_refuses(monkeypatch):
    monkeypatch.setattr("reasoning_gym.get_score_answer_fn", lambda _: lambda answer, entry: 0.5)
    with pytest.raises(
        ValueError, match=r"family 'countdown', problem 0 of data_seed 7: the answer .* is not accepted"
    ):
        load("vkv_gym_countdown", problems=2, data_seed=7)


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'math-ai/aime25' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"math-ai/aime25 could not be loaded.*--metadata '\{\"data\": \"aime25.jsonl\"\}'"
    ):
        load("vkv_aime25")


@pytest.mark.parametrize("repeats", [0, "many", 1.5])
def test_bad_repeats(repeats, data):
    with pytest.raises(ValueError, match="repeats must be a positive whole number"):
        load("vkv_aime25", data=str(data), repeats=repeats)


def test_options_are_shuffled_by_the_seed_and_the_question():
    orders, letters = set(), set()
    for seed in range(40):
        row = shuffled(GPQA, seed)
        assert row == shuffled(GPQA, seed)
        options = row["options"].splitlines()
        assert options["ABCD".index(row["answer"])] == f"{row['answer']}) right"
        assert sorted(option[3:] for option in options) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        orders.add(row["options"])
        letters.add(row["answer"])
    assert letters == set("ABCD")
    assert len(orders) > 12
    assert len({shuffled(GPQA | {"Question": str(index)}, 0)["options"] for index in range(40)}) > 12


def test_thinking_is_graded_by_the_record():
    """The record knows the prompt: it may have opened the thinking, which a response alone does not show."""
    unfinished = Generation("so \\boxed{4}")
    unfinished.record = {"answer": "", "tokens": 5, "answered": False}
    done = Generation("so \\boxed{4}")
    done.record = {"answer": "so \\boxed{4}", "tokens": 7, "answered": True}
    graded = grade_integer({"answer": "4"}, [[unfinished, done]])
    assert graded["exact_match"] == 0.5
    assert graded["tokens"] == 6
    assert graded["answered"] == 0.5
    assert graded["responses"][0] == {"answer": None, "exact_match": 0.0, "tokens": 5.0, "answered": 0.0}
    assert grade_letter({"answer": "B"}, [["\\boxed{B}"]])["exact_match"] == 1


def test_a_run_keeps_every_repeat(data):
    """Through lm-eval: avg@k over sampled responses, each of them recorded; stock lm-eval models are graded alike."""
    arguments = {"device": "cpu", "batch_size": 4}
    ours = EvictionLM(str(MODEL_PATH), policy="random", budget=32, window=16, **arguments)
    for model in (ours, HFLM(str(MODEL_PATH), backend="causal", **arguments)):
        out = lm_eval.simple_evaluate(
            model=model, tasks=["vkv_aime25"], task_manager=manager(data=str(data), repeats=3), bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 24},
        )  # fmt: skip
        assert out is not None
        results, samples = out["results"]["vkv_aime25"], out["samples"]["vkv_aime25"]
        assert results["exact_match,none"] == 0
        assert results["responses,none"] == 6
        assert all(len(sample["responses"]) == 3 for sample in samples)
        if model is ours:
            assert results["tokens,none"] > 0
            assert results["evictions,none"] > 0
            assert {"answered,none", "looping,none", "peak_kv_bytes,none", "final_length,none"} <= set(results)
            run = out["config"]["eviction"]
            assert run["generations"] == 6
            assert run["tokens"] == sum(row["tokens"] for sample in samples for row in sample["responses"])
            assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"], rel=0.01)
            assert len({resp for sample in samples for resp in sample["resps"][0]}) > 2


def test_the_passcode_probe_states_its_fact_once():
    rows = passcode.load(problems=20, data_seed=3, filler_words=200)["test"]
    assert rows.to_list() == passcode.load(problems=20, data_seed=3, filler_words=200)["test"].to_list()
    for row in rows:
        before, _, after = row["notes"].partition(f"The passcode is {row['answer']}.")
        assert len(before.split()) >= 40
        assert len(after.split()) >= 40
        assert row["answer"] not in before + after
        assert 200 <= len(row["notes"].split()) < 220
    assert len({row["answer"] for row in rows}) == 20
    assert rows[0] != passcode.load(problems=1, data_seed=4, filler_words=200)["test"][0]
    with pytest.raises(ValueError, match="filler_words must be a positive whole number, got 0"):
        passcode.load(filler_words=0)


def test_scored_passcodes_differ_in_the_code_alone():
    rows = passcode.load_scored(problems=20, filler_words=100)["test"]
    for row in rows:
        assert len(set(row["choices"])) == 4
        stems = {choice.rpartition(" ")[0] for choice in row["choices"]}
        assert len(stems) == 1
        code = row["choices"][row["answer"]].rpartition(" ")[2]
        assert f"The passcode is {code}." in row["context"]
        assert code not in stems.pop()
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_the_scored_probe_evicts_before_it_asks():
    model = EvictionLM(str(MODEL_PATH), policy="streaming", budget=64, window=16, device="cpu", batch_size=4)
    out = lm_eval.simple_evaluate(
        model=model, tasks=["vkv_passcode_scored"], task_manager=manager(problems=2, filler_words=40), bootstrap_iters=0
    )
    assert out is not None
    records = [argument[2]["vkvtrain"][0] for argument in out["samples"]["vkv_passcode_scored"][0]["arguments"]]
    assert len(records) == 4
    assert all(record["evictions"] > 5 for record in records)
    assert "warning" not in out["config"]["eviction"]


GYM = sorted(path.stem for path in (TASKS / "gym").glob("*.yaml"))


@pytest.mark.parametrize("family", GYM)
def test_families_of_reasoning_gym(family):
    task = load(f"vkv_gym_{family}", problems=3, data_seed=5)
    again = load(f"vkv_gym_{family}", problems=3, data_seed=5)
    assert task.eval_docs.to_list() == again.eval_docs.to_list()
    assert task.eval_docs.to_list() != load(f"vkv_gym_{family}", problems=3, data_seed=6).eval_docs.to_list()
    for doc in task.eval_docs:
        right = f"<think><answer>1</answer></think>so <answer>{doc['answer']}</answer>"
        texts = [right, right.replace("</think>", ""), "<answer>(((</answer>", "<answer></answer>", "none"]
        graded = task.process_results(doc, [texts])
        assert [row["exact_match"] for row in graded["responses"]] == [1, 0, 0, 0, 0]


def test_an_unknown_family_is_one_sentence():
    with pytest.raises(ValueError, match="reasoning-gym family 'chess'"):
        load("vkv_gym_countdown", family="chess")
