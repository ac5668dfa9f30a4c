"""Training sees what decoding does: the same kept sets and logits, for every registered policy."""

import warnings

import pytest
import torch
from passes import decode, held_at, replayed, rows_of, sets_equal, simulate, tiny_model

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.policies import POLICIES

STREAMS = [3, (4, 1), (0, 0, 2)]


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("protect_prompt", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_simulation_equals_decoding(policy, protect_prompt, kv_heads):
    model = tiny_model(kv_heads=kv_heads)
    config = EvictionConfig(policy=policy, budget=24, window=8, sinks=2, protect_prompt=protect_prompt)
    prompts = [5, 11, 40]  # shorter and longer than the budget
    rows = rows_of(prompts, steps=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the long prompt is clipped, and says so
        simulated, evict_at = simulate(model, config, rows, prompts, STREAMS)
        decoded, held, cache = decode(model, config, rows, prompts, STREAMS)
    for ours, theirs in zip(simulated, decoded, strict=True):
        assert (ours - theirs).abs().max() < 1e-9
    equal, compared = sets_equal(evict_at, held)
    assert equal == compared
    if policy == "full":
        assert compared == 0
        return
    assert compared > 60
    width = max(len(row) for row in rows)
    for layer in range(2):
        for row, tokens in enumerate(rows):
            final = held_at(torch.minimum(evict_at[layer], torch.tensor(len(tokens) + 1)), row, len(tokens))
            assert final == cache.positions(layer, row).tolist()
            assert (evict_at[layer][row, :, len(tokens) :] == 0).all()
        assert evict_at[layer].max() == width + 1


def test_skipped_layers_keep_everything():
    model = tiny_model(layers=3)
    config = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2, skip_layers=(0, 2))
    rows = rows_of([6], steps=40)
    simulated, evict_at = simulate(model, config, rows, [6], [0])
    decoded, _, cache = decode(model, config, rows, [6], [0])
    assert (simulated[0] - decoded[0]).abs().max() < 1e-9
    assert (evict_at[0] == 47).all()
    assert (evict_at[2] == 47).all()
    assert (evict_at[1] < 47).any()
    assert cache.positions(0, 0).tolist() == [list(range(46))] * 2


def test_later_turns_are_appended_without_eviction():
    model = tiny_model()
    config = EvictionConfig(policy="snapkv", budget=16, window=4, sinks=2)
    tokens = rows_of([10], steps=50)[0]
    chunks = [(0, 10), (30, 41)]
    simulated, evict_at = simulate(model, config, [tokens], [chunks], [0])
    cache = EvictionCache(config, model.config, [0])
    logits, seen = [], 0
    with torch.no_grad():
        pieces = [(0, 10), *((i, i + 1) for i in range(10, 30)), (30, 41), *((i, i + 1) for i in range(41, 60))]
        for start, end in pieces:
            logits.append(model(input_ids=torch.tensor([tokens[start:end]]), past_key_values=cache).logits[0])
            seen = end
            for layer in range(2):
                assert held_at(evict_at[layer], 0, seen) == cache.positions(layer, 0).tolist()
    assert (torch.cat(logits) - simulated[0]).abs().max() < 1e-9
    assert cache.stats()[0]["peak_entries"] > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_decisions_replayed_through_the_cache(policy, dtype):
    """The simulation's own q, k, v, given token by token to the cache, give the same kept sets in any dtype."""
    model = tiny_model(dtype=dtype, vocab=6)
    config = EvictionConfig(policy=policy, budget=32, window=8, sinks=2)
    prompts = [9, 45]
    for walked, held in replayed(model, config, rows_of(prompts, steps=80, vocab=6), prompts):
        assert walked == held


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [8, 40, 512, 5000])
def test_end_to_end_float32(vocab):
    """Prefill and one-token products round differently; 99% of the kept sets agree, and then the logits do."""
    equal = compared = 0
    for seed in range(10):
        model = tiny_model(dtype=torch.float32, vocab=vocab, seed=seed)
        policy = ["vase_attnv", "snapkv", "vase_dkv", "evict_large", "random"][seed % 5]
        config = EvictionConfig(policy=policy, budget=32, window=8, sinks=2, seed=seed)
        rows = rows_of([12, 40], steps=90, vocab=vocab, seed=seed)
        simulated, evict_at = simulate(model, config, rows, [12, 40], [0, 1])
        decoded, held, _ = decode(model, config, rows, [12, 40], [0, 1])
        same, count = sets_equal(evict_at, held)
        equal, compared = equal + same, compared + count
        if same == count:
            assert max((a - b).abs().max() for a, b in zip(simulated, decoded, strict=True)) < 1e-4
    assert equal >= 0.99 * compared > 500


@pytest.mark.parametrize("policy", ["vase_attnv", "vase_dkv", "snapkv", "random"])
def test_rows_are_independent(policy):
    """A row's result does not depend on the batch, on padding or on where it sits; by simulation and by decoding."""
    model = tiny_model()
    config = EvictionConfig(policy=policy, budget=24, window=8, sinks=2)
    prompts, order = [5, 17, 33], [2, 0, 1]
    rows = rows_of(prompts, steps=45)
    streams = [10, 11, 12]
    together, evict_at = simulate(
        model, config, [rows[i] for i in order], [prompts[i] for i in order], [streams[i] for i in order]
    )
    decoded, held, _ = decode(
        model, config, [rows[i] for i in order], [prompts[i] for i in order], [streams[i] for i in order]
    )
    for place, i in enumerate(order):
        alone, alone_at = simulate(model, config, [rows[i]], [prompts[i]], [streams[i]])
        alone_decoded, alone_held, _ = decode(model, config, [rows[i]], [prompts[i]], [streams[i]])
        assert (together[place] - alone[0]).abs().max() < 1e-9
        assert (decoded[place] - alone_decoded[0]).abs().max() < 1e-9
        length = len(rows[i])
        for layer in range(2):
            wide = evict_at[layer][place, :, :length].clamp(max=length + 1)
            assert torch.equal(wide, alone_at[layer][0])
        assert held[place].keys() == alone_held[0].keys()
        for seen in held[place]:
            for layer, positions in held[place][seen].items():
                assert torch.equal(positions, alone_held[0][seen][layer])


def test_generation_equals_teacher_forcing_and_is_row_independent():
    model = tiny_model(vocab=200)
    config = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2)
    prompts = [[7, 8, 9], list(range(20, 55)), [3, 3, 3, 3, 3, 3, 90]]

    def generate(rows, streams):
        width = max(map(len, rows))
        ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
        cache = EvictionCache(config, model.config, streams)
        out = model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), past_key_values=cache, max_new_tokens=60, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences[:, width:], torch.stack(out.logits, 1), cache

    tokens, logits, cache = generate(prompts, [0, 1, 2])
    for row, prompt in enumerate(prompts):
        alone, alone_logits, alone_cache = generate([prompt], [row])
        assert torch.equal(tokens[row], alone[0])
        assert (logits[row] - alone_logits[0]).abs().max() < 1e-9
        simulated, evict_at = simulate(model, config, [[*prompt, *tokens[row].tolist()]], [len(prompt)], [row])
        assert (simulated[0][len(prompt) - 1 : -1] - logits[row]).abs().max() < 1e-5  # generate returns float32
        for layer in range(2):
            assert torch.equal(cache.positions(layer, row), alone_cache.positions(layer, 0))
            # the last token was never given to the cache
            seen = len(prompt) + 59
            assert held_at(evict_at[layer], 0, seen) == cache.positions(layer, row).tolist()


def test_several_sequences_a_prompt_draw_their_own_noise():
    model = tiny_model(vocab=200)
    config = EvictionConfig(policy="random", budget=16, window=4, sinks=2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    cache = EvictionCache(config, model.config, [4, 9])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=30, do_sample=True,
        num_return_sequences=2,
    )  # fmt: skip
    for row, stream in enumerate([(4, 0), (4, 1), (9, 0), (9, 1)]):
        _, evict_at = simulate(model, config, [out[row].tolist()], [3], [stream])
        assert held_at(evict_at[0], 0, 32) == cache.positions(0, row).tolist()
    assert not torch.equal(cache.positions(0, 0), cache.positions(0, 1))
