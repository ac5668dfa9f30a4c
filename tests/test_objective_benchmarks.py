"""The pieces of the scripts that compare objectives and measure the loss's memory, on numbers with known answers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from vkvtrain import EvictionConfig
from vkvtrain.training.overrides import load_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comparison():
    return script("objectives")


@pytest.fixture(scope="module")
def memory():
    return script("loss_memory")


def test_every_objective_is_a_recipe_of_its_own(comparison, tmp_path):
    settings = comparison.Settings(output=tmp_path)
    recipes = [
        load_recipe(comparison.RECIPE, comparison.overrides(settings, name, seed))
        for name in comparison.OBJECTIVES
        for seed in settings.seeds
    ]
    assert len({recipe.output for recipe in recipes}) == len(recipes) == 27
    for recipe in recipes:
        assert (recipe.training.steps, recipe.training.global_batch, recipe.data.rows) == (120, 8, 960)
    used = {(r.training.objective, r.training.divergence) for r in recipes if r.training.has_teacher}
    assert used == {
        ("distill", "forward_kl"), ("distill", "reverse_kl"), ("distill", "jsd"), ("on_policy", "reverse_kl"),
    }  # fmt: skip
    dense = [recipe for recipe in recipes if recipe.trained_for() == EvictionConfig(policy="full")]
    assert len(dense) == 3


def test_caches_are_settings(comparison):
    for fields in comparison.CACHES.values():
        EvictionConfig(**fields, window=comparison.WINDOW)


@pytest.fixture
def measured(comparison, tmp_path):
    """Cells of two objectives at three seeds and two problems: sft solves one of them, forward KL both with seed 2."""
    settings = comparison.Settings(output=tmp_path, problems=2)
    (tmp_path / "cells").mkdir()
    for name in ("sft", "forward KL"):
        for seed in settings.seeds:
            grades = [1, int(name != "sft" and seed == 2)]
            cell = {"objective": name, "seed": seed, "cache": "rkv 64", "about": comparison.about(settings)}
            cell |= {"exact_match": grades, "passcode": [0, 0]}
            (tmp_path / "cells" / f"{comparison.slug(name)}-{seed}.json").write_text(json.dumps(cell))
    return settings


def test_the_table_is_the_mean_and_the_range_over_seeds(comparison, measured):
    rows = {line.split(" | ")[0].strip("| "): line for line in comparison.table(measured, "exact_match")}
    assert "| 50 [50, 50] |" in rows["sft"]
    assert "| 67 [50, 100] |" in rows["forward KL"]
    assert rows["base"].count("| - ") == len(comparison.CACHES)
    (difference,) = [line for line in comparison.differences(measured) if line.startswith("| forward KL")]
    assert "+17 [" in difference  # problem means are 1 and 1/3 against 1 and 0


def test_seeds_that_are_missing_are_said(comparison, measured):
    (measured.output / "cells" / "sft-1.json").unlink()
    assert any("| 50 [50, 50] (2 seeds) |" in line for line in comparison.table(measured, "exact_match"))


def test_cells_of_other_settings_are_not_mixed_in(comparison, measured):
    measured.steps = 7
    with pytest.raises(SystemExit, match="measured with other settings"):
        comparison.cells(measured)


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_both_sides_of_the_memory_benchmark_compute_the_same(memory, objective, monkeypatch):
    monkeypatch.setattr("vkvtrain.training.head.CHUNK_LOGITS", 7 * 500)
    settings = memory.Settings(vocabulary=500, hidden=16)
    plain, chunked = (memory.measure_one(settings, side, objective, 40) for side in ("plain", "chunked"))
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert chunked["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)


def test_the_line_through_points(memory):
    assert memory.line_through([(1, 5), (2, 7), (3, 9)], 10) == pytest.approx(23)
