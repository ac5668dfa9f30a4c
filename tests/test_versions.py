"""Releases of transformers: nothing of ours uses what the installed one deprecates; the cache has both names."""

import inspect
import warnings

import pytest
import torch
from families import FAMILIES, tiny_family
from passes import simulate, tiny_model
from torch import nn
from transformers import AutoTokenizer

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.chat import Conversation
from vkvtrain.generation import Request, generate
from vkvtrain.loading import Loaded
from vkvtrain.modules import attention_modules
from vkvtrain.publishing.custom_generate.generate import generate as published
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.loop import train
from vkvtrain.training.settings import Recipe
from vkvtrain.versions import CACHE_ARGUMENT, cache_argument, take_cache

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6]])


@pytest.fixture(autouse=True)
def no_deprecated_names():
    """Fails where a deprecated name is used. (PEFT asks for `is_gradient_checkpointing` itself.)"""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values.*", category=FutureWarning)
        warnings.filterwarnings("error", message=".*gradient_checkpointing_enable.*", category=FutureWarning)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_has_the_name_that_the_release_gives_it(family):
    model = tiny_family(family)
    assert CACHE_ARGUMENT in inspect.signature(model.forward).parameters
    model(IDS, **cache_argument(EvictionCache(CONFIG, model.config)))
    layers = attention_modules(model)
    assert [layer.layer_idx for layer in layers] == [0, 1]
    assert all("Attention" in type(layer).__name__ for layer in layers)


def test_attention_is_found_whatever_its_arguments_are_called():
    """The next release may rename them again; modules that only know their layer are not attention."""

    class Renamed(type(tiny_model().model.layers[0].self_attn)):
        def forward(self, hidden_states, position_embeddings, attention_mask, memory=None, **kwargs):
            kwargs.pop("past_key_values", None)
            kwargs.pop("cache", None)
            return super().forward(hidden_states, position_embeddings, attention_mask, **cache_argument(memory))

    model = tiny_model()
    expected = simulate(model, CONFIG, [IDS[0].tolist() * 6], [5], None)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Renamed
        layer.layer_idx, layer.mlp.layer_idx, layer.mlp.config = 0, 0, model.config
    assert attention_modules(model) == [layer.self_attn for layer in model.model.layers]
    found = simulate(model, CONFIG, [IDS[0].tolist() * 6], [5], None)
    assert torch.equal(found[0][0], expected[0][0])
    assert (found[1][0] <= 42).any()


def test_encoders_of_other_media_are_left_out():
    model = tiny_model()
    tower = nn.Module()
    tower.layer_idx, tower.config, tower.is_causal, tower.scaling = 0, model.config, False, 0.25
    assert attention_modules(nn.ModuleList([tower, model])) == [layer.self_attn for layer in model.model.layers]


@pytest.mark.parametrize("compile", [False, True])
def test_the_slot_engine_warns_of_nothing(compile):
    torch._dynamo.reset()
    requests = [Request(tuple(IDS[0].tolist()), 30, 0)]
    (answer,) = generate(tiny_model(), CONFIG, requests, slots=1, end_tokens=(), compile=compile)
    assert answer.evictions > 0
    torch._dynamo.reset()


def test_a_conversation_warns_of_nothing():
    model = tiny_model(vocab=300)
    talk = Conversation(Loaded(model, AutoTokenizer.from_pretrained(MODEL_PATH), CONFIG), CONFIG)
    for _ in range(2):
        assert talk.answer("1+2", None, max_new_tokens=12, do_sample=False) > 0
    assert talk.cache.stats()[0]["evictions"] > 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_published_code_takes_the_cache_by_either_name(name):
    model = tiny_model()
    arguments = {"model": model, "eviction": CONFIG.model_dump(), "do_sample": False}
    alone = published(IDS, **arguments, max_new_tokens=30)
    cache = EvictionCache(CONFIG, model.config)
    first = published(IDS, **arguments, max_new_tokens=20, **{name: cache})
    assert cache.stats()[0]["evictions"] > 0
    rest = published(first, **arguments, max_new_tokens=10, attention_mask=torch.ones_like(first), **{name: cache})
    assert torch.equal(rest, alone)
    assert take_cache({"cache": None, "past_key_values": None}) is None


def test_training_with_checkpointing_warns_of_nothing(tmp_path):
    recipe = Recipe(
        model={"name": "tiny", "gradient_checkpointing": True},
        data={"source": "tiny:keyed_sum", "rows": 4, "held_out": 0}, lora={"r": 4, "alpha": 8},
        eviction={"policy": "vase_attnv", "budget": 64, "window": 16}, training={"steps": 1, "global_batch": 2},
        optim={"warmup_steps": 0}, log={"tracker": "none"}, output=tmp_path / "run",
    )  # fmt: skip
    train(recipe)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
