"""`vkvtrain quickstart` and the adapters that it answers with; threads of small models."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from vkvtrain import quickstart, threads
from vkvtrain.identity import adapter_hash
from vkvtrain.inspection.survival import survival
from vkvtrain.loading import load
from vkvtrain.tiny import ADAPTERS, MODEL_PATH, embedded
from vkvtrain.training.command import finetune

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "2", "--rows", "8", "--held_out", "2", "--global_batch", "2"]


@pytest.fixture(scope="module")
def ship():
    spec = importlib.util.spec_from_file_location("ship", ROOT / "recipes/tiny/ship.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the demo would leave, of two steps."""
    output = tmp_path_factory.mktemp("demo")
    for name, recipe in (("eviction_lora", "tiny"), ("dense_lora", "tiny/dense")):
        assert finetune([recipe, *SHORT, "--output", str(output / name)], "") == 0
    rows = [{"model": name, "adapter": adapter_hash(output / name)} for name in ADAPTERS]
    (output / "results.json").write_text(json.dumps([{"model": "base", "adapter": None}, *rows]))
    return output


@pytest.fixture(scope="module")
def shipped(trained, ship, tmp_path_factory):
    target = tmp_path_factory.mktemp("shipped")
    assert ship.main(ship.Settings(trained, target)) == 0
    return target


def test_shipped_adapters_are_those_that_were_measured_and_name_no_machine(shipped, trained):
    for name in ADAPTERS:
        weights = [directory / name / "adapter_model.safetensors" for directory in (shipped, trained)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        texts = [path.read_text() for path in (shipped / name).iterdir() if path.suffix != ".safetensors"]
        assert not any(str(part) in text for text in texts for part in (ROOT, trained))
        assert json.loads((shipped / name / "results.json").read_text())[0]["adapter"] == adapter_hash(shipped / name)
    assert sum(path.stat().st_size for path in shipped.rglob("*")) < 5e6


def test_results_of_other_weights_are_not_shipped(trained, ship, tmp_path, capsys):
    rows = json.loads((trained / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps([{**row, "adapter": "other"} for row in rows]))
    for name in ADAPTERS:
        (tmp_path / name).symlink_to(trained / name)
    assert ship.main(ship.Settings(tmp_path, tmp_path / "out")) == 2
    assert "was measured with another dense_lora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert ship.main(ship.Settings(tmp_path / "nothing", tmp_path / "out")) == 2


def test_the_table_and_the_answers(shipped):
    out = io.StringIO()
    arguments = quickstart.QuickstartArguments(problems=3, budgets=(64,), shown=1, adapters=shipped)
    cells = quickstart.run(arguments, Console(file=out, width=140))
    assert list(cells) == [(name, budget) for name in ("base", *ADAPTERS) for budget in (None, 64)]
    full, evicted = cells["base", None], cells["base", 64]
    assert all(answer.whole and answer.digit and answer.passcode for answer in full)  # as in the README's table
    assert all(answer.evictions == 0 for answer in full)
    assert all(answer.evictions > 0 for answer in evicted)
    for graded in cells.values():
        assert all(answer.digit and answer.passcode for answer in graded if answer.whole)
    text = out.getvalue()
    assert "one time in ten by chance" in text
    assert "100% [44%, 100%]" in text  # Wilson's interval of three right answers
    (prompt_shares,) = [text[text.index("share of the prompt held") :]]
    assert "-> 64" in prompt_shares


def test_what_is_said_to_be_evicted_is_what_decoding_evicts(shipped):
    config = quickstart.EvictionConfig(policy="vase_attnv", budget=64, window=16)
    model = quickstart.load_models(shipped)["eviction_lora"]
    tokenizer = quickstart.AutoTokenizer.from_pretrained(MODEL_PATH)
    posed = list(quickstart.problems("test", 0, 3))
    given = quickstart.answers(model, config, posed, tokenizer)
    for place, (problem, answer) in enumerate(zip(posed, given, strict=True)):
        (prompt,) = quickstart.encode(tokenizer, [problem.prompt])
        survived = survival(model, [*prompt, *answer.tokens[:-1]], config, len(prompt), (place, 0))
        assert len(survived.events) == answer.evictions
        assert all(held.sum() >= 4 for held in survived.held()[:, :, : len(prompt)].flatten(0, 1))  # the sinks


def test_settings_that_do_not_hold(tmp_path, shipped):
    with pytest.raises(ValueError, match=r"there is no adapter in .*dense_lora: train both"):
        quickstart.load_models(tmp_path)
    for wrong in ({"problems": 0}, {"shown": -1}, {"budgets": ()}, {"budgets": (60,)}):
        with pytest.raises(ValueError, match=r"problems|shown|budget"):
            quickstart.run(quickstart.QuickstartArguments(adapters=shipped, **wrong), Console(file=io.StringIO()))


def test_the_embedded_names(shipped):
    assert embedded("tiny") == str(MODEL_PATH)
    assert embedded("tiny/dense_lora").endswith("tiny/adapters/dense_lora")
    assert embedded("tiny/other") == "tiny/other"
    loaded = load(shipped / "eviction_lora")  # whose base model is called tiny
    assert loaded.eviction.budget == 64


def test_a_small_model_gets_one_thread_unless_the_environment_says_otherwise(monkeypatch):
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL_PATH))
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(MODEL_PATH)
        config.vocab_size = 2 * threads.SMALL // config.hidden_size
        large = AutoModelForCausalLM.from_config(config)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    try:
        assert threads.choose_threads(small) is None
        monkeypatch.setattr(threads, "launcher_arguments", lambda _: ["script.py"])
        monkeypatch.setattr(threads.psutil.Process, "environ", lambda _: {"OMP_NUM_THREADS": "2"})
        assert threads.choose_threads(small) is None
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(threads.psutil.Process, "environ", lambda _: {})  # so accelerate set it
        assert threads.choose_threads(large) is None
        assert "one thread" in threads.choose_threads(small)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert "one thread" in threads.choose_threads(small)
        assert threads.choose_threads(small) is None  # nothing to say any more
    finally:
        torch.set_num_threads(1)
