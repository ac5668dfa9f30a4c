"""Compiled decode steps: the same answers as step by step, one graph for all steps, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from families import FAMILIES, tiny_family
from passes import decode, rows_of, tiny_model
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.generation import Request, Sampling, generate
from vkvtrain.generation.decoders import Compiled
from vkvtrain.policies import POLICIES
from vkvtrain.selection import Selector
from vkvtrain.tiny import MODEL_PATH, task

EVICTING = sorted(name for name, policy in POLICIES.items() if not policy.keeps_everything)
CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that are compiled, and runs them as they are: what is compiled is checked, not by what."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def requests_of(prompts=(3, 30, 1, 17, 60, 9), limits=(40, 7, 30, 1, 25, 33), sampling=Sampling()):  # noqa: B008
    rows = rows_of(list(prompts), steps=0, vocab=200)
    return [Request(tuple(row), limit, i, sampling) for i, (row, limit) in enumerate(zip(rows, limits, strict=True))]


def assert_equal(ours, theirs, tolerance):
    assert [replace(answer, log_probs=[]) for answer in ours] == [replace(answer, log_probs=[]) for answer in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=tolerance)


@pytest.mark.parametrize(
    ("family", "policy"),
    # the policies differ in what happens between steps: accumulated attention, no queries, queries and all keys
    [(family, "vase_attnv") for family in FAMILIES] + [("Qwen3", policy) for policy in ("h2o", "random", "rkv")],
)
def test_answers_are_those_of_eager_steps(family, policy, graphs):
    """Prompts shorter and longer than budget and sliding window, slots that are refilled and that run idle."""
    model = tiny_family(family, vocab=200)
    if family in ("Qwen3-MoE", "gpt-oss"):
        model.set_experts_implementation("batched_mm")
    config, requests = CONFIG.model_copy(update={"policy": policy}), requests_of()
    eager = generate(model, config, requests, slots=2, end_tokens=())
    answers = generate(model, config, requests, slots=3, end_tokens=(), compile=True)
    assert_equal(answers, eager, 1e-9)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("policy", EVICTING)
@torch.no_grad()
def test_every_event_keeps_what_decoding_keeps(policy, monkeypatch):
    """Rows that evict together but are no neighbours, a prompt longer than the budget; one choice for all layers."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    calls = []
    choose = Selector.__call__
    monkeypatch.setattr(Selector, "__call__", lambda *arguments: calls.append(arguments) or choose(*arguments))
    model, config = tiny_model(), CONFIG.model_copy(update={"policy": policy})
    prompts, streams = [3, 5, 7, 30], [(0, 0), (1, 2), 7, 9]
    rows = rows_of(prompts, steps=40)
    expected, held, eager = decode(model, config, rows, prompts, streams)
    of_eager, calls[:] = len(calls), []

    decoder = None
    logits: list[list[torch.Tensor]] = []
    for row, (tokens, prompt, stream) in enumerate(zip(rows, prompts, streams, strict=True)):
        own = EvictionCache(config, model.config, [stream])
        logits.append([model(torch.tensor([tokens[:prompt]]), past_key_values=own).logits[0]])
        if decoder is None:
            decoder = Compiled(model, EvictionCache.join([own] * len(rows), model.config), 34)
        decoder.replace_row(row, own)
    assert decoder is not None
    for step in range(40):
        token = torch.tensor([[tokens[prompt + step]] for tokens, prompt in zip(rows, prompts, strict=True)])
        out = decoder.forward(token, torch.tensor(prompts)[:, None] + step)
        for row, (prompt, events) in enumerate(zip(prompts, held, strict=True)):
            logits[row].append(out[row])
            for layer, positions in events.get(prompt + step + 1, {}).items():
                assert torch.equal(decoder.cache.positions(layer, row), positions)
    for ours, theirs in zip(logits, expected, strict=True):
        assert (torch.cat(ours) - theirs).abs().max() < 1e-9
    assert decoder.cache.stats() == eager.stats()
    assert len(calls) * model.config.num_hidden_layers == of_eager > 30


@pytest.mark.parametrize("requests", [requests_of((5, 9), (1, 1)), requests_of((5,), (30,)), []])
def test_nothing_to_step_a_single_slot_and_nothing_at_all(requests, graphs):
    model = tiny_model(vocab=200)
    eager = generate(model, CONFIG, requests, slots=2, end_tokens=())
    assert_equal(generate(model, CONFIG, requests, slots=2, end_tokens=(), compile=True), eager, 1e-9)


def test_adapters_sampling_and_a_journal(graphs, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(vocab=200), lora).eval()
    requests = requests_of(sampling=Sampling(temperature=1.1, top_p=0.9, seed=2, repetition_penalty=1.2))
    eager = generate(model, CONFIG, requests, slots=3, end_tokens=())
    journal = tmp_path / "completions.jsonl"
    first = generate(model, CONFIG, requests[:3], slots=3, end_tokens=(), journal=journal, compile=True)
    assert_equal(first, eager[:3], 1e-9)
    assert_equal(generate(model, CONFIG, requests, slots=3, end_tokens=(), journal=journal, compile=True), eager, 1e-9)
    assert len(journal.read_text().splitlines()) == len(requests)


@pytest.mark.slow
def test_inductor_on_the_embedded_model():
    """float32, real code generation: other roundings, the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    prompts = [task.problem("validation", 0, index, count).prompt for index, count in enumerate((9, 16, 3, 6))]
    requests = [Request(tuple(tokenizer(p)["input_ids"]), 150, (i, 0)) for i, p in enumerate(prompts)]
    config, ends = EvictionConfig(policy="vase_attnv", budget=48, window=16), {tokenizer.eos_token_id}
    eager = generate(model, config, requests, slots=3, end_tokens=ends)
    torch._dynamo.reset()
    assert_equal(generate(model, config, requests, slots=3, end_tokens=ends, compile=True), eager, 1e-4)
    assert sum(answer.evictions for answer in eager) > 10


@pytest.mark.parametrize("config", [EvictionConfig(policy="full"), CONFIG.model_copy(update={"skip_layers": (1,)})])
def test_layers_that_grow_are_refused(config):
    with pytest.raises(
        ValueError, match=r"a layer keeps everything \(policy 'full', or skip_layers\): leave compile out"
    ):
        generate(tiny_model(vocab=200), config, requests_of(), slots=2, end_tokens=(), compile=True)


def test_a_step_that_is_no_single_graph_is_refused(graphs):
    model = tiny_family("Qwen3-MoE", vocab=200)
    with pytest.raises(
        ValueError, match=r"Qwen3MoeForCausalLM is no single graph .*experts_implementation='batched_mm'"
    ):
        generate(model, CONFIG, requests_of(), slots=2, end_tokens=(), compile=True)
