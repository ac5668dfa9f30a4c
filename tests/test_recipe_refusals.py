"""What the training command says to bad recipes, command lines, rows and models."""

import json
import re

import pytest
from recipe_files import EVICTED, values, write
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import overrides


@pytest.fixture
def refused(finetune, capsys, monkeypatch):
    """Run the command; it must refuse with status 2 and one sentence, which is returned, and load no model."""

    def no_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)

    def call(*arguments):
        status = finetune([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 2
        lines = captured.err.splitlines()
        message = [line for line in lines if line.startswith("finetune: ")]
        assert len(message) == 1, captured.err
        assert lines[-1] == message[0]
        assert captured.out == ""
        sentence = message[0].removeprefix("finetune: ")
        assert not re.search(r"\. [A-Z]", sentence), "more than one sentence"
        return sentence

    return call


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 1e-3}, ["unknown setting 'learning_rate'"]),
        ({"evcition": None}, ["unknown setting 'evcition'", "did you mean 'eviction'"]),
        ({"optim": {"learnign_rate": 1e-3}}, ["optim", "unknown setting 'learnign_rate'", "'learning_rate'"]),
        ({"model": {"nmae": "tiny"}}, ["model", "unknown setting 'nmae'", "did you mean 'name'"]),
        ({"eviction": {**EVICTED, "bugdet": 64}}, ["eviction", "unknown setting 'bugdet'", "did you mean 'budget'"]),
        ({"eviction": {**EVICTED, "policy": "vase_atnv"}}, ["eviction", "'vase_atnv'", "did you mean 'vase_attnv'"]),
        ({"eviction": {**EVICTED, "budget": 70}}, ["eviction", "budget (70)", "multiple of window (16)", "64 or 80"]),
        ({"eviction": {**EVICTED, "budget": 16}}, ["eviction", "budget (16)", "greater than window (16)"]),
        ({"eviction": {**EVICTED, "budget": [64, 70]}}, ["budget (70)", "multiple of window (16)"]),
        ({"eviction": {**EVICTED, "budget": []}}, ["eviction", "budget", "empty list", "at least one"]),
        ({"eviction": {**EVICTED, "budget": "many"}}, ["eviction", "budget", "integer", "'many'"]),
        ({"eviction": {**EVICTED, "budget": [[64]]}}, ["eviction", "budget", "integer"]),
        ({"eviction": {**EVICTED, "budget": None}}, ["budget is required", "multiple of window (16)"]),
        ({"eviction": {"window": 16}}, ["budget is required"]),
        ({"eviction": []}, ["setting 'eviction'", "dictionary"]),
        ({"eviction": {**EVICTED, "policy_args": {"rank": 2}}}, ["policy_args", "'rank'"]),
        ({"eviction": {**EVICTED, "sinks": 48}}, ["sinks (48)", "budget - window (48)"]),
        ({"model": "tiny"}, ["model"]),
        ({"training": {"global_batch": 4}}, ["training", "'steps' is required"]),
        ({"training": {"steps": 0}}, ["training", "'steps'", "greater than or equal to 1", "got 0"]),
        ({"training": {"steps": 20, "objective": "dpo"}}, ["training", "'objective'", "'distill' or 'on_policy'"]),
        ({"training": {"steps": 20, "dense_fraction": 1.5}}, ["training", "'dense_fraction'", "1.5"]),
        ({"optim": {"learning_rate": "fast"}}, ["optim", "'learning_rate'", "number", "'fast'"]),
        ({"optim": {"warmup_steps": 21}}, ["optim.warmup_steps (21)", "training.steps (20)"]),
        (
            {"lora": {"init": "pissa"}, "training": {"steps": 20, "objective": "distill"}},
            ["lora.init 'pissa'", "teacher", "'sft'"],
        ),
        ({"lora": {"init": "olora"}, "training": {"steps": 20, "objective": "distill"}}, ["lora.init 'olora'"]),
        ({"data": {"source": "nowhere.jsonl"}}, ["data.source", "no file 'nowhere.jsonl'", "JSONL"]),
        ({"data": {"source": "tiny:keyed_smu", "rows": 3}}, ["data.source", "did you mean 'tiny:keyed_sum'"]),
        ({"data": {"source": "tiny:keyed_sum"}}, ["data.rows is required"]),
        ({"data": {"source": "tiny:keyed_sum", "rows": 3, "max_length": 20}}, ["data.max_length (20)", "raise it"]),
        ({"output": None}, ["'output'"]),
        ({1: 2}, ["setting", "1"]),
        ({"base": 5}, ["base"]),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_refused_in_one_sentence(tmp_path, refused, changes, says):
    message = refused(write(tmp_path / "r.yaml", values(tmp_path) | changes))
    for words in says:
        assert words in message, message


def test_a_setting_that_is_missing_is_named(tmp_path, refused):
    for name in ("model", "data", "training", "output"):
        content = values(tmp_path)
        del content[name]
        assert f"setting {name!r} is required" in refused(write(tmp_path / "r.yaml", content))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b\n", ["must hold a mapping", "list"]),
        ("", ["must hold a mapping"]),
        ("model: [\n", ["not valid YAML"]),
        ("base: nowhere.yaml\n", ["there is no recipe", "nowhere.yaml"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, refused, content, says):
    message = refused(write(tmp_path / "r.yaml", content))
    for words in (*says, str(tmp_path)):
        assert words in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bugdet", "64"], ["--bugdet", "no such setting", "did you mean 'budget'"]),
        (["--optim.lr", "1"], ["--optim.lr", "no such setting"]),
        (["--budget"], ["--budget needs a value"]),
        (["--budget", "--dry-run"], ["--budget needs a value"]),
        (["--budget", "["], ["--budget", "not a YAML value"]),
        (["--budget", "70"], ["budget (70)", "multiple of window (16)"]),
        (["--budget", "[]"], ["budget", "empty list"]),
        (["--policy", "snapkw"], ["'snapkw'", "did you mean 'snapkv'"]),
        (["--dry-run=yes"], ["--dry-run takes no value"]),
        (["other.yaml"], ["exactly one recipe", "other.yaml"]),
        (["--objective", "distill", "--lora.init", "pissa"], ["pissa", "teacher"]),
        (["--steps", "many"], ["training", "'steps'", "'many'"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_bad_command_line_is_refused_in_one_sentence(tmp_path, refused, arguments, says):
    message = refused(write(tmp_path / "r.yaml", values(tmp_path)), *arguments)
    for words in says:
        assert words in message, message


def test_an_override_inside_a_section_that_is_no_mapping_is_refused(tmp_path, refused):
    assert "model" in refused(write(tmp_path / "r.yaml", values(tmp_path, model="tiny")), "--model.dtype", "float32")


def test_a_recipe_that_is_missing_is_named(tmp_path, refused):
    assert f"there is no recipe {str(tmp_path / 'no.yaml')!r}" in refused(tmp_path / "no.yaml")
    assert "there is no recipe" in refused(tmp_path)
    assert "exactly one recipe" in refused()


def test_an_ambiguous_override_is_refused(tmp_path, refused, monkeypatch):
    """No two sections share a name today but `seed`, which the recipe has itself."""
    monkeypatch.setattr(overrides, "setting_names", lambda: ["output", "model.size", "data.size"])
    message = refused(write(tmp_path / "r.yaml", values(tmp_path)), "--size", "3")
    assert "--size could be --model.size or --data.size" in message


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "a1", ', ["not valid JSON"]),
        ('{"prompt": "a1"}', ["no 'completion'"]),
        ('{"prompt": "a1", "compeltion": "1"}', ["no 'completion'", "did you mean 'compeltion'"]),
        ('{"completion": "1"}', ["no 'prompt'"]),
        ("{}", ["no 'prompt'"]),
        ('["a1", "1"]', ["must be an object", "list"]),
        ('{"prompt": "a1", "completion": 7}', ["'completion' must be text", "int"]),
        ('{"prompt": null, "completion": "1"}', ["'prompt' must be text", "NoneType"]),
        ('{"prompt": "a1", "completion": ""}', ["'completion' is empty"]),
    ],
)
def test_a_malformed_row_is_named_by_its_number(tmp_path, refused, bad, says):
    good = '{"prompt": "a1?", "completion": "1"}\n'
    rows = write(tmp_path / "rows.jsonl", good * 2 + bad + "\n" + good)
    message = refused(write(tmp_path / "r.yaml", values(tmp_path, data={"source": str(rows), "held_out": 0})))
    for words in (*says, f"{rows}, row 3"):
        assert words in message, message


def test_a_row_that_is_no_text_is_named_by_its_number(tmp_path, refused):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"prompt": "a1?", "completion": "1"}\n{"prompt": "\xff\xfe", "completion": "1"}\n')
    message = refused(write(tmp_path / "r.yaml", values(tmp_path, data={"source": str(rows), "held_out": 0})))
    assert f"{rows}, row 2" in message


def test_a_model_that_is_missing_is_named(tmp_path, finetune, capsys):
    """What the Hub's client says is added, however many sentences it is."""
    content = values(tmp_path, model={"name": "./no/such/model"})
    assert finetune([str(write(tmp_path / "r.yaml", content))]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("finetune: model.name './no/such/model' cannot be loaded")
    )


def test_a_file_with_too_few_rows_is_refused(tmp_path, refused):
    rows = write(tmp_path / "rows.jsonl", '{"prompt": "a1?", "completion": "1"}\n' * 5)
    for chosen in ({"held_out": 5}, {"held_out": 3, "rows": 3}, {"held_out": 0, "rows": 6}):
        recipe = write(tmp_path / "r.yaml", values(tmp_path, data={"source": str(rows), **chosen}))
        message = refused(recipe)
        assert "has 5 rows, too few" in message
        assert f"data.held_out ({chosen['held_out']})" in message


def test_a_model_that_cannot_evict_is_named_before_training(tmp_path, finetune, capsys):
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=32,
        )
    )  # fmt: skip
    sliding.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((MODEL_PATH / name).read_bytes())
    content = values(tmp_path, model={"name": str(tmp_path / "model")})
    assert finetune([str(write(tmp_path / "r.yaml", content))]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for words in ("finetune: ", "mistral", "every layer has a sliding window of 32"):
        assert words in message
    assert not (tmp_path / "run").exists()
