"""LoRA the way people use it: every kind trains, is saved, and reloads with plain peft to the same logits."""

import importlib.util
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from short_runs import adapter_weights, short_recipe
from transformers import AutoModelForCausalLM

from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import models
from vkvtrain.training.loop import train
from vkvtrain.training.models import check_model, load_model, quantization

IDS = torch.tensor([[1, 5, 9, 3, 7, 20, 14, 6]])


def recipe(output, lora, objective="sft", **sections):
    defaults = {
        "data": {"source": "tiny:keyed_sum", "rows": 8},
        "lora": {"r": 4, "alpha": 8, **lora},
        "eviction": {"policy": "vase_attnv", "budget": 64, "window": 16},
        "training": {"steps": 2, "global_batch": 2, "objective": objective},
        "optim": {"learning_rate": 1e-2},
        "checkpoint": {"every": 1},
    }
    return short_recipe(output, defaults, sections)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def base():
    return AutoModelForCausalLM.from_pretrained(str(MODEL_PATH))


KINDS = {
    "rslora": ({"rslora": True}, "distill"),
    "dora": ({"dora": True}, "distill"),
    "head": ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}, "distill"),
    "orthogonal": ({"init": "orthogonal"}, "distill"),
    "pissa": ({"init": "pissa"}, "sft"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_is_saved_and_reloads_with_plain_peft(tmp_path, monkeypatch, kind):
    lora, objective = KINDS[kind]
    kept = {}
    inner = models.load_model

    def keep(settings):
        kept["model"] = inner(settings)
        return kept["model"]

    monkeypatch.setattr("vkvtrain.training.loop.load_model", keep)
    settings = recipe(tmp_path / "run", lora, objective)
    train(settings)
    trained, reloaded = logits(kept["model"]), logits(PeftModel.from_pretrained(base(), settings.output))
    torch.testing.assert_close(reloaded, trained, rtol=1e-4, atol=1e-4)
    assert (trained - logits(base())).abs().max() > 0.01  # it learned something
    config = LoraConfig.from_pretrained(settings.output)
    assert (config.use_rslora, config.use_dora) == (lora.get("rslora", False), lora.get("dora", False))
    names = adapter_weights(settings.output)
    assert any("lm_head" in name for name in names) == (kind == "head")
    assert any("magnitude" in name for name in names) == (kind == "dora")
    # and its run goes on after a kill
    (settings.output / "adapter_model.safetensors").unlink()
    train(settings)
    again = adapter_weights(settings.output)
    assert all(torch.equal(again[name], names[name]) for name in names)


@pytest.mark.parametrize("kind", ["dora", "head"])
def test_the_teacher_is_the_base_model_whatever_the_adapter_trains(tmp_path, kind):
    model = load_model(recipe(tmp_path, KINDS[kind][0], "distill"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1
    assert (logits(model) - logits(base())).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of rank 3 that does something."""
    directory = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(base(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(directory)
    return directory


def continuing(output, adapter, **lora):
    return recipe(output, {"r": 16, "alpha": 32, "continue_from": str(adapter), **lora})


def test_an_adapter_is_trained_on_from_where_it_is(tmp_path, adapter):
    settings = continuing(tmp_path / "run", adapter)
    check_model(settings)
    start = load_model(settings)
    torch.testing.assert_close(logits(start), logits(PeftModel.from_pretrained(base(), adapter)), rtol=1e-4, atol=1e-4)
    assert {weight.shape[0] for name, weight in start.named_parameters() if "lora_A" in name} == {3}
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in start.named_parameters())
    train(settings)
    before, after = (adapter_weights(place) for place in (adapter, settings.output))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_continued_is_refused_before_any_model(tmp_path, adapter):
    with pytest.raises(ValueError, match=r"lora.r is 8, but the adapter .* to continue from has 3: leave it out"):
        check_model(continuing(tmp_path, adapter, r=8))
    with pytest.raises(ValueError, match=r"lora.dora is True, but the adapter"):
        check_model(continuing(tmp_path, adapter, dora=True))
    with pytest.raises(ValueError, match=r"lora.continue_from '.*nowhere' holds no adapter"):
        check_model(continuing(tmp_path, tmp_path / "nowhere"))
    config = LoraConfig.from_pretrained(adapter)
    config.init_lora_weights = "pissa"
    shutil.copytree(adapter, tmp_path / "pissa")
    config.save_pretrained(tmp_path / "pissa")
    check_model(continuing(tmp_path, tmp_path / "pissa"))
    distilled = recipe(tmp_path, {"r": 16, "alpha": 32, "continue_from": str(tmp_path / "pissa")}, "distill")
    with pytest.raises(ValueError, match=r"initialised with 'pissa', which rewrites the base weights.*'sft'"):
        check_model(distilled)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_rewrite_the_base_have_no_teacher(tmp_path, init):
    with pytest.raises(ValueError, match=rf"lora.init '{init}' rewrites the base weights"):
        recipe(tmp_path, {"init": init}, "distill")


def test_quantization_without_bitsandbytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.quantization '4bit' needs bitsandbytes: pip install bitsandbytes"):
        check_model(recipe(tmp_path, {}, model={"quantization": "4bit"}))
    check_model(recipe(tmp_path, {}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model.quantization '4bit' needs a GPU, because bitsandbytes loses"):
        check_model(recipe(tmp_path, {}, model={"quantization": "4bit"}))


def test_quantization_is_that_of_qlora(tmp_path):
    settings = recipe(tmp_path, {}, model={"quantization": "4bit", "dtype": "bfloat16"}).model
    config = quantization(settings)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization(settings.model_copy(update={"quantization": "8bit"})).load_in_8bit
    assert quantization(settings.model_copy(update={"quantization": "none"})) is None
