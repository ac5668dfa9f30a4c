"""Generation as people use it: sampling, prompts of every length, turns, streamers, compilation, half precision."""

import threading

import pytest
import torch
from accelerate import dispatch_model
from families import tiny_family
from passes import held_at, left_padded, right_padded, rows_of, simulate, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.events import evictions_by, peak_entries
from vkvtrain.policies import POLICIES
from vkvtrain.tiny import MODEL_PATH, task

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
EVICTING = [name for name in POLICIES if name != "full"]


def generate(model, rows, cache, **arguments):
    """Generated tokens of left-padded rows."""
    ids, mask = left_padded(rows)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)
    return out[:, ids.shape[1] :]


def assert_simulated(model, cache, prompts, tokens, streams):
    """The cache holds what the simulation of the same tokens says."""
    for row, (prompt, new) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        _, evict_at = simulate(model, cache.config, [[*prompt, *new]], [len(prompt)], [streams[row]])
        for layer in evict_at:
            held = held_at(evict_at[layer], 0, len(prompt) + len(new) - 1)
            assert held == cache.positions(layer, row).tolist()


@pytest.mark.parametrize("prompts", [[1], [1, 1], [17], [3, 40], [60, 1, 16]], ids=str)
def test_prompts_of_every_length(prompts):
    """One token, shorter, equal to and longer than the budget, side by side."""
    model = tiny_model(vocab=200)
    rows = rows_of(prompts, steps=0, vocab=200)
    streams = list(range(len(rows)))
    cache = EvictionCache(CONFIG, model.config, streams)
    tokens = generate(model, rows, cache, max_new_tokens=40, do_sample=False)
    assert_simulated(model, cache, rows, tokens, streams)
    for prompt, stats in zip(prompts, cache.stats(), strict=True):
        assert stats["evictions"] == evictions_by(prompt, prompt + 39, 16, 4) > 0
        assert stats["peak_entries"] == peak_entries(prompt, prompt + 39, 16, 4)


def test_sampling_is_reproducible_and_simulated():
    model = tiny_model(vocab=200)
    rows = rows_of([5, 20], steps=0, vocab=200)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        cache = EvictionCache(CONFIG, model.config, [8, 9])
        arguments = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "num_return_sequences": 3}
        tokens = generate(model, rows, cache, max_new_tokens=40, **arguments)
        drawn.append(tokens)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    streams = [(stream, repeat) for stream in (8, 9) for repeat in range(3)]
    assert_simulated(model, cache, [row for row in rows for _ in range(3)], tokens, streams)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "gpt-oss"])
def test_a_conversation_continues_with_the_same_cache(family):
    """Three turns of a batch; the second and third are chunks that nothing is evicted in."""
    model = tiny_family(family, vocab=200)
    turns = [rows_of([6, 6], steps=0, vocab=200, seed=seed) for seed in (1, 2, 3)]
    cache = EvictionCache(CONFIG, model.config, [0, 1])
    text, chunks = torch.tensor(turns[0]), [(0, 6)]
    for number, turn in enumerate(turns):
        if number:
            # the last token of an answer was never given to the cache: it opens the next chunk
            chunks.append((text.shape[1] - 1, text.shape[1] + 6))
            text = torch.cat([text, torch.tensor(turn)], 1)
        text = model.generate(text, past_key_values=cache, max_new_tokens=25, do_sample=False)
    for row in range(2):
        logits, evict_at = simulate(model, CONFIG, [text[row].tolist()], [chunks], [row])
        assert logits[0][-26:-1].argmax(-1).tolist() == text[row, -25:].tolist()
        for layer, kind in enumerate(cache.kinds):
            if kind.evicts:
                assert held_at(evict_at[layer], 0, text.shape[1] - 1) == cache.positions(layer, row).tolist()
    assert cache.stats()[0]["evictions"] == evictions_by(chunks, text.shape[1] - 1, 16, 4)


def test_a_streamer_gets_the_text():
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
    (problem,) = task.problems("validation", 0, 1)
    batch = tokenizer([problem.prompt], return_tensors="pt")
    config = EvictionConfig(policy="vase_attnv", budget=80, window=16)

    def answer(**extra):
        cache = EvictionCache(config, model.config)
        return model.generate(**batch, past_key_values=cache, max_new_tokens=150, do_sample=False, **extra)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=answer, kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 5
    alone = answer()[0, batch["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_forward(backend):
    """Attention and cache stay outside the graphs; tokens and kept sets are the same."""
    model = tiny_model(vocab=200, dtype=torch.float32)
    rows = rows_of([5, 20], steps=0, vocab=200)

    def run():
        cache = EvictionCache(CONFIG, model.config)
        return generate(model, rows, cache, max_new_tokens=40, do_sample=False), cache

    tokens, cache = run()
    torch._dynamo.reset()
    model.forward = torch.compile(type(model).forward, backend=backend).__get__(model)
    compiled_tokens, compiled = run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(tokens, compiled_tokens)
    for layer in range(2):
        for row in range(2):
            assert torch.equal(cache.positions(layer, row), compiled.positions(layer, row))
    assert cache.stats() == compiled.stats()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", EVICTING)
def test_half_precision(policy, dtype):
    """Scores are in float32: what is kept is a set of different, ascending positions with sinks and window."""
    model = tiny_model(vocab=200, dtype=dtype)
    config = CONFIG.model_copy(update={"policy": policy})
    cache = EvictionCache(config, model.config)
    generate(model, rows_of([5, 30], steps=0, vocab=200), cache, max_new_tokens=41, do_sample=False)
    for row, stats in enumerate(cache.stats()):
        assert stats["evictions"] > 3
        for layer in range(2):
            positions = cache.positions(layer, row)
            assert (positions.diff(dim=-1) > 0).all()
            assert (positions[:, :2] == torch.arange(2)).all()
            seen = [45, 70][row]
            assert (positions[:, -4:] == torch.arange(seen - 4, seen)).all()
        assert cache.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("policy", ["vase_attnv", "snapkv", "caote", "rkv", "h2o"])
def test_attention_that_underflows_duplicates_nothing(policy, dtype):
    """Logits so far apart that all weights but one are zero: still `budget` different entries, the newest of equals."""
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=0, protected_fraction=0.0, smooth=False)
    model = tiny_model(dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(60.0)
    rows = [[5 + i % 7 for i in range(60)]]
    _, evict_at = simulate(model, config, rows, [6], [0])
    for layer in evict_at.values():
        for seen in range(20, 61, 4):
            for held in held_at(layer, 0, seen):
                assert len(held) == len(set(held)) == 16
                assert held[-4:] == list(range(seen - 4, seen))


def test_layers_on_devices_of_their_own():
    """accelerate's hooks move activations between layers, as a device map does."""
    model = tiny_model(vocab=200)
    rows = rows_of([5, 20], steps=0, vocab=200)
    plain = generate(model, rows, EvictionCache(CONFIG, model.config), max_new_tokens=40, do_sample=False)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    model = dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    cache = EvictionCache(CONFIG, model.config)
    tokens = generate(model, rows, cache, max_new_tokens=40, do_sample=False)
    assert torch.equal(tokens, plain)
    assert_simulated(model, cache, rows, tokens, [0, 1])


@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss"])
@pytest.mark.parametrize("policy", ["vase_attnv", "h2o", "full"])
def test_bytes_are_the_formula(family, policy):
    """Peak entries x KV heads x 2 x D x bytes a layer; a sliding layer holds its window."""
    model = tiny_family(family, vocab=200, dtype=torch.float32)
    config = CONFIG.model_copy(update={"policy": policy})
    cache = EvictionCache(config, model.config)
    generate(model, rows_of([5, 30], steps=0, vocab=200), cache, max_new_tokens=41, do_sample=False)
    entry = 2 * 2 * 16 * 4  # KV heads, key and value, head dimension, float32
    for prompt, stats in zip([5, 30], cache.stats(), strict=True):
        peak = prompt + 40 if policy == "full" else peak_entries(prompt, prompt + 40, 16, 4)
        sliding = {"Qwen3": peak, "gpt-oss": 12}[family]
        assert stats["peak_bytes"] == entry * (peak + sliding)
    storages = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cache.allocated_bytes == sum(tensor.untyped_storage().nbytes() for tensor in storages)


def test_thousands_of_streams():
    """A wide batch of short rows: every row its own noise, and a stream's number may be large."""
    model = tiny_model(heads=2, kv_heads=1, layers=1, dtype=torch.float32)
    config = EvictionConfig(policy="random", budget=8, window=2, sinks=1)
    streams = [2**40 + i for i in range(2000)]
    ids = torch.full((2000, 3), 7)
    cache = EvictionCache(config, model.config, streams)
    with torch.no_grad():
        for step in range(14):
            model(input_ids=ids if step == 0 else ids[:, :1], past_key_values=cache)
    held = {tuple(cache.positions(0, row)[0].tolist()) for row in range(2000)}
    assert len(held) > 100
    ids, mask = right_padded([[7] * 16])
    with torch.no_grad(), simulated_eviction(model, config, [3], [streams[1234]]) as trace:
        model(input_ids=ids, attention_mask=mask)
    assert held_at(trace.evict_at[0], 0, 16) == cache.positions(0, 1234).tolist()
