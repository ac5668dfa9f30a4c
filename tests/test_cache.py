"""The decoding cache: what it holds, what it costs, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from passes import decode, held_at, left_padded, simulate, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.events import evictions_by, peak_entries

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 50), st.integers(1, 5), st.integers(2, 4),
    st.sampled_from(["vase_attnv", "curdkv", "snapkv", "random", "streaming", "evict_large"]),
    st.sampled_from([(2, 2), (4, 2)]),
)  # fmt: skip
def test_what_the_cache_holds(prompts, steps, window, times, policy, heads):
    """After an event: `budget` ascending positions, window and sinks among them, and nothing that was gone."""
    budget, sinks = window * times, min(2, window * (times - 1) - 1)
    config = EvictionConfig(policy=policy, budget=budget, window=window, sinks=sinks)
    model = tiny_model(heads=heads[0], kv_heads=heads[1], layers=1)
    generator = torch.Generator().manual_seed(steps)
    rows = [torch.randint(1, 9, (prompt + steps,), generator=generator).tolist() for prompt in prompts]
    _, held, cache = decode(model, config, rows, prompts, list(range(len(rows))))
    for row, prompt in enumerate(prompts):
        length = prompt + steps
        stats = cache.stats()[row]
        assert stats["evictions"] == len(held[row]) == evictions_by(prompt, length, budget, window)
        assert stats["peak_entries"] == peak_entries(prompt, length, budget, window)
        assert stats["live_entries"] == cache.positions(0, row).shape[1]
        gone = torch.zeros(heads[1], length, dtype=torch.bool)
        for seen, layers in held[row].items():
            positions = layers[0]
            assert positions.shape == (heads[1], budget)
            assert (positions.diff(dim=-1) > 0).all()
            assert (positions[:, :sinks] == torch.arange(sinks)).all()
            assert (positions[:, -window:] == torch.arange(seen - window, seen)).all()
            assert not gone.gather(1, positions).any()
            gone[:, :seen] = True
            gone.scatter_(1, positions, False)


def test_full_is_the_stock_cache():
    model = tiny_model(vocab=200)
    ids, mask = left_padded([[5, 6, 7, 8], [9, 3], [50] * 7])
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    cache = EvictionCache(EvictionConfig(policy="full"), model.config)
    assert torch.equal(model.generate(**arguments, past_key_values=cache), model.generate(**arguments))
    assert cache.positions(0, 1).tolist() == [list(range(41))] * 2
    assert [row["evictions"] for row in cache.stats()] == [0, 0, 0]


def test_storage_is_bounded_and_released():
    """Rows x heads x (budget + window) entries a layer; more only until a long prompt's first event."""
    model = tiny_model(dtype=torch.float32)
    cache = EvictionCache(CONFIG, model.config)
    entry = 2 * 16 * 4  # key and value, head dimension 16, float32
    bound = 2 * 2 * 2 * (16 + 4) * entry  # layers, rows, KV heads
    ids = torch.ones(2, 50, dtype=torch.long)
    sizes = []
    for step in range(30):
        model(input_ids=ids if step == 0 else ids[:, :1], past_key_values=cache)
        sizes.append(cache.allocated_bytes)
    assert sizes[0] >= 2 * 2 * 2 * 50 * entry
    assert sizes[1] > bound  # 51 entries: the first event comes with the 52nd
    assert all(size == bound for size in sizes[2:])
    for row in cache.stats():
        assert row["bytes"] == 2 * 2 * row["live_entries"] * entry
        assert row["peak_bytes"] == 2 * 2 * 52 * entry
    short = EvictionCache(CONFIG, model.config)
    for step in range(40):
        model(input_ids=ids[:, :3] if step == 0 else ids[:, :1], past_key_values=short)
        assert short.allocated_bytes == bound
    assert short.stats()[0]["peak_entries"] == 20


def test_the_same_cache_continues_and_reset_starts_afresh():
    model = tiny_model(vocab=200)
    cache = EvictionCache(CONFIG, model.config, [7])
    first = model.generate(IDS, past_key_values=cache, max_new_tokens=30, do_sample=False)
    turn = torch.tensor([[11, 12, 13, 14, 15]])
    second = model.generate(torch.cat([first, turn], 1), past_key_values=cache, max_new_tokens=30, do_sample=False)
    # the last generated token opens the second chunk: it was never given to the cache
    _, evict_at = simulate(model, CONFIG, second.tolist(), [[(0, 6), (35, 41)]], [7])
    assert cache.stats()[0]["evictions"] == evictions_by([(0, 6), (35, 41)], 70, 16, 4) == 11
    for layer in range(2):
        assert held_at(evict_at[layer], 0, 70) == cache.positions(layer, 0).tolist()
    cache.reset(streams=[8])
    again = model.generate(IDS, past_key_values=cache, max_new_tokens=30, do_sample=False)
    fresh = EvictionCache(CONFIG, model.config, [8])
    assert torch.equal(model.generate(IDS, past_key_values=fresh, max_new_tokens=30, do_sample=False), again)
    assert torch.equal(cache.positions(1, 0), fresh.positions(1, 0))


def test_streams_decide_and_nothing_else():
    """The same stream gives the same cache in a new one; another stream another."""
    config = CONFIG.model_copy(update={"policy": "random"})
    model = tiny_model()
    tokens = [[3 + i % 5 for i in range(60)]]
    held = [decode(model, config, tokens, [6], [stream])[2].positions(1, 0) for stream in (4, (4, 0), 5)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])
    seeded = decode(model, config.model_copy(update={"seed": 1}), tokens, [6], [4])[2].positions(1, 0)
    assert not torch.equal(held[0], seeded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "beam search.*num_beams=1"),
        ({"prompt_lookup_num_tokens": 2}, "assist"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
    ],
)
def test_generation_that_cannot_work(arguments, message):
    model = tiny_model(vocab=200)
    cache = EvictionCache(CONFIG, model.config)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, past_key_values=cache, max_new_tokens=20, **arguments)


def test_assisted_decoding_is_refused_before_its_prefill():
    model, assistant = tiny_model(vocab=200), tiny_model(vocab=200, layers=1)
    cache = EvictionCache(CONFIG, model.config)
    with pytest.raises(ValueError, match="assist"):
        model.generate(IDS, past_key_values=cache, max_new_tokens=20, assistant_model=assistant)
    assert cache.get_seq_length() == 0


def test_direct_calls_that_cannot_work():
    model = tiny_model()
    cache = EvictionCache(CONFIG, model.config)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.positions(0, 0)
    model(input_ids=IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="repeat its rows"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="select rows"):
        cache.batch_select_indices(torch.tensor([0]))
    following = torch.arange(6, 12)[None]  # as `generate` calls in chunks: nobody asks what was seen
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model(input_ids=IDS, position_ids=following, past_key_values=cache)


def test_a_batch_of_another_size_is_refused():
    model = tiny_model()
    cache = EvictionCache(CONFIG, model.config)
    model(input_ids=IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"holds 1 rows and was given 2.*reset"):
        model(input_ids=IDS[:, :1].expand(2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "padding_side to 'left'"),
        ([[0, 0, 0], [1, 1, 1]], "row 0 of the prompt is all padding"),
    ],
)
def test_prompts_that_are_not_left_padded(mask, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(
            input_ids=torch.ones(2, 3, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            past_key_values=EvictionCache(CONFIG, model.config),
        )


def test_padding_in_a_later_chunk_is_refused():
    model = tiny_model()
    cache = EvictionCache(CONFIG, model.config)
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.ones(2, 3, dtype=torch.long)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    mask = torch.ones(2, 4, dtype=torch.long)
    model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.tensor([[0, 1, 1], [1, 1, 1]])], 1)
    with pytest.raises(ValueError, match="padding among tokens that continue"):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_streams_must_fit_the_batch():
    model = tiny_model()
    with pytest.raises(ValueError, match="streams is empty"):
        EvictionCache(CONFIG, model.config, [])
    with pytest.raises(ValueError, match="ints or tuples"):
        EvictionCache(CONFIG, model.config, ["a"])
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        model(input_ids=IDS.expand(3, 6), past_key_values=EvictionCache(CONFIG, model.config, [0, 1]))


def test_another_attention_is_an_error():
    with pytest.raises(ValueError, match=r"EvictionCache needs attn_implementation='vkvtrain'.*'sdpa'"):
        EvictionCache(CONFIG, tiny_model(attention="sdpa").config)
    model = tiny_model()
    cache = EvictionCache(CONFIG, model.config)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="did not go through vkvtrain"):
        model(input_ids=IDS, past_key_values=cache)


class Reads(TorchDispatchMode):
    """Counts what waits for a device: reads of a tensor's value, and operations whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.count += any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["vase_attnv", "h2o", "rkv", "vase_dkv"])
def test_a_decode_step_waits_for_no_device(policy):
    """Steps with and without events, rows at different lengths: nothing is read back."""
    config = CONFIG.model_copy(update={"policy": policy})
    model = tiny_model()
    cache = EvictionCache(config, model.config)
    ids, mask = left_padded([[5, 6, 7], [8] * 18, [9] * 9])
    with torch.no_grad():
        model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache
        )
        with Reads() as reads:
            assert torch.ones(1).item() == 1
            for step in range(20):
                position = torch.tensor([[3 + step], [18 + step], [9 + step]])
                model(input_ids=ids[:, -1:], position_ids=position, past_key_values=cache)
    assert min(row["evictions"] for row in cache.stats()) >= 1
    assert reads.count == 1  # our own
