"""Losses without full logits against the plain version: every family, loss and gradients, in float64."""

import pytest
import torch
from families import FAMILIES, tiny_family
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.training import head
from vkvtrain.training.data import Row, collate
from vkvtrain.training.head import check_head, chunked_loss, model_logits
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.settings import TrainingSettings

EVICTION = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
HEADS = {"Granite": {"logits_scaling": 3.0}, "Gemma2": {"final_logit_softcapping": 0.5}}
"""What sets a family's head apart, at a size that shows."""


def batch_of(lengths=((9, 40), (5, 23), (12, 31)), vocab=40):
    generator = torch.Generator().manual_seed(3)
    rows = [
        Row(index, torch.randint(1, vocab, (length,), generator=generator).tolist(), prompt)
        for index, (prompt, length) in enumerate(lengths)
    ]
    return collate(rows, [0] * len(rows), 0, torch.device("cpu"))


def adapted(family="Qwen3", targets="all-linear", save=None, **extra):
    """A tiny model with an adapter that does something."""
    model = tiny_family(family, **HEADS.get(family, {}), **extra)
    dtype = next(model.parameters()).dtype
    if family in ("gpt-oss", "Qwen3-MoE"):
        targets = ["q_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=save, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator, dtype=dtype))
            elif weight.requires_grad and "lora" not in name:  # a trained copy of the head
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=dtype))
    return model


def plain_loss(model, batch, settings, trace):
    """All logits at once, from the model's own forward; the formulas once more, from probabilities."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad(), trace.suspended(), model.disable_adapter():
        teacher = model(**inputs).logits.flatten(0, 1)[batch.predicting]
    student = model(**inputs).logits.flatten(0, 1)[batch.predicting]
    crossed = cross_entropy(student, batch.targets, reduction="none")
    if settings.objective == "sft":
        return crossed.sum()
    p, q = (teacher / settings.temperature).softmax(-1), (student / settings.temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1) if settings.divergence == "forward_kl" else (q * (q / p).log()).sum(-1)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    weight = 1 + settings.entropy_weight * entropy
    return (weight * (settings.temperature**2 * kl + settings.cross_entropy_weight * crossed)).sum()


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def compare(model, settings, chunk, monkeypatch, batch=None):
    """The module's loss and gradients under eviction equal the plain ones."""
    batch = batch or batch_of()
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk * 40)
    with simulated_eviction(model, EVICTION, batch.prompt_lengths, batch.streams) as trace:
        expected = plain_loss(model, batch, settings, trace)
        expected.backward()
    wanted = gradients(model)
    wrapped = ModelWithLoss(model, settings)
    with simulated_eviction(wrapped, EVICTION, batch.prompt_lengths, batch.streams) as trace:
        found = wrapped(batch, trace)
        (4 * found["loss"]).backward()  # a power of two: the norms of some models are float32
    assert sum(len(row.events) for row in trace.rows) > 0
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-9, atol=0, check_dtype=True)
    ours = gradients(model)
    assert ours.keys() == wanted.keys()
    assert any("lora_" in name for name in ours)
    scale = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (ours[name] / 4 - grad).norm() <= 1e-9 * scale, name
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_full_logits_in_every_family(family, monkeypatch):
    settings = TrainingSettings(steps=1, objective="distill", ce_weight=0.3, temperature=2.0, entropy_weight=0.7)
    found = compare(adapted(family), settings, 7, monkeypatch)
    assert found["divergence"] > 0


@pytest.mark.parametrize("chunk", [1, 68, 1000])
@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_the_chunk_does_not_matter(objective, chunk, monkeypatch):
    divergence = {"divergence": "reverse_kl"} if objective == "distill" else {}
    compare(adapted(), TrainingSettings(steps=1, objective=objective, **divergence), chunk, monkeypatch)


@pytest.mark.parametrize("where", [{"targets": ["q_proj", "lm_head"]}, {"save": ["lm_head"]}], ids=["lora", "saved"])
def test_a_head_that_is_trained_gets_its_gradient_and_the_teacher_keeps_the_old_one(where, monkeypatch):
    model = adapted(**where)
    found = compare(model, TrainingSettings(steps=1, objective="distill"), 7, monkeypatch)
    assert found["divergence"] > 0


def test_log_probabilities_and_parts_are_those_of_the_tokens():
    model, batch = ModelWithLoss(adapted(), TrainingSettings(steps=1, objective="distill", ce_weight=0.25)), batch_of()
    with torch.no_grad():
        found = model(batch)
        logits = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = logits.log_softmax(-1).flatten(0, 1)[batch.predicting].gather(-1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(found["log_probs"], expected)
    torch.testing.assert_close(found["cross_entropy"], -expected.sum())
    torch.testing.assert_close(found["loss"], found["divergence"] + 0.25 * found["cross_entropy"])
    with torch.no_grad():
        only = model(batch, cross_entropy_only=True)
    torch.testing.assert_close(only["loss"], found["cross_entropy"])
    assert only["divergence"] == 0


def test_an_untrained_adapter_is_its_teacher_where_nothing_is_evicted():
    model, batch = get_peft_model(tiny_family("Qwen3"), LoraConfig(r=2, target_modules="all-linear")), batch_of()
    wrapped = ModelWithLoss(model, TrainingSettings(steps=1, objective="distill", ce_weight=0))
    for budget, diverges in ((48, False), (16, True)):
        config = EvictionConfig(budget=budget, window=4)
        with simulated_eviction(wrapped, config, batch.prompt_lengths) as trace:
            loss = wrapped(batch, trace)["loss"]
        assert (loss.item() > 1e-3) if diverges else (abs(loss.item()) < 1e-12)


def test_bfloat16_logits_are_reduced_in_float32():
    model, batch = ModelWithLoss(adapted(dtype=torch.bfloat16), TrainingSettings(steps=1)), batch_of()
    loss = model(batch)["loss"]
    with torch.no_grad():
        logits = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = cross_entropy(logits.flatten(0, 1)[batch.predicting].float(), batch.targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)  # the head's products have other shapes
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.requires_grad)


def test_dropout_does_not_disturb_the_check_of_the_head():
    model = get_peft_model(tiny_family("Qwen3"), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    wrapped = ModelWithLoss(model, TrainingSettings(steps=1)).train()
    wrapped(batch_of())
    assert all(module.training for module in wrapped.modules())


def test_a_head_of_another_formula_is_refused():
    class Odd(type(tiny_family("Qwen3"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    model = tiny_family("Qwen3")
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    check_head(model, inputs)
    model.__class__ = Odd
    with pytest.raises(ValueError, match=r"Odd makes its logits .* not known here .*training/head.py"):
        check_head(model, inputs)
    wrapped = ModelWithLoss(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")), SETTINGS)
    with pytest.raises(ValueError, match="Odd makes its logits"):
        wrapped(batch_of())


SETTINGS = TrainingSettings(steps=1)


@pytest.mark.parametrize("family", HEADS)
def test_what_a_model_does_to_its_logits_is_honoured(family):
    """The check would see it if it were not: without the setting the head gives other logits."""
    model, ids = tiny_family(family, **HEADS[family]), torch.tensor([[3, 1, 4, 1, 5]])
    check_head(model, {"input_ids": ids})
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        assert (model.lm_head(hidden) - model_logits(model, hidden)).abs().max() > 0.05


def test_the_gradient_is_taken_once_and_in_chunks():
    """At most a chunk of logits is alive at once, and no head runs in the backward pass."""
    calls, alive, lm_head = [], [], nn.Linear(8, 50, bias=False).requires_grad_(False)

    def losses(hidden, part):
        calls.append(len(hidden))
        assert not any(reference() is not None for reference in alive)
        logits = lm_head(hidden)
        alive.append(torch.utils.weak.TensorWeakRef(logits))
        return logits.logsumexp(-1, keepdim=True)

    hidden = torch.randn(100, 8, requires_grad=True)
    size = head.CHUNK_LOGITS
    head.CHUNK_LOGITS = 32 * 50
    try:
        total, columns = chunked_loss(losses, hidden, lm_head, 50)
    finally:
        head.CHUNK_LOGITS = size
    assert calls == [32, 32, 32, 4]
    total.backward()
    assert calls == [32, 32, 32, 4]
    assert not columns.requires_grad
    expected = torch.autograd.grad(lm_head(hidden).logsumexp(-1).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
