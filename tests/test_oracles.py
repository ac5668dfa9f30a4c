"""The policies against oracles written from the formulas alone."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import ORACLES, Event, kept, walk

from vkvtrain import EvictionConfig
from vkvtrain.lifetimes import lifetimes, make_schedule
from vkvtrain.logits import LogitForm
from vkvtrain.noise import NoiseSource, stream_key
from vkvtrain.policies import POLICIES, Candidates
from vkvtrain.selection import Selector

EVICTING = [name for name in POLICIES if name != "full"]


def test_every_policy_has_an_oracle():
    assert set(ORACLES) == set(POLICIES)


def candidates(rows, count, window, heads, *, dim=8, seed=0, dtype=torch.float64, softcap=None):
    """Random entries whose positions differ from head to head, as after several events."""
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    held = [torch.randperm(count + 6, generator=generator)[:count].sort().values for _ in range(rows * kv_heads)]
    keys = torch.tensor([stream_key(seed, row) for row in range(rows)])
    found = normal(rows, kv_heads, count, dim)
    found[:, :, 1::3] = found[:, :, ::3][:, :, : found[:, :, 1::3].shape[2]] * 1.3  # near-duplicate directions
    return Candidates(
        positions=torch.stack(held).view(rows, kv_heads, count),
        queries=2 * normal(rows, query_heads, window, dim),
        keys=found,
        values=normal(rows, kv_heads, count, dim),
        scaling=0.4,
        noise=NoiseSource((keys[:, 0], keys[:, 1]), torch.arange(rows) + 2, 3),
        window_keys=normal(rows, kv_heads, window, dim),
        mass=normal(rows, kv_heads, count).abs(),
        softcap=softcap,
    )


def event_of(found, row, config):
    """One row of the candidates, as the oracles read it."""
    arrays = {
        name: getattr(found, name)[row].double().numpy()
        for name in ("queries", "keys", "values", "window_keys", "mass")
    }
    return Event(
        positions=found.positions[row].numpy(),
        gumbel=found.noise.gumbel(found.positions)[row].numpy(),
        uniform=found.noise.uniform(found.positions)[row].numpy(),
        projection=lambda rank, fresh: found.noise.projection(
            found.keys.shape[-1], rank, per_event=fresh
        )[row].double().numpy(),
        scaling=found.scaling, softcap=found.softcap, smooth=config.smooth, arguments=config.policy_args, **arrays,
    )  # fmt: skip


@st.composite
def cases(draw):
    policy = draw(st.sampled_from(EVICTING))
    window = draw(st.integers(1, 10))
    budget = window * draw(st.integers(2, 4))
    own = {"rkv": {"lam": 0.4}, "vase_dkv": {"rank": 5}, "nexus": {"lam": 0.9}}
    arguments = own.get(policy, {}) if draw(st.booleans()) else {}
    config = EvictionConfig(
        policy=policy, budget=budget, window=window, sinks=draw(st.integers(0, min(4, budget - window - 1))),
        protected_fraction=draw(st.sampled_from([None, 0.0, 0.3, 1.0])), protect_prompt=draw(st.booleans()),
        smooth=draw(st.booleans()), policy_args=arguments,
        retention=draw(st.sampled_from(["sampled", "top_k"])) if POLICIES[policy].has_weights else None,
    )  # fmt: skip
    if config.large_values:
        measure = draw(st.sampled_from(["range", "variance", "l2", "random"]))
        config = EvictionConfig(**{**config.model_dump(), "measure": measure})
    count = budget - window + draw(st.integers(1, 12))
    heads = draw(st.sampled_from([(4, 2), (2, 2), (3, 1), (6, 2)]))
    return config, draw(st.integers(1, 3)), count, heads, draw(st.integers(0, 999))


@settings(max_examples=400)
@given(cases(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([None, 3.0]))
def test_the_package_keeps_what_the_oracle_keeps(case, dtype, softcap):
    config, rows, count, heads, seed = case
    found = candidates(rows, count, config.window, heads, seed=seed, dtype=dtype, softcap=softcap)
    prompts = [3, 9, 40][:rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # long prompts are clipped, and say so
        slots = Selector(config)(found, prompts)
    for row in range(rows):
        expected, margin = kept(
            config.policy, event_of(found, row, config), budget=config.budget, window=config.window,
            sinks=config.sinks, prompt=prompts[row] if config.protect_prompt else None,
            fraction=config.protected_fraction, measure=config.measure, retention=config.retention,
        )  # fmt: skip
        # float32 may order scores within a few roundings of each other the other way; 64 units in its last place tie
        assume(margin > (1e-3 if dtype == torch.float32 else 1e-5))
        assert slots[row].tolist() == expected


@pytest.mark.parametrize("policy", EVICTING)
def test_every_policy_is_decided_by_its_own_score(policy):
    """Not vacuous: over some draws, the oracle of every other formula disagrees with the package."""
    config = EvictionConfig(policy=policy, budget=12, window=4, sinks=0, protected_fraction=0.0)
    differs = dict.fromkeys([name for name in EVICTING if name != policy], False)
    for seed in range(6):
        found = candidates(1, 20, 4, (4, 2), seed=seed)
        slots = Selector(config)(found, [1])[0].tolist()
        for other in differs:
            rest = {"budget": 12, "window": 4, "sinks": 0, "prompt": None, "fraction": 0.0}
            differs[other] = differs[other] or kept(other, event_of(found, 0, config), **rest)[0] != slots
    assert all(differs.values()), [name for name, differ in differs.items() if not differ]


@pytest.mark.parametrize("prompt", [1, 5, 19, 30])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "rkv", "tova", "keydiff", "knorm", "caote", "value_l2"])
def test_a_whole_sequence(policy, prompt):
    """Token by token in NumPy against the events walked in training; accumulated attention included."""
    generator = torch.Generator().manual_seed(prompt)
    queries, keys, values = (
        torch.randn(1, heads, 44, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    config = EvictionConfig(policy=policy, budget=12, window=4, sinks=1)
    schedule = make_schedule(config, [prompt], [0], [44], 44, torch.device("cpu"))
    ours = lifetimes(2 * queries, keys, values, schedule, Selector(config), 0, LogitForm(0.4))
    expected = walk(
        policy, 2 * queries[0].numpy(), keys[0].numpy(), values[0].numpy(), prompt,
        budget=12, window=4, sinks=1, scaling=0.4,
    )  # fmt: skip
    assert (expected <= 44).any()
    assert np.array_equal(ours[0].numpy(), expected)


def score(policy, found, **arguments):
    return POLICIES[policy](**arguments).score(found, smooth=False)


def test_rkv_exempts_only_the_newest_near_duplicate():
    """Three equal keys: each one's row of cosines loses its newest entry alone, so two, one and none are counted."""
    found = candidates(1, 6, 2, (1, 1))
    keys = torch.eye(8, dtype=torch.float64)[:6].clone()
    keys[1] = keys[3] = keys[4]
    window_keys = torch.eye(8, dtype=torch.float64)[6:8]
    found = replace(found, keys=keys[None, None], window_keys=window_keys[None, None])
    redundant = -score("rkv", found, lam=0.0)[0, 0]
    assert (redundant / redundant[0]).log().tolist() == pytest.approx([0, 2 / 8, 0, 1 / 8, 0, 0], abs=1e-6)
    plain = -score("rkv_vase", found, lam=0.0)[0, 0]
    assert (plain / plain[0]).log().tolist() == pytest.approx([0, 2 / 6, 0, 2 / 6, 2 / 6, 0], abs=1e-6)
    other = replace(found, window_keys=-window_keys[None, None] + keys[1])
    assert torch.equal(score("rkv_vase", other, lam=0.0)[0, 0], -plain)  # among candidates only
    assert not torch.equal(score("rkv", other, lam=0.0)[0, 0], -redundant)


def test_caote_keeps_the_candidate_that_is_the_whole_output():
    found = candidates(1, 5, 2, (1, 1))
    keys = torch.zeros(1, 1, 5, 8, dtype=torch.float64)
    keys[..., 2, :] = 1e4 * found.queries.sign()[:, :, 0].view(1, 1, 8)
    found = replace(found, keys=keys, queries=found.queries.sign()[:, :, :1].expand(-1, -1, 2, -1))
    assert score("caote", found)[0, 0].argmax() == 2
    assert score("caote", found)[0, 0, 2] == torch.inf
    assert score("caote", found).isfinite().sum() == 4


def test_keydiff_measures_from_the_window_too():
    found = candidates(1, 5, 2, (1, 1))
    other = replace(found, window_keys=-found.window_keys)
    assert not torch.allclose(score("keydiff", found), score("keydiff", other))


def test_tova_is_one_decision_where_the_heads_hold_the_same():
    found = candidates(1, 9, 3, (4, 2))
    found = replace(found, positions=torch.arange(9).expand(1, 2, -1))
    scores = score("tova", found)
    assert torch.equal(scores[:, 0], scores[:, 1])
