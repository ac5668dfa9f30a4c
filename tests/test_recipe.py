"""Recipes: settings, YAML files, overrides."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from recipe_files import EVICTED, ROOT, values, write

from vkvtrain import EvictionConfig
from vkvtrain.training.overrides import apply_overrides, load_recipe, parse_command, resolve, setting_names
from vkvtrain.training.settings import Recipe, recipe_values

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
LAUNCH = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


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
