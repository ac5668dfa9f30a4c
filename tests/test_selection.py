"""Selection: protection, sampling without replacement, ties; and the scores, against slow loops."""

import warnings
from dataclasses import dataclass, fields, replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from passes import decode, rows_of, simulate, tiny_model
from scipy import stats

from vkvtrain import EvictionConfig
from vkvtrain.noise import NoiseSource, stream_key
from vkvtrain.policies import POLICIES, Candidates, round_mantissa
from vkvtrain.policies.base import Policy, value_norm, value_range, value_variance, window_attention
from vkvtrain.selection import Selector, ranks, tied_at_the_cut, top

PER_ROW = ("positions", "queries", "keys", "values", "window_keys", "mass")


def candidates(count, rows=1, heads=2, kv_heads=1, window=4, dim=8, seed=0, dtype=torch.float32, first=0, streams=None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.tensor([stream_key(seed, stream) for stream in (range(rows) if streams is None else streams)])
    return Candidates(
        positions=torch.arange(first, first + count).expand(rows, kv_heads, -1),
        queries=torch.randn(rows, heads, window, dim, generator=generator, dtype=dtype),
        keys=torch.randn(rows, kv_heads, count, dim, generator=generator, dtype=dtype),
        values=torch.randn(rows, kv_heads, count, dim, generator=generator, dtype=dtype),
        scaling=0.5,
        noise=NoiseSource((keys[:, 0], keys[:, 1]), torch.zeros(rows, dtype=torch.int64), 0),
        window_keys=torch.randn(rows, kv_heads, window, dim, generator=generator, dtype=dtype),
        mass=torch.rand(rows, kv_heads, count, generator=generator, dtype=dtype),
    )


def with_ranges(found, ranges):
    """The same candidates with these value ranges."""
    values = torch.zeros_like(found.values)
    values[..., 0] = torch.as_tensor(ranges, dtype=values.dtype)
    return replace(found, values=values)


def select(config, found, prompts=None):
    return Selector(config)(found, prompts or [1] * found.positions.shape[0])


class Weighted(Policy):
    """Samples with given weights."""

    samples = True

    def __init__(self, weights):
        object.__setattr__(self, "weights", torch.as_tensor(weights))

    def score(self, candidates, smooth):
        return self.weights.expand(candidates.positions.shape).float()


def sampler(weights, keep, window=1):
    selector = Selector(EvictionConfig(policy="random", budget=keep + window, window=window, sinks=0))
    selector.policy = Weighted(weights)
    return selector


WEIGHTS = [0.05, 0.1, 0.15, 0.2, 0.22, 0.28]
DRAWS = 20_000


def test_the_first_draw_is_in_proportion_to_the_weights():
    slots = sampler(WEIGHTS, keep=1)(candidates(6, rows=DRAWS), [1] * DRAWS)
    counts = torch.bincount(slots.flatten(), minlength=6)
    assert stats.chisquare(counts.numpy(), [w * DRAWS for w in WEIGHTS]).pvalue > 1e-3


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_inclusion_is_that_of_sequential_sampling_without_replacement(keep):
    """Exact: every ordered draw of `keep` of six candidates, enumerated."""
    inclusion, sets = [0.0] * 6, {}
    for order in permutations(range(6), keep):
        probability, left = 1.0, 1.0
        for drawn in order:
            probability, left = probability * WEIGHTS[drawn] / left, left - WEIGHTS[drawn]
        for drawn in order:
            inclusion[drawn] += probability
        sets[tuple(sorted(order))] = sets.get(tuple(sorted(order)), 0) + probability
    slots = sampler(WEIGHTS, keep)(candidates(6, rows=DRAWS), [1] * DRAWS)
    found = torch.bincount(slots.flatten(), minlength=6) / DRAWS
    for value, expected in zip(found.tolist(), inclusion, strict=True):
        assert abs(value - expected) < 4.5 * (expected * (1 - expected) / DRAWS) ** 0.5
    drawn = [tuple(one) for one in slots[:, 0].tolist()]
    counts = [drawn.count(one) for one in sets]
    assert stats.chisquare(counts, [probability * DRAWS for probability in sets.values()]).pvalue > 1e-3


def test_vase_samples_the_window_attention():
    """The real policy, without protection: the first draw of many streams follows `a`."""
    selector = Selector(EvictionConfig(policy="vase_attnv", budget=8, window=4, sinks=0, protected_fraction=0))
    selector.keep = 1
    one = candidates(7)
    weights = window_attention(one, smooth=True)[0, 0]
    many = candidates(7, rows=DRAWS)
    many = Candidates(
        many.positions,
        one.queries.expand(DRAWS, -1, -1, -1),
        one.keys.expand(DRAWS, -1, -1, -1),
        one.values.expand(DRAWS, -1, -1, -1),
        0.5,
        many.noise,
    )
    counts = torch.bincount(selector(many, [1] * DRAWS).flatten(), minlength=7)
    expected = weights.double() / weights.double().sum()  # smoothing counts padding, so `a` does not sum to one
    assert stats.chisquare(counts.numpy(), (expected * DRAWS).numpy()).pvalue > 1e-3


def test_zero_weights_are_taken_last_newest_first():
    slots = sampler([0.0, 1.0, 0.0, 0.5, 0.0, 0.0], keep=4)(candidates(6, rows=50), [1] * 50)
    assert (slots == torch.tensor([1, 3, 4, 5])).all()
    assert (sampler([1e-300] * 6, keep=2)(candidates(6, rows=3), [1] * 3) == torch.tensor([4, 5])).all()


def test_ties_go_to_the_newest():
    assert top(torch.tensor([[3, 7, 7, 7, 1]]), 2).tolist() == [[2, 3]]
    found = with_ranges(candidates(10), [1.0, 1.0001, 1.0002, 3, 1, 1, 1, 1, 1, 1])
    config = EvictionConfig(policy="evict_large", budget=6, window=2, sinks=0)
    assert select(config, found).tolist() == [[[6, 7, 8, 9]]]  # the first three tie with the others at 10 bits


def test_sinks_are_positions_and_not_slots():
    config = EvictionConfig(policy="evict_large", budget=6, window=2, sinks=3)
    ranges = [9.0, 8, 7, 6, 1, 1, 1, 1]
    assert select(config, with_ranges(candidates(8), ranges)).tolist() == [[[0, 1, 2, 7]]]
    assert select(config, with_ranges(candidates(8, first=2), ranges)).tolist() == [[[0, 5, 6, 7]]]


def test_large_values_are_protected_up_to_the_fraction_sinks_counted():
    """floor(0.25 * 24) = 6 protected as sinks or large values: two sinks, the four largest others."""
    config = EvictionConfig(policy="streaming", budget=24, window=4, sinks=2, protected_fraction=0.25)
    ranges = torch.ones(40)
    ranges[[0, 5, 9, 11, 13, 17]] = torch.tensor([50.0, 9, 8, 7, 6, 5])
    kept = select(config, with_ranges(candidates(40), ranges))[0, 0].tolist()
    assert kept[:6] == [0, 1, 5, 9, 11, 13]
    assert kept[6:] == list(range(26, 40))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_a_fraction_overrides_every_policys_own(name):
    ranges = torch.ones(60)
    ranges[[20, 30, 31]] = torch.tensor([5.0, 7, 6])
    found = with_ranges(candidates(60, rows=20), ranges)
    config = EvictionConfig(policy=name, budget=28, window=4, sinks=2, protected_fraction=0.18)  # 5 of 28
    kept = select(config, found)
    assert all({0, 1, 20, 30, 31} <= set(row) for row in kept[:, 0].tolist())
    assert Selector(config).large == 3
    assert Selector(config.model_copy(update={"protected_fraction": 0.0})).large == 0
    own = Selector(config.model_copy(update={"protected_fraction": None})).large
    assert own == (5 if name == "vase_attnv" else 0)  # 28 // 4 less two sinks


MEASURED = {
    "range": [[9.0, 0, 0, 0], [0, -9.5, 0, 0]],
    "variance": [[4.2, -4.2, 4.2, -4.2], [4.3, 4.3, -4.3, -4.3]],
    "l2": [[20.0, 20, 20, 20], [25, 25, 25, 25]],
}
"""Two values that are the largest by one measure and not by the others."""


@pytest.mark.parametrize("policy", ["vase_attnv", "snapkv", "h2o", "rkv", "random", "evict_large", "knorm"])
@pytest.mark.parametrize("measure", MEASURED)
def test_a_measure_says_which_values_are_large(measure, policy):
    found = candidates(30, rows=20, dim=4, heads=2)
    values = torch.zeros_like(found.values)
    for number, large in enumerate(MEASURED.values()):
        values[..., 8 + 2 * number : 10 + 2 * number, :] = torch.tensor(large)
    first = 8 + 2 * list(MEASURED).index(measure)
    config = EvictionConfig(
        policy=policy, budget=16, window=4, sinks=2, protected_fraction=0.25, measure=measure,
        retention="top_k" if policy == "snapkv" else None,
    )  # fmt: skip
    kept = select(config, replace(found, values=values))
    assert all({0, 1, first, first + 1} <= set(row) for row in kept[:, 0].tolist())


@pytest.mark.parametrize("policy", ["random", "streaming", "vase_attnv"])
def test_random_protection_is_uniform_and_independent_of_the_sampling(policy):
    """Five of nine protected at random; where the rest are sampled by equal weights, all nine fare alike."""
    config = EvictionConfig(policy=policy, budget=7, window=1, sinks=1, protected_fraction=0.86, measure="random")
    assert config.large_values == 5
    found = candidates(10, rows=DRAWS)
    kept = select(config, replace(found, queries=torch.zeros_like(found.queries)))
    counts = torch.bincount(kept.flatten(), minlength=10)
    assert counts[0] == DRAWS
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    positions = torch.arange(10).expand(DRAWS, 1, -1)
    uniform, gumbel = found.noise.uniform(positions).flatten(), found.noise.gumbel(positions).flatten()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(uniform.numpy(), gumbel.numpy()).statistic) < 4 / len(uniform) ** 0.5


def test_retention_is_a_choice_where_scores_are_weights():
    """SnapKV sampled is VaSE's policy unprotected, and VaSE's with the highest kept is SnapKV with protection."""
    found = candidates(40, rows=30, heads=4, kv_heads=2)
    shared = {"budget": 24, "window": 4, "sinks": 2}

    def kept(policy, **settings):
        return select(EvictionConfig(policy=policy, **shared, **settings), found)

    assert torch.equal(kept("snapkv", retention="sampled"), kept("vase_attnv", protected_fraction=0.0))
    assert torch.equal(kept("vase_attnv", retention="top_k"), kept("snapkv", protected_fraction=0.25))
    assert not torch.equal(kept("vase_attnv"), kept("vase_attnv", retention="top_k"))


def test_scores_that_differ_by_rounding_tie():
    """At the cut the newest is kept, whichever of equal scores rounding made the higher; other scores stay in order."""
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.1])
    noisy = scores * (1 + 2e-6 * torch.tensor([0.0, 1.0, 0.5, -0.5, -1.0, 0.0]))
    assert top(tied_at_the_cut(ranks(noisy), 3), 3).tolist() == [0, 3, 4]
    apart = scores * (1 + 1e-4 * torch.tensor([0.0, 1.0, 0.5, -0.5, -1.0, 0.0]))
    assert top(tied_at_the_cut(ranks(apart), 3), 3).tolist() == [0, 1, 2]
    assert top(tied_at_the_cut(ranks(-noisy), 2), 2).tolist() == [4, 5]


def test_the_prompt_is_protected_and_clipped_with_a_warning():
    config = EvictionConfig(policy="evict_large", budget=12, window=4, sinks=2, protect_prompt=True)
    found = with_ranges(candidates(20, rows=2), torch.arange(20, 0, -1))
    with pytest.warns(UserWarning, match="prompt of 15 tokens does not fit budget - window - 1 = 7"):
        kept = select(config, found, prompts=[5, 15])
    assert kept[0, 0].tolist() == [0, 1, 2, 3, 4, 17, 18, 19]
    assert kept[1, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 19]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(config, found, prompts=[5, 7])


def test_protection_never_exceeds_what_is_kept():
    """Sinks, a clipped prompt and large values together: the scorer is left with nothing, and nothing is left over."""
    config = EvictionConfig(policy="snapkv", budget=12, window=4, sinks=2, protect_prompt=True, protected_fraction=1.0)
    found = with_ranges(candidates(30), torch.arange(30))
    assert select(config, found, prompts=[6])[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 28, 29]


@given(
    st.integers(1, 8), st.integers(2, 5), st.integers(1, 40), st.integers(0, 6), st.integers(0, 9),
    st.floats(0, 1), st.booleans(), st.sampled_from([name for name in POLICIES if name != "full"]),
)  # fmt: skip
def test_any_selection(window, times, extra, sinks, seed, fraction, protect, name):
    """`budget - window` different slots, ascending, sinks among them; each row as it would be alone."""
    budget = window * times
    keep = budget - window
    sinks = min(sinks, keep - 1)
    config = EvictionConfig(
        policy=name, budget=budget, window=window, sinks=sinks, protected_fraction=fraction, protect_prompt=protect
    )
    found = candidates(keep + extra, rows=3, heads=4, kv_heads=2, window=window, seed=seed)
    prompts = [3, 50, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = select(config, found, prompts)
        assert kept.shape == (3, 2, keep)
        assert (kept.diff(dim=-1) > 0).all()
        assert kept.min() >= 0
        assert kept.max() < keep + extra
        assert (kept[..., :sinks] == torch.arange(sinks)).all()
        for row in range(3):
            one = slice(row, row + 1)
            alone = replace(
                found, **{field: getattr(found, field)[one] for field in PER_ROW},
                noise=NoiseSource((found.noise.key[0][one], found.noise.key[1][one]), found.noise.event[one], 0),
            )  # fmt: skip
            assert torch.equal(select(config, alone, prompts[row : row + 1])[0], kept[row])


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_window_attention_is_the_formula(smooth, heads, kv_heads):
    found = candidates(9, rows=2, heads=heads, kv_heads=kv_heads, window=3, dtype=torch.float64)
    result = window_attention(found, smooth)
    group = heads // kv_heads
    for row in range(2):
        for kv_head in range(kv_heads):
            expected = torch.zeros(9, dtype=torch.float64)
            for head in range(kv_head * group, (kv_head + 1) * group):
                mean = torch.zeros(9, dtype=torch.float64)
                for query in found.queries[row, head]:
                    mean += torch.softmax(found.keys[row, kv_head] @ query * 0.5, 0) / 3
                if smooth:
                    mean = torch.stack([mean[max(0, i - 2) : i + 3].sum() / 5 for i in range(9)])
                expected += mean / group
            assert (result[row, kv_head] - expected).abs().max() < 1e-12


def test_snapkv_keeps_the_most_attended():
    config = EvictionConfig(policy="snapkv", budget=8, window=4, sinks=0, smooth=False)
    found = candidates(12)
    order = window_attention(found, smooth=False)[0, 0].argsort(descending=True)[:4]
    assert select(config, found)[0, 0].tolist() == sorted(order.tolist())


def test_streaming_keeps_sinks_and_the_most_recent():
    config = EvictionConfig(policy="streaming", budget=8, window=2, sinks=2)
    assert select(config, candidates(20))[0, 0].tolist() == [0, 1, 16, 17, 18, 19]


def test_random_is_uniform():
    config = EvictionConfig(policy="random", budget=5, window=1, sinks=1)
    kept = select(config, candidates(10, rows=DRAWS))
    counts = torch.bincount(kept.flatten(), minlength=10)
    assert counts[0] == DRAWS
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["vase_dkv", "curdkv"])
def test_leverage_is_the_formula(name):
    config = EvictionConfig(policy=name, budget=8, window=2, sinks=0, policy_args={"rank": 5})
    found = candidates(20, kv_heads=2, heads=2, dim=16)
    projection = found.noise.projection(16, 5, per_event=name == "vase_dkv")[0]
    for head, kept in enumerate(select(config, found)[0].tolist()):
        keys, values = found.keys[0, head] @ projection, found.values[0, head] @ projection
        score = keys.square().sum(-1) * values.square().sum(-1)
        assert kept == sorted(score.argsort(descending=True)[:6].tolist())


def test_measures_of_a_value():
    values = torch.tensor([[1.0, -3, 2, 4], [4, 4, 4, 4]])
    assert value_range(values).tolist() == [7, 0]
    assert value_variance(values).tolist() == [6.5, 0]
    assert value_norm(values).tolist() == [pytest.approx(30**0.5), 8]
    half = values.bfloat16()
    assert value_variance(half, torch.float32).dtype == torch.float32
    assert value_variance(half, torch.float32).tolist() == [6.5, 0]


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_rounding_keeps_ten_bits(x):
    value = torch.tensor([x])
    rounded = round_mantissa(value)
    assert torch.equal(round_mantissa(rounded), rounded)
    assert (rounded - value).abs() <= value.abs() * 2.0**-11
    mantissa = torch.frexp(rounded.double()).mantissa * 2**11
    assert mantissa == mantissa.round()


@given(st.lists(st.floats(width=32), min_size=2, max_size=20))
def test_ranks_are_the_order_of_the_scores(values):
    scores = torch.tensor(values)
    rank = ranks(scores)
    clean = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(rank[:, None] > rank, clean[:, None] > clean)
    assert torch.equal(rank[:, None] == rank, clean[:, None] == clean)


def test_a_policy_that_keeps_everything_selects_nothing():
    with pytest.raises(ValueError, match="keeps everything"):
        Selector(EvictionConfig(policy="full"))


@pytest.mark.parametrize(
    ("name", "field", "fix"),
    [
        ("knorm", "keys", "needs_keys = True"),
        ("value_l2", "values", "needs_values = True"),
        ("h2o", "mass", "needs_mass = True"),
        ("rkv", "queries", "needs_queries = True"),
        ("keydiff", "window_keys", "needs_window_keys = True"),
    ],
)
def test_an_undeclared_read_is_an_error_with_the_policys_name(name, field, fix):
    full = candidates(12)
    given = {field.name: getattr(full, field.name) for field in fields(full)}
    lacking = Candidates(**given | {field: None, "policy": name})
    with pytest.raises(TypeError, match=f"policy {name!r} reads candidates.{field} without declaring it.*{fix}"):
        POLICIES[name]().score(lacking, smooth=True)


@pytest.mark.parametrize("runs", ["training", "decoding"])
@pytest.mark.parametrize("protected_fraction", [0.0, 0.5])
def test_both_passes_give_a_policy_what_it_declared_and_no_more(runs, protected_fraction, monkeypatch):
    """Also where protection looks at the values, which the policy did not declare."""

    @dataclass(frozen=True)
    class Reader(Policy):
        needs_keys = True

        def score(self, candidates, smooth):
            return candidates.keys.norm(dim=-1) + candidates.values.norm(dim=-1)

    monkeypatch.setitem(POLICIES, "reader", Reader)
    config = EvictionConfig(policy="reader", budget=16, window=4, sinks=1, protected_fraction=protected_fraction)
    model, rows = tiny_model(layers=1), rows_of([3], steps=30)
    run = {"training": simulate, "decoding": decode}[runs]
    with pytest.raises(TypeError, match=r"'reader' reads candidates.values .* needs_values"):
        run(model, config, rows, [3], [0])


def test_queries_of_a_policy_that_reads_only_window_attention():
    found = replace(candidates(12), queries=None, attention=torch.rand(1, 1, 12), policy="tova")
    with pytest.raises(TypeError, match=r"'tova' reads candidates.queries .* only_window_attention"):
        POLICIES["tova"]().score(found, smooth=True)
