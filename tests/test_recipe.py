"""Recipes: settings, YAML files, overrides, the plan, and what the command says to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from vkvtrain import EvictionConfig
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.tiny.task import problem
from vkvtrain.training import models, overrides
from vkvtrain.training.data import Row
from vkvtrain.training.overrides import apply_overrides, load_recipe, parse_command, resolve, setting_names
from vkvtrain.training.plan import expected_evictions
from vkvtrain.training.settings import Recipe, recipe_values

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
LAUNCH = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
EVICTED = {"policy": "vase_attnv", "budget": 64, "window": 16}


def values(tmp_path, **sections):
    """The smallest recipe, with sections replaced."""
    return {
        "model": {"name": "tiny"},
        "data": {"source": "tiny:keyed_sum", "rows": 20, "held_out": 2},
        "eviction": EVICTED,
        "training": {"steps": 20, "global_batch": 4},
        "output": str(tmp_path / "run"),
        **sections,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert not recipe.output.is_absolute()
    assert Recipe(**recipe.model_dump()) == recipe


def test_there_are_shipped_recipes():
    assert {"vase.yaml", "dense.yaml"} <= {path.name for path in RECIPES}
    assert "cpu.yaml" in {path.name for path in LAUNCH}


def test_the_dense_control_differs_in_eviction_alone():
    vase, dense = (load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml").model_dump() for name in ("vase", "dense"))
    assert {name for name in vase if vase[name] != dense[name]} == {"eviction", "output"}
    assert dense["eviction"] is None


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_every_shipped_launch_configuration_is_one_that_accelerate_reads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert str(config.distributed_type).removeprefix("DistributedType.") != "MULTI_CPU"  # starts one process, silently


def test_a_recipe_takes_its_base_and_changes_what_is_written(tmp_path):
    write(tmp_path / "base" / "a.yaml", values(tmp_path, optim={"learning_rate": 1e-3, "warmup_steps": 3}))
    write(tmp_path / "base" / "b.yaml", {"base": "a.yaml", "optim": {"warmup_steps": 5}, "seed": 2})
    path = write(tmp_path / "c.yaml", {"base": "base/b.yaml", "training": {"steps": 7}, "eviction": None})
    recipe = load_recipe(path)
    assert (recipe.optim.learning_rate, recipe.optim.warmup_steps, recipe.seed) == (1e-3, 5, 2)
    assert (recipe.training.steps, recipe.training.global_batch) == (7, 4)
    assert recipe.eviction is None
    assert recipe.data == load_recipe(tmp_path / "base" / "a.yaml").data


def test_base_recipes_that_form_a_circle(tmp_path):
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    with pytest.raises(ValueError, match="form a circle"):
        recipe_values(tmp_path / "a.yaml")


def test_defaults_are_the_documented_ones(tmp_path):
    recipe = Recipe(model={"name": "x"}, data={"source": "y"}, training={"steps": 10}, output=tmp_path)
    assert recipe.eviction is None
    assert recipe.eviction_configs() == []
    assert recipe.trained_for() == EvictionConfig(policy="full")
    assert (recipe.training.objective, recipe.training.dense_fraction, recipe.training.global_batch) == ("sft", 0, 16)


def test_a_list_of_budgets_is_a_setting_for_each(tmp_path):
    recipe = Recipe(**values(tmp_path, eviction={**EVICTED, "budget": [96, 64]}))
    assert recipe.eviction_configs() == [EvictionConfig(**{**EVICTED, "budget": budget}) for budget in (96, 64)]
    assert recipe.trained_for().budget == 96
    dense = recipe.model_copy(update={"training": recipe.training.model_copy(update={"dense_fraction": 1.0})})
    assert dense.trained_for() == EvictionConfig(policy="full")
    assert Recipe(**values(tmp_path, eviction={"policy": "full"})).eviction_configs() == []


def test_a_recipe_is_frozen_and_survives_yaml(tmp_path):
    recipe = Recipe(**values(tmp_path, eviction={**EVICTED, "budget": [64, 80]}, optim={"betas": [0.8, 0.95]}))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    path = write(tmp_path / "again.yaml", recipe.model_dump(mode="json"))
    assert load_recipe(path) == recipe


def test_a_command_line_in_any_order():
    command = parse_command([
        "--budget", "[64, 80]", "r.yaml", "--dry-run", "--optim.learning_rate=1e-3", "--eviction.seed", "5",
        "--global-batch", "8", "--output=runs/a=b", "--target_modules", "[q_proj, v_proj]",
    ])  # fmt: skip
    assert command.recipe == Path("r.yaml")
    assert command.overrides == [
        ("eviction.budget", [64, 80]), ("optim.learning_rate", "1e-3"), ("eviction.seed", 5),
        ("training.global_batch", 8), ("output", "runs/a=b"), ("lora.target_modules", ["q_proj", "v_proj"]),
    ]  # fmt: skip
    assert (command.dry_run, command.overwrite, command.help) == (True, False, False)
    assert parse_command(["--overwrite", "r.yaml"]).overwrite
    assert parse_command(["-h"]).help
    assert parse_command(["--help"]).recipe is None


def test_values_on_the_command_line_mean_what_they_mean_in_the_file(tmp_path):
    path = write(tmp_path / "r.yaml", values(tmp_path))
    command = parse_command([
        str(path), "--learning_rate", "1e-3", "--init", "gaussian", "--max_length", "null", "--smooth", "false",
        "--betas", "[0.5, 0.6]", "--steps", "30", "--seed", "7", "--warmup_steps", "0", "--warmup-steps", "4",
    ])  # fmt: skip
    recipe = load_recipe(command.recipe, command.overrides)
    assert recipe.optim.learning_rate == 1e-3
    assert recipe.optim.betas == (0.5, 0.6)
    assert recipe.optim.warmup_steps == 4  # the last one wins
    assert recipe.lora.init == "gaussian"
    assert recipe.data.max_length is None
    assert recipe.eviction == {**EVICTED, "smooth": False}
    assert recipe.training.steps == 30
    assert recipe.training.global_batch == 4  # the rest of a section stays
    assert recipe.seed == 7  # the recipe's own; the policy's is --eviction.seed


def test_overrides_open_and_close_sections():
    before = {"eviction": None, "training": {"steps": 3}}
    assert apply_overrides(before, [("eviction.budget", 64)])["eviction"] == {"budget": 64}
    assert apply_overrides(before, [("optim.learning_rate", 1)])["optim"] == {"learning_rate": 1}
    assert apply_overrides({"eviction": EVICTED}, [("eviction", None)])["eviction"] is None
    assert apply_overrides(before, [("training.steps", 4)])["training"] == {"steps": 4}
    assert before == {"eviction": None, "training": {"steps": 3}}  # the values given are left alone


def test_every_setting_can_be_named_and_is_explained(finetune, capsys):
    names = setting_names()
    assert {"output", "seed", "eviction", "eviction.budget", "optim.learning_rate", "training.steps"} <= set(names)
    assert all(resolve(name, names) == name for name in names)
    assert finetune(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in names:
        if name not in ("model", "data", "lora", "training", "optim", "checkpoint", "log"):
            found = re.search(rf"^  --{re.escape(name)} \[(.*)\]\n      (.+)$", printed, re.MULTILINE)
            assert found, name
            assert found[2] != "None", name
    assert "accelerate launch" in printed
    assert re.search(r"--training.steps \[required\]", printed)
    assert re.search(r"--eviction.window \[64\]", printed)


def test_names_that_stand_for_nothing_or_for_several():
    known = ["seed", "a.size", "b.size", "b.depth", "a.seed"]
    assert resolve("depth", known) == "b.depth"
    assert resolve("seed", known) == "seed"  # written out in full, it is not ambiguous
    with pytest.raises(ValueError, match=r"--size could be --a.size or --b.size: write one of them"):
        resolve("size", known)
    with pytest.raises(ValueError, match=r"--detph: a recipe has no such setting \(did you mean 'depth'\?\)"):
        resolve("detph", known)
    with pytest.raises(ValueError, match=r"--zzz: a recipe has no such setting; see --help"):
        resolve("zzz", known)


@pytest.fixture
def refused(finetune, capsys, monkeypatch):
    """Run the command; it must refuse with status 2 and one sentence, which is returned, and load no model."""

    def no_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", no_model)

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


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    """Through the real command, with the shipped recipe and overrides."""
    command = [
        "recipes/finetune.py", "recipes/tiny/vase.yaml", "--dry-run", "--rows", "40", "--budget", "64", "--steps", "10",
        "--batch-per-device", "5", "--warmup-steps", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = {line[:17].strip(): line[17:] for line in done.stdout.splitlines()}
    assert plan["processes"] == "1 (asked for 1)"
    problems = [problem("train", 0, index) for index in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    lengths = [
        (len(tokenizer(one.prompt)["input_ids"]), len(tokenizer(one.response, add_special_tokens=False)["input_ids"]))
        for one in problems
    ]
    mean = sum(prompt + response + 1 for prompt, response in lengths) / 40
    assert plan["batch"] == (
        f"5 a forward pass x 4 accumulated x 1 processes = 16 sequences, about {16 * mean:,.0f} tokens a step"
    )
    assert plan["data"] == f"40 rows of {mean:.0f} tokens on average, 0 left out as too long, 4.00 epochs"
    found = re.fullmatch(r"([\d,]+) of ([\d,]+) parameters \(([\d.]+)%\)", plan["trainable"])
    trainable, total, share = (float(group.replace(",", "")) for group in found.groups())
    assert 0 < trainable < total
    assert share == pytest.approx(100 * trainable / total, abs=0.006)
    assert plan["objective"] == "sft, 10 steps, 20% of them dense"
    events = [naive_evictions(prompt, prompt + response, 64, 16) for prompt, response in lengths]
    assert plan["eviction"] == f"vase_attnv, budget 64, window 16: {sum(events) / 40:.1f} evictions a sample"
    assert plan["first sample"] == f"no loss  | <bos>{problems[0].prompt}"
    assert plan[""] == f"loss     | {problems[0].response}<eos>"
    assert plan["output"] == str(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def naive_evictions(prompt, seen, budget, window):
    """Events while a cache decodes a response token by token."""
    live, events = prompt, 0
    for _ in range(prompt, seen):
        live += 1
        if live > budget and live % window == 0:
            live, events = budget, events + 1
    return events


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 120)), min_size=1, max_size=4),
    st.integers(1, 12), st.integers(2, 5),
)  # fmt: skip
def test_expected_evictions_are_those_of_decoding(lengths, window, windows):
    """A response's last token is never given to the cache."""
    rows = [Row(0, [0] * (prompt + response), prompt) for prompt, response in lengths]
    budget = window * windows
    counts = [naive_evictions(prompt, prompt + response - 1, budget, window) for prompt, response in lengths]
    assert expected_evictions(rows, budget, window) == pytest.approx(sum(counts) / len(counts))


def test_the_plan_tells_a_dense_run_and_a_budget_that_nothing_reaches(tmp_path, finetune, capsys):
    path = write(tmp_path / "r.yaml", values(tmp_path, eviction={**EVICTED, "budget": [64, 4096]}))

    def plan(*arguments):
        assert finetune([str(path), "--dry-run", *arguments]) == 0
        return capsys.readouterr().out

    both = plan()
    assert re.search(r"budget 64, window 16: [1-9][\d.]* evictions a sample", both)
    assert "budget 4096, window 16: 0.0 evictions a sample" in both
    assert both.count("WARNING") == 1
    assert "WARNING          no row ever exceeds budget 4096" in both
    for arguments in (["--eviction", "null"], ["--dense_fraction", "1"], ["--eviction", "{policy: full}"]):
        dense = plan(*arguments)
        assert "eviction         none: this is a dense run" in dense
        assert "evictions a sample" not in dense
    assert not (tmp_path / "run").exists()


def test_rows_that_are_too_long_are_counted_in_the_plan(tmp_path, finetune, capsys):
    rows = [{"prompt": "a1?", "completion": "1" * length} for length in (5, 6, 30, 7, 40)]
    source = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    content = values(tmp_path, data={"source": str(source), "held_out": 0, "max_length": 20})
    assert finetune([str(write(tmp_path / "r.yaml", content)), "--dry-run"]) == 0
    assert "3 rows of 11 tokens on average, 2 left out as too long" in capsys.readouterr().out


def test_the_command_trains_and_refuses_to_overwrite(tmp_path, finetune, capsys):
    path = write(tmp_path / "r.yaml", values(tmp_path))
    short = ["--steps", "1", "--warmup_steps", "0", "--global_batch", "2"]
    assert finetune([str(path), *short]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "adapter written to" in capsys.readouterr().out
    assert finetune([str(path), *short]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"finetune: output '.*run' holds a finished run: choose another output, or pass --overwrite", message
    )
    assert finetune([str(path), *short, "--overwrite"]) == 0
