"""A simulation is never silently absent: compilers, replicas, copies, models that share a configuration, nesting."""

import copy
import io

import pytest
import torch
from families import tiny_family
from passes import rows_of, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.versions import cache_argument, enable_checkpointing

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
IDS = torch.tensor(rows_of([6, 6], steps=34, vocab=40))
PADDED = torch.ones_like(IDS)
PADDED[1, 30:] = 0


def dense(model, mask=PADDED):
    return model(input_ids=IDS, attention_mask=mask, use_cache=False).logits


def evicted(model, forward=None, mask=PADDED):
    """(logits, `evict_at`) of a simulated pass through `forward`, by default the model's."""
    with simulated_eviction(model, CONFIG, [6, 6]) as trace:
        logits = dense(model if forward is None else forward, mask)
    return logits, trace.evict_at


def decoded(model, forward):
    """Logits after a prompt and three tokens with the evicting cache, the last of which evicts."""
    cache = EvictionCache(CONFIG, model.config)
    out = [forward(input_ids=IDS[:, :21], position_ids=torch.arange(21)[None], **cache_argument(cache)).logits]
    for token in range(21, 24):
        position = torch.tensor([[token]])
        out.append(forward(input_ids=IDS[:, token : token + 1], position_ids=position, **cache_argument(cache)).logits)
    return torch.cat(out, 1)


def same(ours, theirs):
    assert (ours[0] - theirs[0])[PADDED.bool()].abs().max() < 1e-9
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][layer], theirs[1][layer]) for layer in theirs[1])


def whole_model(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def forward_only(model):
    return torch.compile(model.forward, backend="eager")


def one_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def one_attention(model):
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole_model, in_place, forward_only, one_layer, one_attention])
@torch.no_grad()
def test_a_compiled_model_in_turns(compiled):
    """What Dynamo guards on tells a module in a simulation from one that is in none, round after round."""
    torch._dynamo.reset()
    plain, model = tiny_model(), tiny_model()
    full, cached, simulated = dense(plain), decoded(plain, plain), evicted(plain)
    assert (simulated[0] - full)[PADDED.bool()].abs().max() > 1e-3
    forward = compiled(model)
    for _ in range(2):
        assert (decoded(model, forward) - cached).abs().max() < 1e-9
        assert (dense(forward) - full)[PADDED.bool()].abs().max() < 1e-9
        same(evicted(model, forward), simulated)
        same(evicted(model, forward), simulated)
    torch._dynamo.reset()


def test_a_compiled_model_trained_in_turns():
    """With gradients and checkpointing, a dense step between two simulated ones."""
    torch._dynamo.reset()

    def gradient(model, forward, simulated):
        model.zero_grad()
        if simulated:
            with simulated_eviction(model, CONFIG, [6, 6]):
                dense(forward)[PADDED.bool()].square().mean().backward()
        else:
            dense(forward)[PADDED.bool()].square().mean().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain, model = tiny_model().train(), tiny_model().train()
    enable_checkpointing(model, use_reentrant=False)
    expected = [gradient(plain, plain, simulated) for simulated in (True, False)]
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    forward = whole_model(model)
    for _ in range(2):
        for simulated in (True, False):
            assert (gradient(model, forward, simulated) - expected[not simulated]).abs().max() < 1e-9
    torch._dynamo.reset()


def replica_of(model):
    """A replica as `nn.DataParallel` makes them, which copies modules and their attributes."""
    modules = list(model.modules())
    places = {id(module): place for place, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[places[id(child)]]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter
            setattr(replica, name, parameter)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[0]


@pytest.mark.parametrize("mask", [None, PADDED])
@torch.no_grad()
def test_replicas_are_refused(mask):
    model = tiny_model()
    full = dense(model)
    outside = replica_of(model)
    assert torch.equal(dense(outside), full)
    with pytest.raises(ValueError, match="DataParallel"), simulated_eviction(model, CONFIG, [6, 6]):
        dense(replica_of(model), mask)
    assert torch.equal(dense(replica_of(model)), full)
    # made before the block: it is in no simulation
    with pytest.raises((RuntimeError, ValueError), match=r"no attention layer ran|in no simulation"):
        evicted(model, outside, mask)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Olmo3"])
@pytest.mark.parametrize("mask", [None, PADDED])
@torch.no_grad()
def test_another_model_with_the_same_configuration_object(family, mask):
    """It is right, or it is refused: where its masks would have to be other ones than the simulation's."""
    model = tiny_family(family)
    other = type(model)(model.config).to(torch.float64).eval()
    expected = dense(other, mask)
    with simulated_eviction(model, CONFIG, [6, 6]) as trace:
        ours = dense(model, mask)
        if mask is None and family == "Qwen3":
            assert torch.equal(dense(other, mask), expected)
        else:
            with pytest.raises(ValueError, match="configuration of its own"):
                dense(other, mask)
        with trace.suspended():
            assert torch.equal(dense(other, mask), expected)
    assert torch.equal(evicted(model, mask=mask)[0], ours)
    assert torch.equal(dense(other, mask), expected)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_nested_blocks_of_two_models(shared):
    model = tiny_model()
    other = type(model)(model.config if shared else copy.deepcopy(model.config)).to(torch.float64).eval()
    alone = evicted(model), evicted(other)
    with simulated_eviction(model, CONFIG, [6, 6]) as outer:
        with simulated_eviction(other, CONFIG, [6, 6]) as inner:
            theirs = dense(other)
        ours = dense(model)
    same((ours, outer.evict_at), alone[0])
    same((theirs, inner.evict_at), alone[1])


@torch.no_grad()
def test_copies():
    """One made before a block is dense in it; a shallow one is the model itself; one made inside shares the block."""
    model = tiny_model()
    full, simulated = dense(model, None), evicted(model, mask=None)
    before = copy.deepcopy(model)
    same(evicted(model, copy.copy(model), mask=None), simulated)
    with simulated_eviction(model, CONFIG, [6, 6]):
        assert torch.equal(dense(before, None), full)
        dense(model, None)
        inside = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="ran twice"):
            dense(inside, None)
    assert torch.equal(dense(inside, None), full)
    same(evicted(inside, mask=None), simulated)
    same(evicted(copy.deepcopy(model), mask=None), simulated)
    with pytest.raises(RuntimeError, match="no attention layer ran"):
        evicted(model, before)
    with pytest.raises(ValueError, match="copy it before"), simulated_eviction(model, CONFIG, [6, 6]):
        dense(copy.deepcopy(model))


@torch.no_grad()
def test_a_model_that_is_pickled_inside_leaves_the_simulation_behind():
    model, file = tiny_model(), io.BytesIO()
    full = dense(model)
    with simulated_eviction(model, CONFIG, [6, 6]):
        torch.save(model, file)
        dense(model)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(dense(loaded), full)
    same(evicted(loaded), evicted(model))


@torch.no_grad()
def test_wrapped_models():
    model = tiny_model()
    simulated = evicted(model)
    same(evicted(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))), simulated)

    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **arguments):
            return self.inner(**arguments)

    same(evicted(Holder(model)), simulated)
    same(evicted(Holder(model), model), simulated)


def test_a_block_without_a_pass_raises():
    model = tiny_model(layers=3)
    with pytest.raises(RuntimeError, match="no attention layer ran"), simulated_eviction(model, CONFIG, [6, 6]):
        pass
    with (
        pytest.raises(RuntimeError, match="no attention layer ran"),
        simulated_eviction(model, CONFIG, [6, 6]) as trace,
        trace.suspended(),
    ):
        dense(model)
    layers, model.model.layers[1].forward = model.model.layers, lambda hidden, **_: hidden  # a layer that is skipped
    with (
        pytest.raises(RuntimeError, match=r"not every layer \(layer 1 did not\)"),
        simulated_eviction(model, CONFIG, [6, 6]),
    ):
        dense(model)
    del layers[1].forward
    with pytest.raises(KeyError), simulated_eviction(model, CONFIG, [6, 6]):
        raise KeyError("what went wrong is not hidden")
    assert trace.closed
    evicted(model)
