"""Sweeps: the grid, what is refused before anything runs, and the identity of cells."""

import itertools
import os
import re
import shutil

import pytest
import torch
from passes import tiny_model
from sweeps import ROOT, adapter, sweep

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.ablation.grid import load_sweep, without_repeats
from vkvtrain.ablation.plan import make_plan, what_changed
from vkvtrain.ablation.tasks import fingerprint
from vkvtrain.policies import POLICIES
from vkvtrain.tiny import MODEL_PATH


def names(cells):
    return {(cell.model, cell.label, cell.config.budget, cell.seed) for cell in cells}


def test_every_shipped_sweep_parses():
    files = list((ROOT / "eval/sweeps").glob("*.yaml"))
    assert files
    for file in files:
        assert list(load_sweep(file).cells())


def test_vases_ablation_is_a_sweep():
    """Every measure with every retention, each under a name of its own; what draws nothing runs once for all seeds."""
    sweep = load_sweep(ROOT / "eval/sweeps/vase.yaml")
    protecting = [entry for entry in sweep.policies if entry.policy == "vase_attnv"]
    combinations = {(entry.measure, entry.retention) for entry in protecting}
    assert combinations == set(itertools.product(["range", "variance", "l2", "random"], [None, "top_k"]))
    labels = [entry.label for entry in sweep.policies]
    assert len(set(labels)) == len(labels) == 10
    assert {"vase_attnv", "vase_attnv (by l2, top_k)", "vase_attnv (top_k)", "snapkv (sampled)"} <= set(labels)
    cells = without_repeats(list(sweep.cells()), {"tiny_keyed_sum": False})
    once = {cell.label for cell in cells if cell.seed is None}
    assert {"vase_attnv (top_k)", "vase_attnv (by l2, top_k)", "snapkv"} <= once
    assert not {"vase_attnv", "vase_attnv (by random, top_k)", "snapkv (sampled)"} & once


def test_controls_are_part_of_the_grid(tmp_path):
    adapters = {"ours": "a", "dense": "b"}
    cells = list(sweep(adapters=adapters, budgets=64, policies=["vase_attnv"]).cells())
    assert names(cells) == {
        *((model, "full", None, 0) for model in ("base", "ours", "dense")),
        *((model, "vase_attnv", 64, 0) for model in ("base", "ours", "dense")),
        ("base", "random + prompt", 64, 0),
    }
    assert [cell.model for cell in cells if not cell.control] == ["ours"]
    bare = sweep(adapters=adapters, budgets=64, policies=["vase_attnv"], controls=False)
    assert names(bare.cells()) == {("ours", "vase_attnv", 64, 0), ("dense", "vase_attnv", 64, 0)}
    assert sweep(adapters={"ours": "a"}).misses_dense_control
    assert not sweep(adapters=adapters).misses_dense_control
    assert not sweep().misses_dense_control


def test_a_policy_keeps_its_protections_and_shows_them():
    entry = {"policy": "random", "protect_prompt": True, "sinks": 0, "protected_fraction": 0.1}
    (cell, *_) = [c for c in sweep(policies=[entry], budgets=64).cells() if c.label.startswith("random + prompt (")]
    assert cell.label == "random + prompt (protected=0.1, sinks=0)"
    assert (cell.config.protect_prompt, cell.config.sinks, cell.config.protected_fraction) == (True, 0, 0.1)
    rkv = next(iter(sweep(policies=[{"policy": "rkv", "policy_args": {"lam": 0.3}}], controls=False).cells()))
    assert rkv.label == "rkv (lam=0.3)"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_a_seed_matters_exactly_where_it_is_said_to(name):
    model = tiny_model(vocab=40)
    ids = torch.randint(1, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    kept = []
    for seed in (0, 1):
        config = EvictionConfig(policy=name, budget=24, window=8, sinks=2, seed=seed)
        with torch.no_grad(), simulated_eviction(model, config, [9]) as trace:
            model(input_ids=ids, use_cache=False)
        kept.append(torch.stack([trace.evict_at[layer] for layer in sorted(trace.evict_at)]))
    assert config.draws != torch.equal(*kept)


def test_what_draws_nothing_runs_once_for_all_seeds():
    grid = sweep(seeds=[3, 5], budgets=64, controls=False)
    assert names(without_repeats(list(grid.cells()), {"tiny_keyed_sum": False})) == {
        ("base", "vase_attnv", 64, 3), ("base", "vase_attnv", 64, 5), ("base", "snapkv", 64, None),
    }  # fmt: skip
    assert len(without_repeats(list(grid.cells()), {"tiny_keyed_sum": True})) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"polices": ["snapkv"]}, "unknown setting 'polices' (did you mean 'policies'?)"),
        ({"policies": [{"policy": "random", "protect_promt": True}]}, "did you mean 'protect_prompt'"),
        ({"policies": ["vase_atnv"]}, "did you mean 'vase_attnv'"),
        ({"policies": ["full"]}, "'full' alone is no ablation"),
        ({"policies": ["snapkv", "snapkv"]}, "'snapkv' is there twice"),
        ({"budgets": [64, 70]}, "policy 'vase_attnv' at budget 70: budget (70) must be a multiple of window (16)"),
        ({"budgets": []}, "budgets"),
        ({"adapters": {"base": "x"}}, "'base' is the untrained model"),
        ({"adapters": {"x": {"pef": "y"}}}, "did you mean 'peft'"),
        ({"adapters": {"x": {"peft": "y", "pretrained": "z"}}}, "either peft"),
        ({"model_args": {"budget": 64}}, "model_args: budget is a setting of the sweep itself"),
        ({"tasks": [{"task": "a", "limits": 3}]}, "did you mean 'limit'"),
        ({"tasks": ["a", {"task": "a", "limit": 3}]}, "same task"),
        ({"retries": -1}, "retries"),
    ],
)
def test_bad_sweeps_are_one_sentence(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        sweep(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["tiny_keyed_sun"], "include_path": "no/where"}, "include_path: there is no directory 'no/where'"),
        ({"model": "no/where/at/all"}, "model: 'no/where/at/all' cannot be loaded"),
        ({"adapters": {"x": "runs/no/adapter"}}, "adapters.x: there is no directory 'runs/no/adapter'"),
        ({"policies": [{"policy": "snapkv", "skip_layers": [9]}]}, "skip_layers names layer 9"),
        ({"tasks": [{"task": "tiny_keyed_sum", "metric": "accuracy"}]}, "needs metric: one of exact_match"),
        ({"tasks": [{"task": "tiny_keyed_sum", "filter": "x"}]}, "needs filter: one of none"),
        ({"tasks": [{"task": "tiny_keyed_sum", "metadata": {"data": "no.jsonl"}}]}, "there is no file 'no.jsonl'"),
    ],
)
def test_models_and_tasks_are_checked_before_anything_runs(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        make_plan(sweep(**changes))
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_weights_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        make_plan(sweep(adapters={"x": str(tmp_path)}))


def identities(**changes):
    return {planned.cell.name: planned.id for planned in make_plan(sweep(**changes)).cells}


def test_a_changed_setting_makes_a_new_cell_and_speed_does_not(tmp_path):
    base = {"adapters": {"x": adapter(tmp_path / "x")}, "budgets": [64], "policies": ["snapkv"]}
    before = identities(**base)
    assert len(set(before.values())) == len(before)
    assert identities(**base, batch_size=7, parallel_cells=2, processes=3, retries=9, output="else") == before
    moved = {**base, "adapters": {"x": adapter(tmp_path / "moved")}}
    assert identities(**moved) == before  # what counts is what is in the files
    for change in (
        {"limit": 5}, {"sinks": 3}, {"model_args": {"dtype": "bfloat16"}}, {"apply_chat_template": True},
        {"tasks": [{"task": "tiny_keyed_sum", "gen_kwargs": {"max_gen_toks": 99}}]},
        {"tasks": [{"task": "tiny_keyed_sum", "metadata": {"data_seed": 1}}]},
    ):  # fmt: skip
        after = identities(**base, **change)
        changed = {name for name, value in after.items() if before[name] != value}
        assert changed == (set(after) if "sinks" not in change else {n for n in after if "full" not in n} | changed), (
            change
        )
    after = identities(**{**base, "adapters": {"x": adapter(tmp_path / "x", weight=1.0)}})
    assert {name for name, value in after.items() if before[name] != value} == {n for n in before if ": x," in n}


def test_what_lies_behind_a_name_makes_another_cell(tmp_path):
    """A base model or a file of its tokenizer that was overwritten, a helper of a task, a file of its problems."""
    base = tmp_path / "base"
    shutil.copytree(MODEL_PATH, base)
    tasks = tmp_path / "tasks"
    shutil.copytree(ROOT / "eval/tasks", tasks)
    problems = tmp_path / "problems"
    problems.mkdir()
    (problems / "test.jsonl").write_text('{"question": "1"}')
    text = (tasks / "tiny/keyed_sum.yaml").read_text()
    (tasks / "tiny/keyed_sum.yaml").write_text(f"{text}\ndataset_kwargs:\n  data_files: {problems}/*.jsonl\n")
    settings = {"model": str(base), "include_path": str(tasks), "budgets": [64], "policies": ["snapkv"]}
    (base / "tokenizer.model").write_bytes(b"pieces")
    seen = [identities(**settings)]
    for path, content in (
        (base / "model.safetensors", (base / "model.safetensors").read_bytes()[:-1] + b"\x11"),
        (base / "tokenizer.model", b"others"),
        (base / "modeling_code.py", b"pass"),
        (tasks / "tiny/helper.py", b"x = 1"),
        (problems / "test.jsonl", b'{"question": "2"}'),
        (problems / "more.jsonl", b'{"question": "2"}'),
    ):
        path.write_bytes(content)
        seen.append(identities(**settings))
    for name in seen[0]:
        assert len({identity[name] for identity in seen}) == len(seen), name
    (base / "README.md").write_text("other words")
    assert identities(**settings) == seen[-1]


def test_what_changes_while_a_sweep_runs_is_noticed(tmp_path):
    """The plan has identified what was there when it began; a cell that has run later must be of the same."""
    base, tasks, own = tmp_path / "base", tmp_path / "tasks", adapter(tmp_path / "x")
    shutil.copytree(MODEL_PATH, base)
    shutil.copytree(ROOT / "eval/tasks", tasks)
    given = sweep(model=str(base), include_path=str(tasks), adapters={"x": own}, budgets=[64], policies=["snapkv"])
    cells = {planned.cell.model: planned for planned in make_plan(given).cells}
    assert [what_changed(planned, given) for planned in cells.values()] == [None, None]
    adapter(tmp_path / "x", weight=2.0)
    assert what_changed(cells["x"], given) == "the files of model x"
    assert what_changed(cells["base"], given) is None
    (tasks / "tiny/keyed_sum.py").write_text((tasks / "tiny/keyed_sum.py").read_text() + "\n")
    assert what_changed(cells["base"], given) == "the task tiny_keyed_sum, or its data,"
    os.utime(base / "model.safetensors")
    assert what_changed(cells["base"], given) == "the files of model base"


def test_a_task_is_known_by_its_functions_source_and_not_by_its_place(tmp_path):
    prints = []
    for place, source in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "grade.py").write_text(source)
        prints.append(fingerprint({"task": "t", "process_results": str(tmp_path / place / "grade.best")}))
    assert prints[0] == prints[1] != prints[2]
