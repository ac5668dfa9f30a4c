"""The simulation as a context: checkpointing, threads, teachers, wrappers, and what it refuses."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from passes import held_at, right_padded, simulate, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import (
    DeepseekV3Config,
    Gemma3nTextConfig,
    Llama4TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.events import events_of
from vkvtrain.support import LayerKind, layer_kinds

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
ROWS = [[5 + i % 7 for i in range(48)], [9 + i % 5 for i in range(31)]]
PROMPTS = [6, 20]


def loss_of(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, backward=lambda loss: loss.backward()):
    """(loss, gradients, evict_at) of one simulated training step."""
    model.zero_grad()
    ids, mask = right_padded(ROWS)
    with simulated_eviction(model, CONFIG, PROMPTS) as trace:
        loss = loss_of(model, ids, mask)
        decided = {layer: evict_at.clone() for layer, evict_at in trace.evict_at.items()}
        backward(loss)
    assert all(torch.equal(trace.evict_at[layer], decided[layer]) for layer in decided)
    return loss.item(), gradients(model), decided


def same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    assert all((ours[1][name] - theirs[1][name]).abs().max() < 1e-12 for name in theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(ours[2][layer], theirs[2][layer]) for layer in theirs[2])


def checkpointed(use_reentrant):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_under_the_same_mask(use_reentrant):
    reference = step(tiny_model().train())
    assert any((at <= 30).any() for at in reference[2].values())
    same(step(checkpointed(use_reentrant)), reference)


@pytest.mark.parametrize(
    "model", [lambda: tiny_model().train(), lambda: checkpointed(False), lambda: checkpointed(True)]
)
def test_backward_from_another_thread(model):
    def in_thread(loss):
        failures = []

        def work():
            try:
                loss.backward()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures

    same(step(model(), in_thread), step(tiny_model().train()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_leaving_before_a_checkpointed_backward_raises(use_reentrant):
    model = checkpointed(use_reentrant)
    ids, mask = right_padded(ROWS)
    with simulated_eviction(model, CONFIG, PROMPTS):
        loss = loss_of(model, ids, mask)
    with pytest.raises(RuntimeError, match="inside the block"):
        loss.backward()
    with torch.no_grad():  # evaluation afterwards is plain attention
        again = loss_of(model, ids, mask)
    assert again.item() == pytest.approx(loss_of(tiny_model(), ids, mask).item(), abs=1e-12)


def test_without_checkpointing_backward_may_come_later():
    model = tiny_model().train()
    ids, mask = right_padded(ROWS)
    with simulated_eviction(model, CONFIG, PROMPTS):
        loss = loss_of(model, ids, mask)
    loss.backward()
    expected = step(tiny_model().train())[1]
    assert all((gradient - expected[name]).abs().max() < 1e-12 for name, gradient in gradients(model).items())


def test_the_model_is_restored_even_after_an_error():
    model = tiny_model()
    ids, mask = right_padded(ROWS)
    before = model(input_ids=ids, attention_mask=mask).logits
    contents = {name: set(vars(module)) for name, module in model.named_modules()}

    def fail():
        with simulated_eviction(model, CONFIG, PROMPTS) as trace:
            evicted = model(input_ids=ids, attention_mask=mask).logits
            assert (evicted - before).abs().max() > 1e-3
            assert not trace.closed
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == contents
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_one_forward_pass_a_block():
    model = tiny_model()
    ids, mask = right_padded(ROWS)
    with simulated_eviction(model, CONFIG, PROMPTS):
        model(input_ids=ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="ran twice"):
            model(input_ids=ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="already"), simulated_eviction(model, CONFIG, PROMPTS):
            pass


@pytest.mark.parametrize("teacher_first", [False, True])
def test_a_teacher_runs_with_the_full_cache_inside(teacher_first):
    model = tiny_model()
    ids, mask = right_padded(ROWS)
    full = model(input_ids=ids, attention_mask=mask).logits
    evicted, _ = simulate(model, CONFIG, ROWS, PROMPTS, None)
    with torch.no_grad(), simulated_eviction(model, CONFIG, PROMPTS) as trace:
        for teacher in (teacher_first, not teacher_first):
            if teacher:
                with trace.suspended():
                    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, full)
            else:
                student = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(student[0], evicted[0])


def test_through_a_peft_wrapper():
    model = tiny_model()
    _, evict_at = simulate(model, CONFIG, ROWS, PROMPTS, None)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    _, through = simulate(wrapped, CONFIG, ROWS, PROMPTS, None)
    assert all(torch.equal(through[layer], evict_at[layer]) for layer in evict_at)
    loss, found, _ = step(wrapped.train())
    assert loss > 0
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    assert all("lora" in name for name in found)


@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(1, 5), st.integers(2, 4), st.integers(0, 3),
    st.sampled_from(["vase_attnv", "vase_dkv", "curdkv", "snapkv", "random", "streaming", "evict_large"]),
    st.sampled_from([(2, 2), (4, 2), (4, 1)]),
)  # fmt: skip
def test_what_is_held_after_every_event(prompt, steps, window, times, sinks, policy, heads):
    """Exactly `budget` entries, window and sinks among them, and nothing that was evicted before."""
    budget = window * times
    sinks = min(sinks, budget - window - 1)
    config = EvictionConfig(policy=policy, budget=budget, window=window, sinks=sinks)
    model = tiny_model(heads=heads[0], kv_heads=heads[1], layers=1)
    length = prompt + steps
    tokens = torch.randint(1, 9, (length,), generator=torch.Generator().manual_seed(prompt * steps)).tolist()
    _, evict_at = simulate(model, config, [tokens, [3] * (length + 3)], [prompt, 1], [0, 1])
    assert (evict_at[0][0, :, length:] == 0).all()
    events = events_of(prompt, length, budget, window)
    times_found = sorted(set(evict_at[0][0, :, :length].flatten().tolist()) - {length + 4})
    assert times_found == [event.position + 1 for event in events]
    before = [set(range(length))] * heads[1]
    for event in events:
        now = held_at(evict_at[0], 0, event.position + 1)
        for head, positions in enumerate(now):
            assert len(positions) == len(set(positions)) == budget
            assert set(range(sinks)) <= set(positions)
            assert set(range(event.position + 1 - window, event.position + 1)) <= set(positions)
            old = {position for position in before[head] if position <= event.position}
            assert set(positions) <= old
            before[head] = set(positions) | set(range(event.position + 1, length))


def test_no_event_after_the_end_and_readable_after_exit():
    model = tiny_model()
    ids, mask = right_padded([ROWS[0][:17], ROWS[0][:16]])
    with torch.no_grad(), simulated_eviction(model, CONFIG, [3, 3]) as trace:
        model(input_ids=ids, attention_mask=mask)
    assert trace.closed
    assert trace.backend == "segments"
    assert (trace.evict_at[0][:, :, :16] == 18).all()  # 16 entries are not above the budget
    assert (trace.evict_at[0][1, :, 16] == 0).all()


REFUSED = {
    "left padding": ({"mask": [[0, 1, 1, 1]]}, "right-padded"),
    "gap": ({"mask": [[1, 0, 1, 1]]}, "right-padded"),
    "empty row": ({"mask": [[0, 0, 0, 0]]}, "all padding"),
    "rows": ({"prompts": [2, 2]}, "2 entries for a batch of 1"),
    "long prompt": ({"prompts": [5]}, "after its row's 4 tokens"),
    "no prompt": ({"prompts": [0]}, "must be positive"),
    "chunks": ({"prompts": [[(0, 2), (1, 3)]]}, "disjoint"),
    "first chunk": ({"prompts": [[(1, 2)]]}, "start at position 0"),
    "streams": ({"streams": [0, 1]}, "2 entries for 1 prompt_lengths"),
    "bad stream": ({"streams": ["a"]}, "ints or tuples"),
    "backend": ({"backend": "flash"}, "backend must be"),
    "attention": ({"attention": "sdpa"}, "set_attn_implementation"),
    "layer": ({"config": CONFIG.model_copy(update={"skip_layers": (2,)})}, "layers 0 to 1"),
    "4-D mask": ({"mask4": True}, "two-dimensional"),
    "packed": ({"position_ids": [[0, 1, 0, 1]]}, "packed sequences"),
    "cache": ({"cache": True}, "exclude each other"),
    "dropout": ({"dropout": 0.1}, "attention_dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    case, message = REFUSED[name]
    model = tiny_model(attention=case.get("attention", "vkvtrain"), attention_dropout=case.get("dropout", 0.0))
    model.train("dropout" in case)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "use_cache": False}
    if "mask" in case:
        inputs["attention_mask"] = torch.tensor(case["mask"])
    if "mask4" in case:
        inputs["attention_mask"] = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    if "position_ids" in case:
        inputs["position_ids"] = torch.tensor(case["position_ids"])
    if "cache" in case:
        inputs |= {"past_key_values": EvictionCache(CONFIG, model.config), "use_cache": True}
    with (
        pytest.raises(ValueError, match=message),
        simulated_eviction(
            model,
            case.get("config", CONFIG),
            case.get("prompts", [2]),
            case.get("streams"),
            case.get("backend", "auto"),
        ),
    ):
        model(**inputs)
    model.set_attn_implementation("vkvtrain")
    model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))  # nothing is left behind


def test_a_stock_cache_inside_the_block():
    """`use_cache=True` makes a fresh one, which changes nothing; one that already holds tokens is refused."""
    model = tiny_model()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        with simulated_eviction(model, CONFIG, [6]):
            logits = model(input_ids=ids, use_cache=True).logits
        assert torch.equal(logits[0], simulate(model, CONFIG, [ROWS[0]], [6], None)[0][0])
        past = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="leave the cache out"), simulated_eviction(model, CONFIG, [6]):
            model(input_ids=ids[:, 8:], past_key_values=past)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(num_hidden_layers=4, sliding_window=64), "mistral: every layer has a sliding window of 64"),
        (Qwen3NextConfig(num_hidden_layers=4), r"layers 0, 1, 2 are linear_attention \(a linear layer keeps a state"),
        (Llama4TextConfig(num_hidden_layers=4), r"layers 0, 1, 2 are chunked_attention \(chunks forget"),
        (Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2), "2 layers share another layer's cache"),
        (T5Config(), "t5 is an encoder-decoder"),
        (DeepseekV3Config(num_hidden_layers=2), "latent attention"),
    ],
)
def test_layers_that_cannot_evict_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        layer_kinds(config, CONFIG)


def test_layers_that_can_evict():
    skipping = CONFIG.model_copy(update={"skip_layers": (1,)})
    assert [kind.evicts for kind in layer_kinds(Qwen3Config(num_hidden_layers=3), skipping)] == [True, False, True]
    full = EvictionConfig(policy="full")
    assert [kind.evicts for kind in layer_kinds(Qwen3Config(num_hidden_layers=2), full)] == [False, False]
    mixed = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=64, max_window_layers=2)
    assert layer_kinds(mixed, CONFIG) == [LayerKind(True), LayerKind(True), LayerKind(False, 64), LayerKind(False, 64)]
    sliding = layer_kinds(MistralConfig(num_hidden_layers=1, sliding_window=64), full)
    assert sliding == [LayerKind(False, 64)]
