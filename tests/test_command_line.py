"""The console command: what loads, where names lead, what a launch would run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import vkvtrain
import vkvtrain_cli
from vkvtrain.ablation.grid import load_sweep
from vkvtrain.ablation.tasks import find_tasks
from vkvtrain.cli import with_tasks
from vkvtrain.recipes import copy, main, planned_memory
from vkvtrain.shipped import find_recipe, find_sweep, recipes
from vkvtrain.training import command
from vkvtrain.training.overrides import load_recipe, parse_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("-h", 0), ("--version", 0), ("trian", 2)])
def test_nothing_heavy_is_imported_before_a_command_is_known(argument, status):
    code = (
        "import sys, vkvtrain_cli; status = vkvtrain_cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'vkvtrain'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("did you mean train?" in done.stderr) is (argument == "trian")
    if argument == "--version":
        assert done.stdout.strip() == vkvtrain.__version__


def test_every_command_is_in_the_help_and_has_its_own(capsys):
    vkvtrain_cli.main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  " and line[2:3] != " "]
    assert listed == list(vkvtrain_cli.COMMANDS)


@pytest.mark.parametrize("first", ["import vkvtrain, transformers", "import transformers, vkvtrain"])
def test_importing_the_package_registers_the_attention_implementation(first):
    code = (
        f"{first}\nfrom vkvtrain.tiny import MODEL_PATH\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation='vkvtrain')\n"
        "assert model.config._attn_implementation == 'vkvtrain'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recipe_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("qwen3-0.6b") == ROOT / "recipes/qwen3-0.6b/vase.yaml"
    assert find_recipe("tiny/dense") == ROOT / "recipes/tiny/dense.yaml"
    assert find_recipe("tiny/vase") == find_recipe("tiny")
    assert find_sweep("quickstart") == ROOT / "eval/sweeps/quickstart.yaml"
    (tmp_path / "tiny").write_text("own: 1")  # a file of one's own goes first
    assert find_recipe("tiny") == Path("tiny")
    with pytest.raises(ValueError, match=r"no recipe 'qwen3-0.6': .*did you mean 'qwen3-0.6b'"):
        find_recipe("qwen3-0.6")
    with pytest.raises(ValueError, match=r"no sweep 'quick': .*"):
        find_sweep("quick")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_two_steps_can_be_asked_of_every_recipe(name):
    recipe = load_recipe(find_recipe(name), [("training.steps", 2)])
    assert recipe.training.steps == 2
    assert recipe.optim.warmup_steps <= 2
    full = load_recipe(find_recipe(name))
    shortened = full.optim.warmup_steps > 2
    assert any("warmup_steps is 2 instead of" in note for note in recipe.notes) is shortened
    assert not full.notes


def test_what_the_command_line_sets_itself_is_not_shortened():
    with pytest.raises(ValueError, match=r"optim.warmup_steps \(20\) is more than training.steps \(2\)"):
        load_recipe(find_recipe("tiny"), [("training.steps", 2), ("optim.warmup_steps", 20)])


def test_another_source_is_not_read_by_the_parts_of_the_old_one():
    command = parse_command(["qwen3-0.6b", "--data.source", "traces.jsonl"])
    recipe = load_recipe(command.recipe, command.overrides)
    assert (recipe.data.source, recipe.data.config, recipe.data.rows) == ("traces.jsonl", None, None)
    assert recipe.data.max_length == 16384
    assert len(recipe.notes) == 2
    kept = load_recipe(command.recipe, [*command.overrides, ("data.rows", 5)])
    assert kept.data.rows == 5
    hub = load_recipe(command.recipe, [("data.source", "org/name"), ("data.config", "main")])
    assert (hub.data.config, hub.data.rows) == ("main", None)
    assert load_recipe(find_recipe("tiny"), [("data.source", "tiny:keyed_sum")]).data.rows == 20000


def test_a_copied_recipe_works_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in recipes():
        main(["copy", name])
        (written, *_) = copy(name, Path())  # the same again changes nothing
        assert load_recipe(written) == load_recipe(find_recipe(name))
    assert "now: vkvtrain train qwen3-0.6b.yaml" in capsys.readouterr().out
    Path("defaults.yaml").write_text("model: {name: other}")
    with pytest.raises(ValueError, match=r"defaults.yaml is there already and differs"):
        copy("qwen3-0.6b", Path())
    copy("qwen3-0.6b", tmp_path / "more")
    with pytest.raises(ValueError, match="no recipe 'nothing'"):
        main(["copy", "nothing"])
    with pytest.raises(ValueError, match="say what to do"):
        main(["copy"])


def test_the_list_says_what_was_planned_and_measured(capsys):
    main([])
    out = capsys.readouterr().out
    assert all(name in out for name in recipes())
    assert planned_memory(load_recipe(find_recipe("qwen3-0.6b"))) == pytest.approx(5.5, abs=0.05)  # as its header says
    assert planned_memory(load_recipe(find_recipe("smollm2"))) is None
    assert "make demo" in out


def launched(monkeypatch, arguments):
    started = []
    monkeypatch.setattr(command.os, "execv", lambda program, given: started.append((program, given)))
    command.main(arguments)
    ((program, given),) = started
    assert program == given[0] == sys.executable
    return given[1:]


def test_processes_are_launched_by_accelerate(monkeypatch, capsys, tmp_path):
    base = ["-m", "accelerate.commands.launch", "--config_file"]
    script = str(ROOT / "recipes/finetune.py")
    configs = ROOT / "accelerate_configs"
    given = launched(monkeypatch, ["tiny", "--gpus", "8", "--steps", "3"])
    assert given == [
        *base, str(configs / "multi_gpu.yaml"), "--num_processes", "8", script, "tiny", "--steps", "3",
    ]  # fmt: skip
    assert "$ " in (shown := capsys.readouterr().out)
    assert "--num_processes 8" in shown
    assert launched(monkeypatch, ["--gpus=1", "tiny"])[3:] == [
        str(configs / "single_gpu.yaml"), "--num_processes", "1", script, "tiny",
    ]  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"num_processes": 2}))
    assert launched(monkeypatch, ["tiny", "--config-file", str(tmp_path / "own.yaml")])[3] == str(tmp_path / "own.yaml")
    several = launched(monkeypatch, [
        "tiny", "--config_file", "fsdp2", "--gpus", "8", "--nodes", "2", "--node_rank", "1", "--main_address", "a:5",
    ])  # fmt: skip
    assert several[3:] == [
        str(configs / "fsdp2.yaml"), "--num_processes", "16", "--num_machines", "2", "--machine_rank", "1",
        "--main_process_ip", "a", "--main_process_port", "5", script, "tiny",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny", "--gpus", "0"], "--gpus must be a whole number, at least 1"),
        (["tiny", "--gpus", "many"], "--gpus must be a whole number"),
        (["tiny", "--gpus"], "--gpus needs a value"),
        (["tiny", "--gpus", "8", "--nodes", "2"], "--nodes 2 needs --node_rank"),
        (["tiny", "--gpus", "8", "--nodes", "2", "--node_rank", "2", "--main_address", "a"], "from 0 to 1"),
        (["tiny", "--node_rank", "0"], "for several machines"),
        (["tiny", "--config_file", "fspd2"], "did you mean 'fsdp2'"),
        (["tiny", "--gpus", "2", "--budgets", "3"], "a recipe has no such setting"),
        (["tiny", "--gpus", "2", "--steps", "0"], "steps"),
        (["tinny", "--gpus", "2"], "did you mean 'tiny'"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_before_it(monkeypatch, arguments, says):
    monkeypatch.setattr(command.os, "execv", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=says):
        command.main(arguments)


def test_training_in_this_process_has_the_statuses_of_the_script(tmp_path, capsys):
    assert vkvtrain_cli.main(["train"]) == 2
    assert "give exactly one recipe" in capsys.readouterr().err
    run = ["train", "tiny", "--steps", "2", "--rows", "8", "--held_out", "2", "--global_batch", "2"]
    assert vkvtrain_cli.main([*run, "--output", str(tmp_path / "run")]) == 0
    assert "note             optim.warmup_steps is 2 instead of 20" in capsys.readouterr().out
    assert (tmp_path / "run/adapter_model.safetensors").exists()
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["optim"]["warmup_steps"] == 2
    assert vkvtrain_cli.main([*run, "--output", str(tmp_path / "run")]) == 2
    assert "vkvtrain train: output" in capsys.readouterr().err
    assert vkvtrain_cli.main(["train", "--help"]) == 0
    assert "--optim.learning_rate" in capsys.readouterr().out


def test_the_shipped_tasks_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "eval/tasks")
    run = ["run", "--model", "vkv", "--tasks", "vkv_aime25"]
    assert with_tasks(run) == [*run, "--include_path", shipped]
    assert with_tasks(["ls", "tasks"]) == ["ls", "tasks", "--include_path", shipped]
    assert with_tasks([*run, "--include_path=eval/tasks"]) == [*run, "--include_path", shipped]
    assert with_tasks([*run, "--include_path", "own"]) == [*run, "--include_path", "own"]
    for unchanged in ([], ["run"], ["run", "--help"]):
        assert with_tasks(unchanged) == unchanged
    (tmp_path / "c.yaml").write_text("include_path: mine\n")
    assert with_tasks(["run", "-C", "c.yaml"]) == ["run", "--config", "c.yaml", "--include_path", "mine"]
    (tmp_path / "c.yaml").write_text("tasks: vkv_aime25\n")
    assert with_tasks(["run", "--config=c.yaml"])[-1] == shipped
    (tmp_path / "eval/tasks").mkdir(parents=True)  # one's own goes first
    assert with_tasks(run)[-1] == "eval/tasks"


def test_a_shipped_sweep_names_its_tasks_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(find_sweep("quickstart"))
    assert sweep.include_path == str(ROOT / "eval/tasks")
    assert set(find_tasks(sweep)) == {"tiny_keyed_sum"}
    with pytest.raises(ValueError, match="no directory 'no/where'"):
        find_tasks(load_sweep(find_sweep("quickstart"), {"include_path": "no/where"}))
