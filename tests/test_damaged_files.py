"""Damaged, missing and foreign files: one sentence that names the setting, status 2, before weights are loaded."""

import json
import shutil

import pytest
import yaml
from recipe_files import values
from safetensors.torch import load_file, save_file
from sweeps import GRID, adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig
from vkvtrain.cli import main
from vkvtrain.loading import load_weights
from vkvtrain.tiny import MODEL_PATH

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def cut(count):
    return lambda content: content[:count]


def with_setting(name, value):
    return lambda content: json.dumps(json.loads(content) | {name: value}).encode()


DAMAGES = {
    "header cut": (WEIGHTS, cut(100)),
    "weights cut": (WEIGHTS, cut(-7)),
    "empty": (WEIGHTS, cut(0)),
    "no JSON": (CONFIG, cut(20)),
    "a list": (CONFIG, lambda _: b"[1]"),
    "no adapter": (CONFIG, lambda _: b"{}"),
    "unknown kind": (CONFIG, with_setting("peft_type", "NOPE")),
    "rank is text": (CONFIG, with_setting("r", "x")),
    "negative rank": (CONFIG, with_setting("r", -3)),
    "another rank": (CONFIG, with_setting("r", 2)),
    "targets are a number": (CONFIG, with_setting("target_modules", 3)),
    "more targets than weights": (CONFIG, with_setting("target_modules", ["q_proj", "v_proj"])),
    "targets that are not there": (CONFIG, with_setting("target_modules", ["c_attn"])),
}


@pytest.fixture
def damaged(tmp_path):
    """A finished run whose adapter is damaged."""

    def call(kind):
        part, damage = DAMAGES[kind]
        directory = tmp_path / "run"
        adapter(directory)
        EvictionConfig(budget=48, window=16).save_pretrained(directory)
        AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(directory)
        (directory / "recipe.yaml").write_text(yaml.safe_dump(values(tmp_path)))
        (directory / part).write_bytes(damage((directory / part).read_bytes()))
        return directory

    return call


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one sentence of a command that loads no weights."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))

    def call(*arguments):
        assert main([str(part) for part in arguments]) == 2
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("vkvtrain ")][-1]

    return call


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_adapter_is_named_by_every_command(tmp_path, damaged, refused, kind):
    run = damaged(kind)
    sweep = {**GRID, "adapters": {"ours": str(run)}, "output": str(tmp_path / "sweep")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    place = tmp_path / "out"
    for setting, command in (
        ("adapters.ours", ["ablate", tmp_path / "sweep.yaml"]),
        ("--peft", ["inspect", "--peft", run, "--output", place]),
        ("adapter", ["publish", run, "--merge", "--not-evaluated", "--to", place]),
        ("adapter", ["chat", run]),
    ):
        assert f"{setting} {str(run)!r}" in refused(*command), command
    assert not place.exists()
    assert not (tmp_path / "sweep").exists()


def damage_base(place, part, damage):
    shutil.copytree(MODEL_PATH, place)
    path = place / part
    path.write_bytes(damage(path.read_bytes()))
    return place


@pytest.mark.parametrize(
    ("part", "damage", "says"),
    [
        ("model.safetensors", cut(-9), "Error while deserializing header"),
        ("model.safetensors", cut(3), "header too small"),
        ("config.json", cut(30), "not a valid JSON"),
        ("config.json", with_setting("model_type", "nothing"), "nothing"),
        ("config.json", with_setting("hidden_size", "big"), "hidden_size"),
        ("tokenizer.json", cut(-30), "no tokenizer that can be read"),
        ("tokenizer.json", lambda _: b"{}", "no tokenizer that can be read"),
    ],
)
def test_a_damaged_base_is_one_sentence(tmp_path, capsys, part, damage, says):
    base = damage_base(tmp_path / "base", part, damage)
    (tmp_path / "text").write_text("abc" * 20)
    assert main(["inspect", "--model", str(base), "--text", str(tmp_path / "text"), "--output", str(tmp_path)]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vkvtrain")][-1]
    assert line.startswith(f"vkvtrain inspect: --model {str(base)!r} cannot be loaded: ")
    assert says in line


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(tmp_path):
    shutil.copytree(MODEL_PATH, tmp_path / "base")
    weights = load_file(MODEL_PATH / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    for changed in ({k: v for k, v in weights.items() if k != name}, weights | {name: weights[name][:-1].contiguous()}):
        save_file(changed, tmp_path / "base/model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"1 of its weights are missing or do not fit.*{name}"):
            load_weights(str(tmp_path / "base"), "--model")


@pytest.mark.parametrize("place", ["/proc/nothing/x", "{tmp}/file/x", "{tmp}"])
@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--model-config", "qwen3-0.6b", "--output"],
        ["data", "generate", "--model", "tiny", "--source", "tiny:keyed_sum", "--rows", "1", "--output"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, refused, place, command):
    (tmp_path / "file").write_text("kept")
    said = refused(*command, place.format(tmp=tmp_path))
    assert "--output" in said
    assert "cannot be written" in said or "is a directory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["/proc/nothing/x", "{tmp}/file/x", "{tmp}/file"])
def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path, refused, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(GRID))
    place = place.format(tmp=tmp_path)
    assert f"--output {place!r} cannot be written" in refused("inspect", "--output", place)
    assert f"output {place!r} cannot be written" in refused("ablate", tmp_path / "sweep.yaml", "--output", place)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"device": "gpu9"}, "device 'gpu9' is none"),
        ({"model_args": {"dtype": "bflaot16"}}, "did you mean 'bfloat16'"),
        ({"window": -1}, "window"),
    ],
)
def test_a_sweep_is_checked_before_the_first_cell(tmp_path, refused, setting, says):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GRID, "output": str(tmp_path / "out"), **setting}))
    assert says in refused("ablate", tmp_path / "sweep.yaml")
