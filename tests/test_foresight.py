"""What is decided for all layers at once equals the walk over each layer's events, and that walk is really skipped."""

import warnings

import pytest
import torch
from families import tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import right_padded, rows_of, simulate, tiny_model
from test_packing import CONFIG as PACKED
from test_packing import assert_same, packed_step

from vkvtrain import EvictionConfig, foresight, simulated_eviction
from vkvtrain.attention import segments
from vkvtrain.foresight import Foresight
from vkvtrain.lifetimes import lifetimes, make_schedule
from vkvtrain.logits import LogitForm
from vkvtrain.policies import POLICIES
from vkvtrain.selection import Selector

CPU = torch.device("cpu")


def is_data_independent(policy, **settings):
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=2, **settings)
    return config.evicts and Selector(config).data_independent


FORESEEN = [policy for policy in POLICIES if is_data_independent(policy)]


def test_which_settings_look_at_no_data():
    assert {"random", "streaming"} <= set(FORESEEN)
    # large values are looked at by any policy that protects them, but not where the sinks take their whole share
    for policy in FORESEEN:
        assert not is_data_independent(policy, protected_fraction=0.25)
        assert is_data_independent(policy, protected_fraction=0.125)
        assert is_data_independent(policy, protected_fraction=0.25, measure="random")
    for policy in ("snapkv", "h2o", "knorm", "keydiff", "evict_large", "full"):
        assert not is_data_independent(policy, protected_fraction=0.0)
    config = EvictionConfig(policy="streaming", budget=16, window=4, sinks=2)
    assert Selector(config).keeps_newest
    assert not Selector(config.model_copy(update={"protected_fraction": 0.25})).keeps_newest
    at_random = config.model_copy(update={"protected_fraction": 0.25, "measure": "random"})
    assert not Selector(at_random).keeps_newest
    assert not Selector(config.model_copy(update={"policy": "random"})).keeps_newest


@st.composite
def passes(draw):
    """(configuration, chunks of each row, streams, lengths, width, KV heads of each evicting layer)."""
    window = draw(st.integers(1, 6))
    budget = window * draw(st.integers(2, 5))
    config = EvictionConfig(
        policy=draw(st.sampled_from(FORESEEN)), budget=budget, window=window,
        sinks=draw(st.integers(0, min(4, budget - window - 1))), protect_prompt=draw(st.booleans()),
        protected_fraction=draw(st.sampled_from([None, 0.0])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    at_random = config.model_copy(update={"protected_fraction": 0.5, "measure": "random"})
    if at_random.large_values and draw(st.booleans()):
        config = at_random
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    prompts = []
    for length in lengths:
        prompt = draw(st.integers(1, length))
        chunks = [(0, prompt)]
        while length - prompt > 4 and draw(st.booleans()):  # a later turn
            start = draw(st.integers(prompt, length - 2))
            prompt = draw(st.integers(start + 1, min(length, start + 3 * window + 1)))
            chunks.append((start, prompt))
        prompts.append(chunks)
    stream = st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)))
    streams = [draw(stream) for _ in lengths]
    heads = draw(st.dictionaries(st.integers(0, 9), st.integers(1, 3), min_size=1, max_size=4))
    return config, prompts, streams, lengths, max(lengths) + draw(st.integers(0, 3)), heads


@settings(max_examples=150)
@given(passes(), st.sampled_from([1, 200, 2**16]))
def test_all_layers_at_once_equal_a_walk_for_each(drawn, entries):
    """However many layers are walked together, and whichever asks first."""
    config, prompts, streams, lengths, width, heads = drawn
    schedule = make_schedule(config, prompts, streams, lengths, width, CPU)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a long prompt is clipped, and says so
        patch.setattr(foresight, "_ENTRIES", entries)
        at_once = Foresight(Selector(config), sorted(heads))
        for layer, count in heads.items():
            data = torch.randn(len(lengths), count, width, 4)
            alone = lifetimes(data, data, data, schedule, Selector(config), layer, LogitForm(0.5))
            ours = at_once.evict_at(layer, count, schedule)
            assert ours.dtype == torch.int64
            assert torch.equal(ours, alone)


def test_the_draws_differ_from_layer_to_layer():
    config = EvictionConfig(policy="random", budget=16, window=4, sinks=2)
    schedule = make_schedule(config, [3, 20], [0, 1], [60, 50], 60, CPU)
    at_once = Foresight(Selector(config), [0, 1])
    assert not torch.equal(at_once.evict_at(0, 2, schedule), at_once.evict_at(1, 2, schedule))


@pytest.mark.parametrize("policy", FORESEEN)
def test_layers_on_another_device(policy):
    """With a device map a layer finds its part where it lies; `meta` stands in for the second device."""
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=2)
    schedule = make_schedule(config, [3, 20], [0, 1], [60, 50], 60, CPU)
    at_once = Foresight(Selector(config), [0, 1])
    assert at_once.evict_at(0, 2, schedule).device == CPU
    elsewhere = at_once.evict_at(1, 2, schedule.on(torch.device("meta")))
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", (2, 2, 60))


# Whole passes

CONFIG = EvictionConfig(policy="random", budget=16, window=4, sinks=2)
PROMPTS = [6, [(0, 20), (30, 37)]]
ROWS = [row + [9] * (11 * number) for number, row in enumerate(rows_of([6, 20], steps=40))]


def training_step(model, config):
    """(logits of each row, gradients, evict_at of each layer), and how many events were decided by a Selector."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = Selector.__call__
        patch.setattr(Selector, "__call__", lambda *arguments: calls.append(1) or original(*arguments))
        model.zero_grad()
        ids, mask = right_padded(ROWS)
        with simulated_eviction(model, config, PROMPTS, [4, (2, 1)]) as trace:
            with torch.no_grad(), trace.suspended():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            assert not calls
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            parts = [logits[row, : len(its)] for row, its in enumerate(ROWS)]
            torch.stack([part.logsumexp(-1).square().sum() for part in parts]).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return (parts, gradients, trace.evict_at), len(calls)


def walking(step, *arguments):
    """The same with a walk over each layer's events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selector, "data_independent", False)
        return step(*arguments)


def checkpointed(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", FORESEEN)
def test_a_training_step_decides_once(policy, checkpointing):
    config = CONFIG.model_copy(update={"policy": policy, "skip_layers": (1,)})
    model = tiny_model(layers=4)
    ours, calls = training_step(checkpointed(model) if checkpointing else model, config)
    theirs, calls_of_walks = walking(training_step, tiny_model(layers=4), config)
    assert_same(ours, theirs)
    assert all(((at > 0) & (at <= 46)).any() for layer, at in ours[2].items() if layer != 1)
    schedule = make_schedule(config, PROMPTS, [0, 1], [len(row) for row in ROWS], len(ROWS[1]), CPU)
    events = sum(len({block.live for block in at}) for at in _by_number([row.blocks for row in schedule.sequences]))
    assert calls_of_walks == 3 * events > 20  # layers that evict
    assert calls == (0 if Selector(config).keeps_newest else events)


def _by_number(of_rows):
    """The events of all rows that come first, second, ...: those that hold equally many entries are one call."""
    of_rows = [[block for block in blocks if block.event is not None] for blocks in of_rows]
    return [[its[number] for its in of_rows if number < len(its)] for number in range(max(map(len, of_rows)))]


def test_protected_large_values_are_looked_at():
    """The walk is each layer's own then, decided and attended at once on a CPU."""
    config = CONFIG.model_copy(update={"protected_fraction": 0.5})
    assert training_step(tiny_model(layers=3), config)[1] == 3 * training_step(tiny_model(layers=3), CONFIG)[1]


@pytest.mark.parametrize("policy", FORESEEN)
def test_attention_alone_runs_afterwards(policy, monkeypatch):
    monkeypatch.setattr(segments, "attend_and_decide", None)
    training_step(tiny_model(), CONFIG.model_copy(update={"policy": policy}))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "gpt-oss"])
@pytest.mark.parametrize("policy", FORESEEN)
def test_packed_documents_and_sliding_layers(policy, family):
    config = PACKED.model_copy(update={"policy": policy})
    assert_same(packed_step(tiny_family(family), config), walking(packed_step, tiny_family(family), config))


def test_a_clipped_prompt_is_said_once_and_only_where_rows_evict():
    config = EvictionConfig(policy="streaming", budget=16, window=4, sinks=2, protect_prompt=True)
    rows = rows_of([14, 13], steps=20)
    with pytest.warns(UserWarning, match="a prompt of 14 tokens does not fit budget - window - 1 = 11") as warned:
        simulate(tiny_model(layers=3), config, rows, [14, 13], None)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(tiny_model(), config, [rows[0][:15], rows[1]], [14, 11], None)
