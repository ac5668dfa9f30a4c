"""Faults and limits: whatever is given, a clear error or a correct result."""

import json
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import held_at, right_padded, rows_of, simulate, tiny_model

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.logits import LayerInputs, LogitForm
from vkvtrain.policies import POLICIES

EVICTING = [name for name in POLICIES if name != "full"]
CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
WORDS = st.text(string.printable, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable, max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from([*EvictionConfig.model_fields, "bugdet"])
SENSIBLE = {
    "policy": st.sampled_from(list(POLICIES)),
    "budget": st.integers(-8, 300),
    "window": st.integers(-2, 70),
    "sinks": st.integers(-2, 70),
    "protected_fraction": st.none() | st.floats(-0.5, 1.5),
    "measure": st.sampled_from(["range", "variance", "l2", "random", "L2"]),
    "retention": st.none() | st.sampled_from(["sampled", "top_k", "top"]),
    "policy_args": st.dictionaries(st.sampled_from(["rank", "lam", "x"]), JSON, max_size=2),
}


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.fixed_dictionaries({}, optional=SENSIBLE))
def test_any_configuration_is_refused_in_one_sentence_or_holds(odd, sensible):
    try:
        config = EvictionConfig(**{**odd, **sensible})
    except ValueError as refused:
        message = str(refused)
        assert message.splitlines() == [message]
        assert "pydantic" not in message
        return
    assert set(odd) <= set(EvictionConfig.model_fields)
    assert EvictionConfig(**json.loads(config.model_dump_json())) == config
    if config.evicts:
        assert config.budget > config.window >= 1
        assert config.budget % config.window == 0
        assert 0 <= config.sinks < config.budget - config.window


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_refused_or_holds(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("config")
    (directory / "eviction_config.json").write_bytes(content)
    try:
        config = EvictionConfig.from_pretrained(directory)
    except ValueError as refused:
        message = str(refused)
        assert str(directory) in message
        assert message.splitlines() == [message]
    else:
        assert isinstance(config, EvictionConfig)


TURNS = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 17)), max_size=4)
"""Of each later turn: tokens decoded before it, and those of its chunk (one token is decoding)."""


@settings(max_examples=60)
@given(st.integers(1, 20), TURNS, st.integers(0, 20), st.sampled_from(EVICTING), st.integers(1, 4))
def test_any_sequence_of_calls(prompt, turns, last, policy, window):
    """Prompt, tokens and chunks in any order: what the simulation of the same chunks says."""
    pieces = [prompt, *(piece for decoded, chunk in turns for piece in [1] * decoded + [chunk]), *[1] * last]
    model = tiny_model(layers=1)
    config = EvictionConfig(policy=policy, budget=3 * window, window=window, sinks=1)
    tokens = rows_of([sum(pieces)], steps=0)[0]
    cache = EvictionCache(config, model.config)
    chunks, logits, seen = [], [], 0
    for number, piece in enumerate(pieces):
        ids = torch.tensor([tokens[seen : seen + piece]])
        with torch.no_grad():
            logits.append(model(input_ids=ids, past_key_values=cache).logits[0])
        if number == 0 or piece > 1:
            chunks.append((seen, seen + piece))
        seen += piece
    simulated, evict_at = simulate(model, config, [tokens], [chunks], [0])
    assert held_at(evict_at[0], 0, seen) == cache.positions(0, 0).tolist()
    assert (torch.cat(logits) - simulated[0]).abs().max() < 1e-9


def replay(config, query, key, value, prompts):
    """The cache layer by itself, on tensors [rows, heads, S, D]: (outputs, positions held)."""
    model = tiny_model(layers=1)
    cache = EvictionCache(config, model.config)
    outputs = []
    for start, end in [(0, prompts), *((i, i + 1) for i in range(prompts, key.shape[2]))]:
        k, v = cache.update(key[:, :, start:end], value[:, :, start:end], 0)
        layer = cache.layers[0]
        outputs.append(layer.attend(LayerInputs(query[:, :, start:end], k, v, LogitForm(0.25)), None))
    return torch.cat(outputs, 1), [cache.positions(0, row) for row in range(key.shape[0])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("policy", EVICTING)
def test_not_a_number_stays_in_its_row(policy, which, bad):
    """NaN and infinity: the other rows are untouched, and the row itself still holds `budget` different entries."""
    config = CONFIG.model_copy(update={"policy": policy})
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, heads, 50, 16, generator=generator) for heads in (4, 2, 2)]
    clean_outputs, clean = replay(config, *tensors, 8)
    tensors[which][1, 0, 13, 3] = bad
    outputs, held = replay(config, *tensors, 8)
    for row in (0, 2):
        assert torch.equal(outputs[row], clean_outputs[row])
        assert torch.equal(held[row], clean[row])
    assert (held[1].diff(dim=-1) > 0).all()
    assert (held[1][:, :2] == torch.arange(2)).all()
    assert (held[1][:, -4:] == torch.arange(46, 50)).all()
    assert not torch.equal(outputs[1], clean_outputs[1])


@pytest.mark.parametrize("length", [1, 5, 16, 17, 19])
@pytest.mark.parametrize("policy", EVICTING)
def test_a_sequence_within_the_budget_is_never_evicted(policy, length):
    config = CONFIG.model_copy(update={"policy": policy})
    model = tiny_model(layers=1)
    _, evict_at = simulate(model, config, [[7] * length], [1], [0])
    assert (evict_at[0] == length + 1).all()


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, int])
def test_integers_of_every_kind(kind):
    """Lengths and streams may come from NumPy or from a tensor."""
    model = tiny_model(layers=1)
    ids, mask = right_padded(rows_of([5, 9], steps=30))
    with torch.no_grad(), simulated_eviction(model, CONFIG, [kind(5), kind(9)], [kind(3), (kind(4), 1)]) as trace:
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), simulated_eviction(model, CONFIG, [5, 9], [3, (4, 1)]) as expected:
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(trace.evict_at[0], expected.evict_at[0])


@pytest.mark.parametrize(
    ("prompts", "streams", "message"),
    [
        ([], None, "prompt_lengths is empty"),
        ([2.5, 3], None, "whole numbers or lists of .* got 2.5"),
        (["5", 3], None, "whole numbers or lists of .* got '5'"),
        ([None, 3], None, "whole numbers or lists of"),
        ([[], 3], None, "first chunk must start at position 0"),
        ([[(0, 5), (4, 8)], 3], None, "ascending and disjoint"),
        ([[(0, 5), 7], 3], None, "pairs"),
        ([[(0, 5.5)], 3], None, "pairs of whole numbers"),
        ([-1, 3], None, "must be positive, got -1"),
        ([5, 3], [0], "streams has 1 entries for 2"),
        ([5, 3], [0, 1.5], "ints or tuples of ints, got 1.5"),
        ([5, 3], [0, torch.tensor(1.5)], "ints or tuples of ints"),
        ([5, 3], [0, 2**70], "does not fit 64 bits"),
        ([5, 3], [0, True], "ints or tuples of ints, got True"),
    ],
)
def test_arguments_that_make_no_sense(prompts, streams, message):
    with pytest.raises(ValueError, match=message), simulated_eviction(tiny_model(layers=1), CONFIG, prompts, streams):
        pass


def test_rows_without_tokens():
    model = tiny_model(layers=1)
    ids, mask = torch.full((2, 6), 7), torch.tensor([[1] * 6, [0] * 6])
    with (
        pytest.raises(ValueError, match="row 1 of the batch is all padding"),
        simulated_eviction(model, CONFIG, [3, 3]),
    ):
        model(input_ids=ids, attention_mask=mask)
    nothing = torch.zeros(2, 2, 0, 16)
    with pytest.raises(ValueError, match="given no tokens"):
        EvictionCache(CONFIG, model.config).update(nothing, nothing, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_masks_of_every_dtype(dtype):
    model = tiny_model(layers=1)
    ids, mask = right_padded(rows_of([5, 5], steps=30) + rows_of([9], steps=20))
    with torch.no_grad(), simulated_eviction(model, CONFIG, [5, 5, 9]) as expected:
        logits = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad(), simulated_eviction(model, CONFIG, [5, 5, 9]) as trace:
        same = model(input_ids=ids, attention_mask=mask.to(dtype)).logits
    assert torch.equal(trace.evict_at[0], expected.evict_at[0])
    assert torch.equal(logits, same)
