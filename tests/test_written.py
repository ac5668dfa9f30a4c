"""What is written equals what was trained: published weights against the model that training left in memory."""

import shutil

import pytest
import torch
from short_runs import short_recipe
from transformers import AutoModelForCausalLM, GenerationConfig

import vkvtrain
from vkvtrain.adapters import read_adapter
from vkvtrain.cli import main
from vkvtrain.publishing import export
from vkvtrain.publishing.measured import Evaluation, MeasuredRow
from vkvtrain.publishing.probe import Probe, check_written
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import models
from vkvtrain.training.loop import train

IDS = torch.arange(1, 33)[None] % 37


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train two steps from a recipe's sections; (run directory, the model in memory)."""

    def call(name="run", **sections):
        kept = []
        inner = models.load_model
        monkeypatch.setattr("vkvtrain.training.loop.load_model", lambda recipe: kept.append(inner(recipe)) or kept[0])
        defaults = {
            "data": {"source": "tiny:keyed_sum", "rows": 8},
            "eviction": {"policy": "vase_attnv", "budget": 64, "window": 16},
            "training": {"steps": 2, "global_batch": 2},
            "optim": {"learning_rate": 3e-2},
        }
        settings = short_recipe(tmp_path / name, defaults, sections)
        train(settings)
        return settings.output, kept[0]

    return call


def publish(run, to, *arguments, status=0):
    command = ["publish", run, "--to", to, "--not-evaluated", "--license", "mit", *arguments]
    assert main([str(part) for part in command]) == status


KINDS = {
    "tied head": {"target_modules": ["q_proj", "lm_head"]},
    "tied embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both of the tied layers": {"target_modules": ["lm_head", "embed_tokens"]},
    "tied head, DoRA": {"target_modules": ["lm_head"], "dora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pattern": {"target_modules": r".*layers\.0\..*_proj"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_trained_model(tmp_path, trained, kind):
    run, model = trained(lora={"r": 4, "alpha": 8, **KINDS[kind]})
    publish(run, tmp_path / "merged", "--merge")
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(MODEL_PATH))).abs().max() > 0.05
    for written in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        vkvtrain.load(tmp_path / "merged").model,
    ):
        torch.testing.assert_close(logits(written), logits(model), rtol=1e-4, atol=1e-4)
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings
    assert tied == ("tied" not in kind and kind not in ("saved head", "saved embedding"))


@pytest.mark.parametrize("kind", ["tied head", "saved embedding", "pissa"])
def test_a_published_adapter_is_the_trained_model(tmp_path, trained, kind, monkeypatch):
    """Also where the base was given by a relative path, from another directory, and trained on from an adapter."""
    shutil.copytree(MODEL_PATH, tmp_path / "acme/tiny")
    monkeypatch.chdir(tmp_path)
    first, _ = trained("first", model={"name": "acme/tiny"}, lora={"r": 4, "alpha": 8, **KINDS[kind]})
    run, model = trained("second", model={"name": "acme/tiny"}, lora={"continue_from": str(first)})
    publish(run, tmp_path / "out", "--base-name", "acme/tiny")
    torch.testing.assert_close(logits(vkvtrain.load("out").model), logits(model), rtol=1e-4, atol=1e-4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(vkvtrain.load(run).model), logits(model), rtol=1e-4, atol=1e-4)


def test_a_base_given_by_a_relative_path_is_not_published_under_that_name(tmp_path, trained, monkeypatch, capsys):
    shutil.copytree(MODEL_PATH, tmp_path / "acme/tiny")
    monkeypatch.chdir(tmp_path)
    run, _ = trained(model={"name": "acme/tiny"})
    for place in (tmp_path, tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        capsys.readouterr()
        publish(run, tmp_path / "out", status=2)
        assert "was loaded from the directory" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_base_that_the_hub_does_not_have_is_refused(tmp_path, trained, monkeypatch, capsys):
    """A run whose recipe and adapter say a name that is on no Hub: the directory that it was is gone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, _ = trained()
    for name in ("recipe.yaml", "adapter_config.json"):
        path = run / name
        path.write_text(path.read_text().replace(str(MODEL_PATH), "acme/gone").replace("name: tiny", "name: acme/gone"))
    publish(run, tmp_path / "out", status=2)
    assert "base model 'acme/gone' is not to be had from the Hub" in capsys.readouterr().err


def test_the_adapter_names_the_revision_that_it_was_trained_on(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    lora = short_recipe(
        tmp_path, {"data": {"source": "x"}, "training": {"steps": 1}, "optim": {"warmup_steps": 0}}
    ).lora
    adapted = models.get_peft_model(base, models.lora_config(lora), revision="abc")
    adapted.save_pretrained(tmp_path)
    assert read_adapter(tmp_path, "x").config.revision == "abc"


def test_bfloat16_weights_are_merged_within_rounding(tmp_path, trained):
    run, model = trained(model={"dtype": "bfloat16"}, lora={"r": 4, "alpha": 8, **KINDS["tied head"]})
    publish(run, tmp_path / "merged", "--merge")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert written.dtype == torch.bfloat16
    off = (logits(written) - logits(model)).square().mean().sqrt() / logits(model).std()
    assert off < 0.05


def test_an_update_that_rounding_loses_is_not_merged(tmp_path, trained, capsys):
    run, _ = trained(model={"dtype": "bfloat16"}, optim={"learning_rate": 1e-6})
    publish(run, tmp_path / "merged", "--merge", status=2)
    assert "rounding to bfloat16 changes the logits by" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    publish(run, tmp_path / "adapter", "--base-name", "acme/tiny")


def test_a_wrong_merge_is_found_before_anything_is_published(tmp_path, trained, monkeypatch, capsys):
    run, _ = trained(lora={"r": 4, "alpha": 8, **KINDS["tied head"]})
    monkeypatch.setattr(export, "merged", lambda adapted: adapted.merge_and_unload())
    publish(run, tmp_path / "merged", "--merge", status=2)
    assert "the written model is not the trained one: its logits are 0." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_generation_config_is_kept(tmp_path, trained):
    run, _ = trained()
    publish(run, tmp_path / "merged", "--merge")
    ours, base = (GenerationConfig.from_pretrained(place) for place in (tmp_path / "merged", MODEL_PATH))
    assert ours.to_diff_dict() | {"transformers_version": ""} == base.to_diff_dict() | {"transformers_version": ""}


def test_the_check_of_written_logits():
    torch.manual_seed(0)
    trained, noise = torch.randn(64, 50), torch.randn(64, 50)
    probe = Probe(trained, trained + 0.2 * noise, torch.float32)
    assert "e-05 of their size" in check_written(probe, trained + 5e-5 * noise)
    with pytest.raises(ValueError, match="not the trained one"):
        check_written(probe, trained + 0.01 * noise)
    with pytest.raises(ValueError, match="not the trained one"):
        check_written(probe, trained * torch.nan)
    with pytest.raises(ValueError, match="50"):
        check_written(probe, trained[:, :-1])
    with pytest.raises(ValueError, match="not finite"):
        check_written(Probe(trained * torch.inf, trained, torch.float32), trained)
    lost = Probe(trained, trained + 0.02 * noise, torch.bfloat16)  # the adapter is gone, and bfloat16 would explain it
    with pytest.raises(ValueError, match="rounding to bfloat16"):
        check_written(lost, lost.base)


def rows(*models_of_rows):
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    values = {"policy": "snapkv", "cache": "evicted", "budget": 64, "n": 10, "exact_match": interval}
    return [MeasuredRow(**{**values, **one}) for one in models_of_rows]


@pytest.mark.parametrize(
    ("control", "missing"),
    [
        ({"model": "dense"}, False),
        ({"model": "dense_lora"}, False),
        ({"model": "plain", "control": "dense"}, False),
        ({"model": "dense_but_other_data"}, True),
        ({"model": "denser"}, True),
        ({"model": "dense", "n": 9}, True),  # other problems
        ({"model": "dense", "metric": "acc"}, True),
        ({"model": "dense", "policy": "knorm"}, True),
    ],
)
def test_a_control_is_known_by_identity(control, missing):
    full = {"cache": "full", "policy": "full", "budget": None}
    evaluation = Evaluation(
        rows({"model": "ours"}, {"model": "base"}, {"model": "base", **full}, {"model": "baseline", **full}, control),
        "ours",
    )
    assert bool(evaluation.missing_controls()) == missing
    no_base = Evaluation(rows({"model": "ours"}, {"model": "base_of_another"}, {"model": "dense"}), "ours")
    assert [said.partition(" with")[0].partition(" evicted")[0] for said in no_base.missing_controls()] == [
        "the base model", "the base model"
    ]  # fmt: skip


def test_logits_that_are_all_equal_are_compared():
    equal = torch.zeros(1, 4, 8)
    probe = Probe(trained=equal, base=equal, dtype=torch.float32)
    assert "logits 0.0e+00 of their size" in check_written(probe, equal)
    with pytest.raises(ValueError, match="the written model is not the trained one"):
        check_written(probe, equal + 0.1)
