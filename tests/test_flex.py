"""The FlexAttention backend: its sorted keys and block lists on any machine, its kernels where there is a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import right_padded, rows_of, simulate, tiny_model
from test_attention import FORM, FORMS, batches, fitting, make, outputs_and_gradients

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.attention import backends, flex, reference
from vkvtrain.logits import LayerInputs

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a GPU")


def visible(position, until):
    """The mask over sorted keys, bool [B, Hkv, queries, keys]."""
    query = torch.arange(position.shape[-1])[:, None]
    return (position[..., None, :] <= query) & (query < until[..., None, :])


def by_block(mask):
    """[..., queries, keys] -> [..., query blocks, key blocks, BLOCK, BLOCK]."""
    return mask.unflatten(-1, (-1, flex.BLOCK)).unflatten(-3, (-1, flex.BLOCK)).transpose(-3, -2)


@settings(max_examples=15)
@given(batches(), st.integers(0, 1000))
def test_forward_equals_reference(batch, seed):
    tensors = make(*batch, seed)
    for form in FORMS:
        inputs = LayerInputs(*tensors[:3], fitting(form, tensors[0].shape[1]))
        ours, theirs = flex.attend(inputs, *tensors[3:]), reference.attend(inputs, *tensors[3:])
        assert (ours - theirs).abs().max() < 1e-10


@given(batches(), st.integers(0, 1000))
def test_block_lists_miss_no_visible_pair(batch, seed):
    """At a block of 8, so that there are many: what is seen is visited, and what is called whole is all seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 8)
        patch.setattr(flex, "_EVENTS", 2)
        *_, evict_at, schedule = make(*batch, seed)
        order, position, until = flex.sorted_keys(evict_at, schedule.window)
        assert torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))
        assert torch.equal(position, order.int())
        mask = visible(position, until)
        seen, whole = flex.visited_blocks(position, until)
        blocks = by_block(mask)
        assert not (blocks.flatten(-2).any(-1) & ~seen).any()
        assert not (whole & ~blocks.flatten(-2).all(-1)).any()
        # the lists say the same, the partial blocks and the whole ones apart, for every query head of the group
        lists = flex.block_mask(position, until, 2)
        listed = torch.zeros(2, *seen.repeat_interleave(2, 1).shape, dtype=torch.bool)
        found = ((lists.kv_num_blocks, lists.kv_indices), (lists.full_kv_num_blocks, lists.full_kv_indices))
        for kind, (counts, indices) in enumerate(found):
            valid = torch.arange(indices.shape[-1]) < counts[..., None]
            listed[kind].scatter_(-1, indices.long(), valid)
        assert torch.equal(listed[0], (seen & ~whole).repeat_interleave(2, 1))
        assert torch.equal(listed[1], whole.repeat_interleave(2, 1))


def test_sorting_skips_blocks(monkeypatch):
    """2048 tokens at a budget of 256 in blocks of 32: less than half of the blocks of dense attention."""
    monkeypatch.setattr(flex, "BLOCK", 32)
    config = EvictionConfig(policy="random", budget=256, window=16)
    *_, evict_at, schedule = make(config, [[(0, 20)]], [2046], (2, 2))
    _, position, until = flex.sorted_keys(evict_at, schedule.window)
    seen, _ = flex.visited_blocks(position, until)
    natural, _ = flex.visited_blocks(torch.arange(2048).int().expand_as(position), evict_at)
    blocks = 2048 // flex.BLOCK
    assert seen[0, 0].sum() < 0.65 * natural[0, 0].sum()
    assert seen[0, 0].sum() < 0.5 * blocks * (blocks + 1) / 2


def test_permuted_gradients_come_back():
    entries = torch.randn(2, 3, 10, 4, dtype=torch.float64, requires_grad=True)
    order = torch.rand(2, 3, 10).argsort(-1)
    ours = flex._Permuted.apply(entries, order)
    theirs = entries.gather(2, order[..., None].expand_as(entries))
    assert torch.equal(ours, theirs)
    upstream = torch.randn_like(ours)
    mine, its = (torch.autograd.grad(out, entries, upstream)[0] for out in (ours, theirs))
    assert torch.equal(mine, its)


def test_in_a_simulation_on_a_cpu():
    """Forward only, and refused in one sentence where gradients are wanted; `auto` never picks it here."""
    model = tiny_model()
    config = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2, skip_layers=(1,))
    rows = rows_of([7, 30], steps=60)
    ours, evict_at = simulate(model, config, rows, [7, 30], [0, 1], backend="flex")
    theirs, expected = simulate(model, config, rows, [7, 30], [0, 1], backend="reference")
    assert all(torch.equal(evict_at[layer], expected[layer]) for layer in expected)
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(ours, theirs, strict=True))
    ids, mask = right_padded(rows)
    with (
        pytest.raises(ValueError, match="use backend='auto'"),
        simulated_eviction(model, config, [7, 30], backend="flex"),
    ):
        model(input_ids=ids, attention_mask=mask)
    query = torch.zeros(1, 4, 8, 64)
    assert backends.resolve("auto", query, query) == "segments"


@CUDA
@pytest.mark.parametrize("form", FORMS, ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_reference(form, dtype):
    """Outputs and gradients on the GPU, against the reference in float64."""
    config = EvictionConfig(policy="vase_attnv", budget=128, window=32)
    exact = make(config, [[(0, 50)], [(0, 200)]], [700, 611], (4, 2), dim=64)
    form = form if form is FORM else fitting(form, 4)
    expected = outputs_and_gradients(reference.attend, *exact, form=form)
    query, key, value, evict_at, schedule = exact
    device = torch.device("cuda")
    sinks = None if form.sinks is None else form.sinks.to(device, dtype)
    form = type(form)(form.scaling, form.softcap, sinks)
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (query, key, value)]
    out = flex.attend(LayerInputs(*leaves, form), evict_at.to(device), schedule.on(device))
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(upstream.to(device, dtype))
    rounding = 2e-2 if dtype == torch.bfloat16 else 5e-3
    for ours, theirs in zip([out.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert (ours.cpu().double() - theirs).abs().max() < rounding * max(1.0, theirs.abs().max())
