"""Divergences against their definitions, schedules against enumeration, and the objective of a recipe in its loop."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from scipy.stats import entropy as scipy_entropy
from short_runs import EVICTED, run, short_recipe
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.budgets import budget_schedule
from vkvtrain.training.data import TrainingData, collate, load_data
from vkvtrain.training.divergences import coarsen, divergence, forward_kl, jsd, reverse_kl, token_losses
from vkvtrain.training.loop import prepare
from vkvtrain.training.models import load_model
from vkvtrain.training.schedule import is_dense, step_eviction
from vkvtrain.training.settings import Recipe, TrainingSettings

CPU = torch.device("cpu")


def recipe(source, output, eviction=None, **training):
    """Settings of training add to the defaults."""
    defaults = {"data": {"source": str(source)}, "training": {"steps": 2, "global_batch": 8}}
    return short_recipe(output, defaults, {"training": training, "eviction": eviction})


# Divergences


def pair(rows=12, outcomes=30, dtype=torch.float64):
    """Student and teacher; the teacher is sharper, so that directions differ."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, outcomes, generator=generator, dtype=torch.float64).unbind()
    return student.to(dtype), (4 * teacher).to(dtype)


def settings(**training):
    return TrainingSettings(steps=1, objective="distill", **training)


def expected_divergence(student, teacher, name, weight=0.5, temperature=1.0, top_k=None):
    """By SciPy, row by row, from probabilities."""
    found = []
    for q, p in zip(student.double().numpy() / temperature, teacher.double().numpy() / temperature, strict=True):
        p, q = softmax(p), softmax(q)
        if top_k is not None:
            top = np.argsort(-p)[:top_k]
            p, q = (np.append(side[top], 1 - side[top].sum()) for side in (p, q))
        m = weight * p + (1 - weight) * q
        value = {
            "forward_kl": lambda p=p, q=q: rel_entr(p, q).sum(),
            "reverse_kl": lambda p=p, q=q: rel_entr(q, p).sum(),
            "jsd": lambda p=p, q=q, m=m: weight * rel_entr(p, m).sum() + (1 - weight) * rel_entr(q, m).sum(),
        }[name]()
        found.append(temperature**2 * value)
    return np.array(found)


@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "weight"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_divergences_equal_scipy(name, weight, temperature, top_k):
    student, teacher = pair()
    weights = {"jsd_weight": weight} if name == "jsd" else {}
    chosen = settings(divergence=name, temperature=temperature, top_k=top_k, **weights)
    found = divergence(student, teacher, chosen)
    np.testing.assert_allclose(found, expected_divergence(student, teacher, name, weight, temperature, top_k), 1e-9)
    single = divergence(student.float(), teacher.float(), chosen)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, found, 1e-4)


def test_directions_differ_and_jsd_lies_between_its_limits():
    student, teacher = pair()
    log_p, log_q = (teacher / 4).log_softmax(-1), student.log_softmax(-1)
    forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    assert ((forward - reverse).abs() / reverse).max() > 0.1
    small = 1e-6
    torch.testing.assert_close(jsd(log_p, log_q, small) / small, forward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(jsd(log_p, log_q, 1 - small) / small, reverse, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(jsd(log_p, log_q, 0.5), jsd(log_q, log_p, 0.5))
    assert jsd(log_p, log_q, 0.5).max() <= math.log(2)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("extra", [{}, {"temperature": 3.0}, {"top_k": 4, "temperature": 0.7}])
def test_gradients_of_divergences_are_right(name, extra):
    student, teacher = pair(3, 7)
    chosen = settings(divergence=name, **extra, **({"jsd_weight": 0.3} if name == "jsd" else {}))
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher.detach(), chosen), student)
    divergence(student, teacher, chosen).sum().backward()
    assert teacher.grad is None
    same = teacher.detach().clone().requires_grad_()
    agreed = divergence(same, teacher, chosen).sum()
    agreed.backward()
    assert agreed.item() == pytest.approx(0, abs=1e-12)  # least where they agree
    assert same.grad.abs().max() < 1e-12


def test_temperature_keeps_the_size_of_the_gradient():
    """At high temperatures the gradient is that of half the squared distance of centred logits (Hinton et al. 2015)."""
    student, teacher = pair()
    student.requires_grad_()
    size = {}
    for temperature in (1e3, 1e4):
        divergence(student, teacher, settings(temperature=temperature)).sum().backward()
        size[temperature] = student.grad.clone()
        student.grad = None
    torch.testing.assert_close(size[1e3], size[1e4], rtol=0.1, atol=1e-3)
    centred = [side.detach() - side.detach().mean(-1, keepdim=True) for side in (student, teacher)]
    torch.testing.assert_close(size[1e4], (centred[0] - centred[1]) / 30, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 29, 30, 99])
def test_the_tail_is_one_outcome(k):
    student, teacher = pair()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    coarse_p, coarse_q = coarsen(log_p, log_q, k)
    assert coarse_p.shape == (12, min(k + 1, 30))
    for coarse in (coarse_p, coarse_q):
        torch.testing.assert_close(coarse.exp().sum(-1), torch.ones(12, dtype=torch.float64))
    for name in (forward_kl, reverse_kl, lambda p, q: jsd(p, q, 0.5)):
        assert (name(coarse_p, coarse_q) <= name(log_p, log_q) + 1e-12).all()
    if k == 29:  # one outcome lumped is no lump
        torch.testing.assert_close(forward_kl(coarse_p, coarse_q), forward_kl(log_p, log_q))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_losses_are_weighed_and_mixed(dtype):
    student, teacher = pair(dtype=dtype)
    targets = torch.arange(12)
    chosen = settings(divergence="reverse_kl", ce_weight=0.4, entropy_weight=1.5, temperature=2.0)
    loss, crossed, diverged, entropy = token_losses(student, teacher, targets, chosen).double().unbind(-1)
    exact = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}[dtype]  # bf16 logits are taken as given
    wide = [side.double() for side in (student, teacher)]
    np.testing.assert_allclose(diverged, expected_divergence(*wide, "reverse_kl", temperature=2.0), exact)
    np.testing.assert_allclose(entropy, [scipy_entropy(row) for row in softmax(wide[1].numpy(), axis=-1)], exact)
    torch.testing.assert_close(crossed, cross_entropy(wide[0], targets, reduction="none"), rtol=exact, atol=exact)
    torch.testing.assert_close(loss, (1 + 1.5 * entropy) * (diverged + 0.4 * crossed), rtol=exact, atol=exact)


# What the recipe says of it


def test_cross_entropy_beside_the_divergence_is_one_by_default_and_none_on_policy():
    assert settings().cross_entropy_weight == 1
    assert settings(ce_weight=0).cross_entropy_weight == 0
    assert TrainingSettings(steps=1, objective="on_policy", rollout_tokens=8).cross_entropy_weight == 0


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"entropy_weight": 1.0}, "training: entropy_weight weighs by the teacher's entropy, and sft has no teacher"),
        ({"objective": "on_policy"}, "training: rollout_tokens is required on_policy"),
        ({"objective": "on_policy", "rollout_tokens": 8, "ce_weight": 1}, "ce_weight: on_policy has no cross-entropy"),
        ({"objective": "distill", "jsd_weight": 1.0}, "jsd_weight.*less than 1, got 1.0"),
        ({"objective": "distill", "temperature": 0}, "temperature.*greater than 0, got 0"),
        ({"objective": "distill", "divergence": "kl"}, "'divergence'.*forward_kl.*got 'kl'"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(noise, tmp_path, training, message):
    with pytest.raises(ValueError, match=message):
        recipe(noise, tmp_path, EVICTED, **training)


@pytest.mark.parametrize("objective", ["distill", "on_policy"])
def test_a_base_that_is_rewritten_is_no_teacher(noise, tmp_path, objective):
    values = recipe(noise, tmp_path, EVICTED).model_dump(mode="json")
    values["training"] |= {"objective": objective, "rollout_tokens": 8 if objective == "on_policy" else None}
    values["lora"]["init"] = "pissa"
    with pytest.raises(ValueError, match="'pissa' rewrites the base weights, so the model without its adapter is no"):
        Recipe(**values)


# Schedules


@given(st.floats(0, 1), st.integers(1, 400))
def test_dense_steps_are_spread_evenly(fraction, steps):
    dense = [step for step in range(steps) if is_dense(step, fraction)]
    assert len(dense) == int(steps * fraction)
    gaps = {after - before for before, after in pairwise(dense)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def budgets(noise, tmp_path, value, steps, **training):
    chosen = recipe(noise, tmp_path, {**EVICTED, "budget": value}, steps=steps, **training)
    configs = [step_eviction(chosen, step) for step in range(steps)]
    assert [step_eviction(chosen, step) for step in reversed(range(steps))] == configs[::-1]  # no memory
    return chosen, [config and config.budget for config in configs]


def test_budgets_of_a_list_are_drawn_for_each_step(noise, tmp_path):
    chosen, drawn = budgets(noise, tmp_path, [24, 32, 64], 1200, dense_fraction=0.25)
    assert [budget is None for budget in drawn] == [step % 4 == 3 for step in range(1200)]
    assert min(drawn.count(budget) for budget in (24, 32, 64)) > 250
    assert sum(drawn.count(budget) for budget in (24, 32, 64)) == 900
    other = chosen.model_copy(update={"seed": 1})
    assert [step_eviction(other, step) for step in range(1200)] != [step_eviction(chosen, step) for step in range(1200)]
    assert chosen.trained_for() == EvictionConfig(**EVICTED)


def test_budgets_of_a_range_are_all_its_multiples(noise, tmp_path):
    chosen, drawn = budgets(noise, tmp_path, {"low": 24, "high": 64}, 900)
    assert set(drawn) == {24, 32, 40, 48, 56, 64}
    assert min(map(drawn.count, set(drawn))) > 110
    assert [config.budget for config in chosen.eviction_configs()] == [24, 64]
    assert budgets(noise, tmp_path, {"low": 32, "high": 32}, 5)[1] == [32] * 5


@pytest.mark.parametrize(
    ("value", "steps", "expected"),
    [
        ({"from": 64, "to": 24}, 6, [64, 56, 48, 40, 32, 24]),
        ({"from": 24, "to": 64}, 6, [24, 32, 40, 48, 56, 64]),
        ({"from": 32, "to": 24}, 5, [32, 32, 32, 24, 24]),  # half way is rounded up
        ({"from": 32, "to": 32}, 3, [32, 32, 32]),
        ({"from": 64, "to": 24}, 1, [64]),
        ({"from": 64, "to": 24}, 2, [64, 24]),
    ],
)
def test_annealed_budgets(noise, tmp_path, value, steps, expected):
    chosen, drawn = budgets(noise, tmp_path, value, steps)
    assert drawn == expected
    assert chosen.trained_for().budget == value["to"]
    assert [config.budget for config in chosen.eviction_configs()] == [value["to"], value["from"]]


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 16), st.integers(2, 60))
def test_an_annealed_budget_moves_one_way_between_its_ends(start, end, window, steps):
    schedule = budget_schedule({"from": start * window, "to": end * window}, window)
    drawn = [schedule.at(step / (steps - 1), random.Random(0)) for step in range(steps)]
    assert (drawn[0], drawn[-1]) == (start * window, end * window)
    assert drawn == sorted(drawn, reverse=start > end)
    for step, budget in enumerate(drawn):
        assert budget % window == 0
        assert abs(budget - window * (start + (end - start) * step / (steps - 1))) <= window / 2 + 1e-6


@pytest.mark.parametrize(
    ("eviction", "message"),
    [
        ({"budget": []}, "eviction: budget is an empty list"),
        ({"budget": {"low": 64, "high": 24}}, r"low \(64\) is above high \(24\)"),
        ({"budget": {"low": 24}}, "'high' must be a whole number, got None"),
        ({"budget": {"from": 24, "high": 32}}, "unknown key 'high'"),
        ({"budget": {"form": 24, "to": 32}}, "unknown key 'form'.*did you mean 'from'"),
        ({"budget": {"low": 20, "high": 32}}, r"budget \(20\) must be a multiple of window"),
        ({"budget": {"from": 64, "to": 8}}, r"budget \(8\) must be greater than window"),
        ({"policy": []}, "policy is an empty list"),
        ({"policy": ["snapkv", "snapvk"]}, "snapvk"),
        ({"policy": ["snapkv", "full"]}, "policy 'full' evicts nothing: take it out of the list"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(noise, tmp_path, eviction, message):
    with pytest.raises(ValueError, match=message):
        recipe(noise, tmp_path, {**EVICTED, **eviction})


def test_policies_are_drawn_for_each_step(noise, tmp_path):
    names = ["vase_attnv", "rkv", "snapkv"]
    chosen = recipe(noise, tmp_path, {**EVICTED, "policy": names, "budget": [24, 32]}, steps=900)
    drawn = [step_eviction(chosen, step) for step in range(900)]
    pairs = [(config.policy, config.budget) for config in drawn]
    assert min(pairs.count((name, budget)) for name in names for budget in (24, 32)) > 110
    assert chosen.trained_for() == EvictionConfig(**EVICTED)
    assert [(config.policy, config.budget) for config in chosen.eviction_configs()] == [
        (name, budget) for name in names for budget in (24, 32)
    ]


# In the loop


def test_the_log_names_policies_budgets_and_parts_of_the_loss(noise, tmp_path):
    values = recipe(
        noise, tmp_path / "run", {**EVICTED, "policy": ["snapkv", "random"], "budget": {"from": 40, "to": 24}},
        objective="distill", divergence="jsd", ce_weight=0.5, steps=6, dense_fraction=0.34, global_batch=2,
    ).model_dump(mode="json")  # fmt: skip
    values["data"]["held_out"] = 2
    chosen = Recipe(**values)
    configs, rows = [step_eviction(chosen, step) for step in range(6)], run(chosen)
    assert [(row.get("policy"), row.get("budget")) for row in rows] == [
        (config and config.policy, config and config.budget) for config in configs
    ]
    assert None in configs
    for row in rows:
        assert row["loss"] == pytest.approx(row["divergence"] + 0.5 * row["cross_entropy"], rel=1e-5)
        assert row["entropy"] > 0
    held_out = {
        f"held_out_{what}_{policy}_{budget}"
        for what in ("loss", "gap")
        for policy in ("snapkv", "random")
        for budget in (24, 40)
    }
    assert {name for name in rows[-1] if name.startswith("held_out")} == {*held_out, "held_out_loss_full"}


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_an_untrained_adapter_at_a_budget_of_the_whole_length_diverges_by_nothing(noise, tmp_path, name):
    """The rows have at most 81 tokens; under a smaller budget there is something to learn."""
    free = {"objective": "distill", "divergence": name, "ce_weight": 0, "steps": 1, "temperature": 2.0}
    rows = run(recipe(noise, tmp_path / "a", {**EVICTED, "budget": 88}, **free))
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["evictions"] == 0
    assert run(recipe(noise, tmp_path / "b", EVICTED, **free))[0]["loss"] > 1e-3


@pytest.fixture
def trained(noise, tmp_path):
    """A distillation recipe, its model with an adapter that does something, and a batch."""
    chosen = recipe(noise, tmp_path / "run", EVICTED, objective="distill", ce_weight=0.3)
    torch.manual_seed(0)
    model = load_model(chosen)
    for label, weight in model.named_parameters():
        if "lora_B" in label:
            torch.nn.init.normal_(weight, std=0.05)
    rows = load_data(chosen.data, AutoTokenizer.from_pretrained(str(MODEL_PATH))).train[:6]
    return chosen, model, collate(rows, [0] * 6, 0, CPU)


def test_the_teacher_is_the_base_model_with_the_full_cache(trained):
    """Stock attention and weights that never had an adapter, against what the loss says of the divergence."""
    chosen, model, batch = trained
    base = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="sdpa")
    prepared = prepare(chosen, Accelerator(), model, TrainingData([], [], 0), tokenizer=None)
    config, inputs = chosen.trained_for(), {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        teacher = base(**inputs).logits.flatten(0, 1)[batch.predicting]
        with simulated_eviction(model, config, batch.prompt_lengths, batch.streams):
            student = model(**inputs).logits.flatten(0, 1)[batch.predicting]
    assert (student - teacher).abs().max() > 0.1
    crossed = cross_entropy(student.double(), batch.targets, reduction="sum").item()
    diverged = expected_divergence(student, teacher, "forward_kl").sum()
    trainable = {label for label, weight in model.named_parameters() if weight.requires_grad}
    with simulated_eviction(prepared.model, config, batch.prompt_lengths, batch.streams) as trace:
        losses = prepared.model(batch, trace)
        losses["loss"].backward()
    assert sum(len(row.events) for row in trace.rows) > 0
    assert losses["divergence"].item() == pytest.approx(diverged, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(diverged + 0.3 * crossed, rel=1e-4)
    for label, weight in model.named_parameters():
        assert weight.requires_grad == (label in trainable) == ("lora_" in label)
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == ("lora_" in label), label
