"""Attention backends against their oracles, outputs and gradients, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from passes import left_padded, tiny_model
from torch.nn.functional import scaled_dot_product_attention

from vkvtrain import EvictionConfig
from vkvtrain.attention import reference, segments, sliding
from vkvtrain.lifetimes import lifetimes, make_schedule, never_evicted
from vkvtrain.logits import LayerInputs, LogitForm, attend
from vkvtrain.selection import Selector

FORM = LogitForm(0.3)
FORMS = [FORM, LogitForm(0.3, softcap=1.5), LogitForm(0.3, sinks=torch.linspace(-1, 2, 4, dtype=torch.float64))]


@st.composite
def batches(draw):
    """(configuration, chunks of each row, lengths, heads) of a batch of right-padded rows."""
    window = draw(st.integers(1, 6))
    budget = window * draw(st.integers(2, 4))
    policy = draw(st.sampled_from(["vase_attnv", "snapkv", "random", "streaming", "evict_large", "vase_dkv"]))
    sinks = draw(st.integers(0, min(3, budget - window - 1)))
    config = EvictionConfig(policy=policy, budget=budget, window=window, sinks=sinks, seed=draw(st.integers(0, 99)))
    rows = draw(st.integers(1, 3))
    lengths = [draw(st.integers(2, 70)) for _ in range(rows)]
    prompts = []
    for length in lengths:
        prompt = draw(st.integers(1, length))
        chunks = [(0, prompt)]
        if length - prompt > 12 and draw(st.booleans()):  # a later turn
            start = draw(st.integers(prompt + 1, length - 8))
            chunks.append((start, start + draw(st.integers(1, 7))))
        prompts.append(chunks)
    return config, prompts, lengths, draw(st.sampled_from([(4, 4), (4, 2), (2, 1)]))


def make(config, prompts, lengths, heads, seed=0, dim=8):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 2
    query = torch.randn(len(lengths), heads[0], width, dim, dtype=torch.float64, generator=generator)
    key, value = (
        torch.randn(len(lengths), heads[1], width, dim, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    schedule = make_schedule(config, prompts, list(range(len(lengths))), lengths, width, torch.device("cpu"))
    evict_at = lifetimes(query, key, value, schedule, Selector(config), 0, FORM)
    return query, key, value, evict_at, schedule


def outputs_and_gradients(attend, query, key, value, *arguments, form=FORM):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = attend(LayerInputs(*leaves, form), *arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def fitting(form, heads):
    """The form with as many sinks as there are query heads."""
    return form if form.sinks is None else LogitForm(form.scaling, form.softcap, form.sinks[:heads])


@given(batches(), st.integers(0, 1000), st.sampled_from(FORMS))
def test_segments_equals_reference(batch, seed, form):
    tensors = make(*batch, seed)
    form = fitting(form, tensors[0].shape[1])
    for ours, theirs in zip(
        outputs_and_gradients(segments.attend, *tensors, form=form),
        outputs_and_gradients(reference.attend, *tensors, form=form),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-10


@given(batches(), st.integers(0, 1000), st.sampled_from(FORMS))
def test_one_walk_decides_and_attends(batch, seed, form):
    """The same decisions as `lifetimes`, and the reference's attention."""
    config, *_ = batch
    query, key, value, _, schedule = make(*batch, seed)
    form = fitting(form, query.shape[1])
    evict_at = lifetimes(query, key, value, schedule, Selector(config), 0, form)
    assert segments.can_decide(Selector(config), query.device)

    def walk(inputs):
        out, decided = segments.attend_and_decide(inputs, schedule, Selector(config), 0)
        assert torch.equal(decided, evict_at)
        return out

    for ours, theirs in zip(
        outputs_and_gradients(walk, query, key, value, form=form),
        outputs_and_gradients(reference.attend, query, key, value, evict_at, schedule, form=form),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("distance", [5.0, 60.0, 2000.0])
@pytest.mark.parametrize("policy", ["snapkv", "vase_attnv"])
def test_scores_where_the_window_pays_the_past_nothing(policy, distance):
    """Every segment attends to itself by far the most: the scores are shares of what is left of the attention."""
    config = EvictionConfig(policy=policy, budget=8, window=4, sinks=1)
    query, key, value, _, schedule = make(config, [[(0, 3)], [(0, 5)]], [60, 50], (4, 2))
    block = torch.nn.functional.one_hot(torch.arange(62) // 4 % 8, 8) * distance
    query, key = query + block, key + block
    evict_at = lifetimes(query, key, value, schedule, Selector(config), 0, FORM)
    out, decided = segments.attend_and_decide(LayerInputs(query, key, value, FORM), schedule, Selector(config), 0)
    assert torch.equal(decided, evict_at)
    assert (out - reference.attend(LayerInputs(query, key, value, FORM), evict_at, schedule)).abs().max() < 1e-10


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_lower_precision(dtype, rounding):
    """Outputs and gradients keep the inputs' dtype and come within its rounding of float64."""
    config = EvictionConfig(policy="random", budget=12, window=4, sinks=1)
    query, key, value, evict_at, schedule = make(config, [[(0, 5)], [(0, 30)]], [70, 66], (4, 2))
    low = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    upstream = torch.randn(2, schedule.width, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for leaves in (low, exact):
        segments.attend(LayerInputs(*leaves, FORM), evict_at, schedule).backward(upstream.to(leaves[0].dtype))
    ours = segments.attend(LayerInputs(*low, FORM), evict_at, schedule)
    assert ours.dtype == dtype
    assert (ours.double() - segments.attend(LayerInputs(*exact, FORM), evict_at, schedule)).abs().max() < rounding
    for mine, theirs in zip(low, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - theirs.grad).abs().max() < rounding * max(1.0, theirs.grad.abs().max())


@given(batches(), st.integers(1, 80), st.integers(0, 1000), st.sampled_from(FORMS))
def test_sliding_windows_equal_the_reference(batch, window, seed, form):
    query, key, value, _, schedule = make(*batch, seed)
    form = fitting(form, query.shape[1])
    for ours, theirs in zip(
        outputs_and_gradients(sliding.attend, query, key, value, window, schedule, form=form),
        outputs_and_gradients(reference.attend_sliding, query, key, value, window, schedule, form=form),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("form", FORMS[1:], ids=["softcap", "sinks"])
def test_the_reference_honours_the_form(form):
    """Soft cap and sinks as the loop over queries says."""
    query, key, value, evict_at, schedule = make(
        EvictionConfig(policy="snapkv", budget=8, window=4, sinks=1), [[(0, 3)]], [20], (4, 2)
    )
    out = reference.attend(LayerInputs(query, key, value, form), evict_at, schedule)
    for head in range(4):
        for i in range(20):
            seen = [j for j in range(i + 1) if i < evict_at[0, head // 2, j]]
            logits = key[0, head // 2, seen] @ query[0, head, i] * 0.3
            if form.softcap is not None:
                logits = 1.5 * torch.tanh(logits / 1.5)
            weights = logits.exp()
            total = weights.sum() + (0 if form.sinks is None else form.sinks[head].exp())
            assert (out[0, i, head] - weights / total @ value[0, head // 2, seen]).abs().max() < 1e-12


def test_a_query_that_sees_nothing_gets_zero_and_no_nan_gradient():
    for form in FORMS:
        leaf = torch.randn(1, 4, 3, 8, dtype=torch.float64).requires_grad_()
        visible = torch.tensor([[False] * 3, [True, False, False], [True] * 3])
        out = attend(LayerInputs(leaf, leaf[:, :2], leaf[:, :2], form), visible)
        assert (out[:, :, 0] == 0).all()
        out.sum().backward()
        assert leaf.grad.isfinite().all()


def test_small_calls_give_the_same(monkeypatch):
    """However the segments are split over attention calls."""
    config = EvictionConfig(policy="snapkv", budget=12, window=4, sinks=1)
    tensors = make(config, [[(0, 5)], [(0, 30)], [(0, 2)]], [70, 66, 31], (4, 2))
    one_call = outputs_and_gradients(segments.attend, *tensors)
    monkeypatch.setattr(segments, "_LOGITS", 1)
    for ours, theirs in zip(outputs_and_gradients(segments.attend, *tensors), one_call, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_reference_equals_a_loop_over_queries():
    config = EvictionConfig(policy="random", budget=8, window=4, sinks=1)
    lengths = [25, 13]
    query, key, value, evict_at, schedule = make(config, [[(0, 3)], [(0, 11)]], lengths, (4, 2))
    out = reference.attend(LayerInputs(query, key, value, FORM), evict_at, schedule)
    assert (evict_at[0] <= 24).any()
    for row, length in enumerate(lengths):
        for head in range(4):
            for i in range(length):
                seen = [j for j in range(i + 1) if i < evict_at[row, head // 2, j]]
                weights = (key[row, head // 2, seen] @ query[row, head, i] * 0.3).softmax(0)
                assert (out[row, i, head] - weights @ value[row, head // 2, seen]).abs().max() < 1e-12
        assert (out[row, length:] == 0).all()


@pytest.mark.parametrize("attend", [segments.attend, reference.attend])
def test_a_budget_that_is_never_exceeded_is_dense_attention(attend):
    config = EvictionConfig(policy="vase_attnv", budget=64, window=16)
    query, key, value, evict_at, schedule = make(config, [[(0, 5)], [(0, 20)]], [64, 40], (4, 2))
    assert torch.equal(evict_at, never_evicted(schedule, 2))
    out = attend(LayerInputs(query, key, value, FORM), evict_at, schedule)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    for row, length in enumerate([64, 40]):
        assert (out[row, :length] - dense[row, :length]).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_without_cache_or_simulation_it_is_sdpa(family):
    ids, mask = left_padded([[5, 6, 7, 8], [9, 3], [4, 4, 4]])
    logits = {
        name: tiny_model(family, attention=name)(input_ids=ids, attention_mask=mask).logits
        for name in ("vkvtrain", "sdpa")
    }
    assert torch.equal(logits["vkvtrain"][mask.bool()], logits["sdpa"][mask.bool()])
