"""Every supported family: parity, independent rows, generation, PEFT and gradient checkpointing.

The names of these tests are the columns of the table in the README, which `make tables` writes from their outcomes.
"""

import pytest
import torch
from families import FAMILIES, tiny_family
from passes import decode, held_at, left_padded, right_padded, rows_of, sets_equal, simulate
from peft import LoraConfig, get_peft_model

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.policies import POLICIES

EVICTING = [name for name in POLICIES if name != "full"]
EVERYWHERE = ["vase_attnv", "h2o", "rkv"]
"""Policies that every family is tested with; the three families below are tested with all."""
ALL_POLICIES = ["Llama", "Gemma2", "gpt-oss"]
PAIRS = [
    *((family, policy) for family in FAMILIES for policy in EVERYWHERE),
    *((family, policy) for family in ALL_POLICIES for policy in EVICTING if policy not in EVERYWHERE),
]
CONFIG = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize(("family", "policy"), PAIRS, ids=lambda value: value)
def test_parity(family, policy):
    """Simulation equals decoding, and evicts: logits within 1e-9 in float64, the same kept sets."""
    model = tiny_family(family)
    config = CONFIG.model_copy(update={"policy": policy})
    rows = rows_of([7, 30], steps=40)
    simulated, evict_at = simulate(model, config, rows, [7, 30], [0, 1])
    decoded, held, _ = decode(model, config, rows, [7, 30], [0, 1])
    assert max((a - b).abs().max() for a, b in zip(simulated, decoded, strict=True)) < 1e-9
    equal, compared = sets_equal(evict_at, held)
    evicting = [layer for layer in evict_at.values() if ((layer > 0) & (layer <= layer.shape[-1])).any()]
    assert evicting
    assert equal == compared == 7 * 2 * len(evicting)  # events, KV heads
    full, _ = simulate(model, EvictionConfig(policy="full"), rows, [7, 30], [0, 1])
    assert (full[1] - simulated[1]).abs().max() > 1e-3


def test_stock(family):
    """Without a cache or a simulation, and with `full`: the model's own eager attention, sliding windows included."""
    rows = rows_of([7, 30], steps=20)
    # eager attention overflows its float32 softmax with a float64 mask
    eager, ours = (tiny_family(family, dtype=torch.float32, attention=name) for name in ("eager", "vkvtrain"))
    ids, mask = left_padded(rows)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = eager(**arguments, use_cache=False).logits
        plain = ours(**arguments, use_cache=False).logits
    assert (plain - expected)[mask.bool()].abs().max() < 1e-4
    simulated, _ = simulate(ours, EvictionConfig(policy="full"), rows, [7, 30], [0, 1])
    for row, tokens in enumerate(rows):
        assert (simulated[row] - plain[row, -len(tokens) :]).abs().max() < 1e-4


def test_backends(family):
    """Backends agree, gradients included."""
    model = tiny_family(family)
    ids, mask = right_padded(rows_of([7, 20], steps=30))
    losses, gradients = [], []
    for backend in ("segments", "reference"):
        model.zero_grad()
        with simulated_eviction(model, CONFIG, [7, 20], backend=backend):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:].bool()], ids[:, 1:][mask[:, 1:].bool()])
            loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-7 * max(1.0, gradient.abs().max())


def generate(model, rows, streams, **arguments):
    ids, mask = left_padded(rows)
    cache = EvictionCache(CONFIG, model.config, streams)
    out = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, **arguments
    )
    return out[:, ids.shape[1] :], cache


def test_rows(family):
    """A row of a left-padded batch is what it is alone."""
    model = tiny_family(family, vocab=200)
    rows = rows_of([4, 18, 33], steps=0, vocab=200)
    tokens, cache = generate(model, rows, [0, 1, 2])
    for row, prompt in enumerate(rows):
        alone, alone_cache = generate(model, [prompt], [row])
        assert torch.equal(tokens[row], alone[0])
        for layer, kind in enumerate(cache.kinds):
            if kind.evicts:
                assert torch.equal(cache.positions(layer, row), alone_cache.positions(layer, 0))


def test_generate(family):
    """`generate` with the cache is what the simulation says of its tokens; `full` is the stock cache."""
    model = tiny_family(family, vocab=200)
    (prompt,) = rows_of([11], steps=0, vocab=200)
    tokens, cache = generate(model, [prompt], [5])
    sequence = [*prompt, *tokens[0].tolist()]
    simulated, evict_at = simulate(model, CONFIG, [sequence], [11], [5])
    assert simulated[0][10:-1].argmax(-1).tolist() == tokens[0].tolist()
    assert cache.stats()[0]["evictions"] > 0
    for layer, kind in enumerate(cache.kinds):
        if kind.evicts:
            assert held_at(evict_at[layer], 0, len(sequence) - 1) == cache.positions(layer, 0).tolist()
    full = EvictionCache(EvictionConfig(policy="full"), model.config)
    ids = torch.tensor([prompt])
    arguments = {"max_new_tokens": 40, "do_sample": False}
    assert torch.equal(model.generate(ids, past_key_values=full, **arguments), model.generate(ids, **arguments))


def lora_gradients(family, checkpointing):
    """Gradients of one simulated step of a LoRA adapter whose B is not zero, so that its A learns too."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]
    model = get_peft_model(tiny_family(family), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids, mask = right_padded(rows_of([7, 20], steps=30))
    with simulated_eviction(model, CONFIG, [7, 20]):
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, model


def test_peft(family):
    """Through a LoRA wrapper: gradients reach every adapter, and none the base."""
    gradients, model = lora_gradients(family, checkpointing=False)
    assert set(gradients) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(gradients) >= 2 * 2 * 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_checkpointing(family):
    """Recomputation sees the same mask: the same gradients."""
    plain, _ = lora_gradients(family, checkpointing=False)
    recomputed, model = lora_gradients(family, checkpointing=True)
    assert model.is_gradient_checkpointing
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert (gradient - recomputed[name]).abs().max() <= 1e-9 * max(1.0, gradient.abs().max()), name
