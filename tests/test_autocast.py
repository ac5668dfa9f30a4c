"""Autocast and mixed dtypes: attention is entered in one dtype, in both passes, and scores stay in float32."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import reset_accelerator
from families import FAMILIES, tiny_family
from passes import held_at, right_padded, rows_of, tiny_model
from transformers import AttentionInterface, Trainer, TrainingArguments

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.generation import Request, generate
from vkvtrain.policies import POLICIES
from vkvtrain.training.loop import train
from vkvtrain.training.settings import Recipe
from vkvtrain.versions import cache_argument, enable_checkpointing

CONFIG = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "agreement.py"
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def agreement():
    """`benchmarks/agreement.py`, which measures what the README says."""
    spec = importlib.util.spec_from_file_location("agreement", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreement"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attended():
    """An attention implementation that notes what attention is given, by layer, before ours computes it."""
    ours, seen = AttentionInterface()["vkvtrain"], {}

    def note(module, query, key, value, attention_mask, **kwargs):
        seen[module.layer_idx] = (module, query, key, value, kwargs["scaling"])
        return ours(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("note", note)
    return seen


def simulate_noted(model, rows, prompts, config, dtype):
    """The trace of a pass under autocast whose attention is the noting one."""
    ids, mask = right_padded(rows)
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        simulated_eviction(model, config, prompts, [7, 8]) as trace,
    ):
        model.config._attn_implementation = "note"  # after the block has checked it
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    model.config._attn_implementation = "vkvtrain"
    return trace


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_decisions_replayed_under_autocast(policy, dtype, attended):
    """Queries, keys and values of the training pass, token by token: the same kept sets, with autocast and without it
    for tensors of its dtype. Scores that autocast computed would be others."""
    model = tiny_model(dtype=torch.float32, vocab=40)
    config, prompts, rows = CONFIG.model_copy(update={"policy": policy}), [9, 45], rows_of([9, 45], 60, vocab=40)
    trace = simulate_noted(model, rows, prompts, config, dtype)
    ours = AttentionInterface()["vkvtrain"]
    for layer, (module, query, key, value, scaling) in attended.items():
        assert (query.dtype, value.dtype) == (torch.float32, dtype)
        for row, prompt in enumerate(prompts):
            for autocast in (True, False):
                cache = EvictionCache(config, model.config, [[7, 8][row]])
                given = [query, key, value] if autocast else [part.to(dtype) for part in (query, key, value)]
                for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(rows[row])))]:
                    q, k, v = (part[row : row + 1, :, start:end] for part in given)
                    with torch.autocast("cpu", dtype, enabled=autocast):
                        k, v = cache.update(k, v, layer)
                        assert k.dtype == v.dtype == dtype
                        assert ours(module, q, k, v, None, scaling=scaling)[0].dtype == dtype
                    assert held_at(trace.evict_at[layer], row, end) == cache.positions(layer, 0).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_both_passes_agree_as_the_readme_says(agreement, autocast, dtype):
    settings = agreement.Settings(dtype=dtype, autocast=autocast, layers=2, tokens=120)
    model = agreement.make_model(settings)
    for policy, least in (("vase_attnv", 0.97), ("snapkv", 0.9), ("random", 1.0)):
        found = agreement.measure(model, settings, policy)
        assert found.sets == 2 * 2 * 2 * 7
        assert found.equal_entries >= least
        assert found.logits < 1
    exact = agreement.Settings(dtype="float32", layers=2, tokens=120)
    found = agreement.measure(agreement.make_model(exact), exact, "vase_attnv")
    assert (found.equal_sets, found.equal_entries) == (found.sets, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_under_autocast(family):
    """A pass with `full` is the stock attention's under autocast, up to bfloat16's rounding; decoding is the same."""
    stock_attention = "eager" if family in ("Gemma2", "gpt-oss") else "sdpa"
    model, stock = (tiny_family(family, dtype=torch.float32, attention=name) for name in ("vkvtrain", stock_attention))
    ids = torch.tensor(rows_of([30], 20))
    full = EvictionConfig(policy="full")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = stock(input_ids=ids).logits.float()
        plain = model(input_ids=ids, use_cache=False).logits.float()
        with simulated_eviction(model, full, [30]):
            simulated = model(input_ids=ids, use_cache=False).logits.float()
        cache = EvictionCache(full, model.config)
        parts = [ids[:, :30], *ids[:, 30:].split(1, 1)]
        decoded = torch.cat([model(input_ids=part, **cache_argument(cache)).logits for part in parts], 1).float()
    scale = expected.abs().max()
    for logits in (plain, simulated, decoded):
        assert (logits - expected).abs().mean() < 0.03 * scale


@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_gradients_under_autocast(family, checkpointing, dtype):
    """Backward inside autocast or after it: the same gradients, and close to those in float32."""
    ids, mask = right_padded(rows_of([7, 20], steps=30))

    def gradients(autocast, backward_inside):
        model = tiny_family(family, dtype=torch.float32).train()
        if checkpointing is not None:
            enable_checkpointing(model, use_reentrant=checkpointing)
            model.enable_input_require_grads()
        with simulated_eviction(model, CONFIG.model_copy(update={"policy": "random"}), [7, 20]):
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().square().mean()
                if backward_inside:
                    loss.backward()
            if not backward_inside:
                loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    after, inside, exact = gradients(True, False), gradients(True, True), gradients(False, False)
    assert after.keys() == inside.keys() == exact.keys()
    for name, gradient in after.items():
        assert gradient.isfinite().all()
        if "self_attn" in name and "norm" not in name:
            distance = (gradient - exact[name]).norm() / exact[name].norm()
            assert distance < 0.25, name
            assert (gradient - inside[name]).norm() / exact[name].norm() < 0.1, name


def test_float32_norms_in_a_bfloat16_model():
    """As `prepare_model_for_kbit_training` leaves them: queries and keys come in float32, values in bfloat16."""
    model = tiny_model(dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            weight.data = weight.data.float()
    ids, mask = right_padded(rows_of([7, 20], steps=30))
    with simulated_eviction(model, CONFIG, [7, 20]):
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    cache = EvictionCache(CONFIG, model.config)
    model.generate(ids[:1, :20], **cache_argument(cache), max_new_tokens=30, do_sample=False)
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16


@torch.no_grad()
def test_a_sequence_is_decoded_with_autocast_or_without():
    model = tiny_model(dtype=torch.float32)
    ids, cache = torch.tensor([[5, 6, 7, 8]]), EvictionCache(CONFIG, model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, **cache_argument(cache))
    assert cache.layers[0].keys.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="with autocast or without"):
        model(input_ids=ids[:, :1], **cache_argument(cache))


def test_float64_is_left_alone():
    """Autocast does not lower float64, and neither does attention."""
    model = tiny_model()
    ids, mask = right_padded(rows_of([7, 20], steps=30))
    found = []
    for autocast in (False, True):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            simulated_eviction(model, CONFIG, [7, 20]) as trace,
        ):
            model(input_ids=ids, attention_mask=mask)
        found.append(trace.evict_at)
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


@pytest.mark.parametrize("compile", [False, True])
def test_the_slot_engine_under_autocast(compile):
    """Compiled or not, the events included: the same answers, and decisions made outside autocast."""
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float32, vocab=200)
    requests = [Request(tuple(row), 30, i) for i, row in enumerate(rows_of([3, 30], steps=0, vocab=200))]
    with torch.autocast("cpu", torch.bfloat16):
        found = list(generate(model, CONFIG, requests, slots=2, end_tokens=(), compile=compile))
        for request, answer in zip(requests, found, strict=True):
            cache = EvictionCache(CONFIG, model.config, [request.stream])
            out = model.generate(
                torch.tensor([request.prompt]), **cache_argument(cache), max_new_tokens=30, do_sample=False
            )
            same = sum(a == b for a, b in zip(out[0, len(request.prompt) :].tolist(), answer.tokens, strict=True))
            assert same >= (30 if not compile else 10)
            assert answer.evictions == cache.stats()[0]["evictions"]
    torch._dynamo.reset()


def recipe(output, **training):
    return Recipe(
        model={"name": "tiny"}, data={"source": "tiny:keyed_sum", "rows": 8, "held_out": 0},
        lora={"r": 4, "alpha": 8}, eviction={"policy": "vase_attnv", "budget": 64, "window": 16},
        training={"steps": 2, "global_batch": 2, **training}, optim={"warmup_steps": 0}, log={"tracker": "none"},
        output=output,
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["sft", "distill", "on_policy"])
def test_training_in_mixed_precision(objective, tmp_path, monkeypatch):
    """`mixed_precision: bf16` over float32 weights trains, near what float32 gives; rollouts are under autocast too."""
    logs = {}
    rollouts = {"rollout_tokens": 100} if objective == "on_policy" else {}
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        reset_accelerator()
        train(recipe(tmp_path / precision, objective=objective, **rollouts))
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        logs[precision] = [json.loads(line) for line in lines]
    steps = {name: [row for row in rows if "loss" in row] for name, rows in logs.items()}
    assert len(steps["bf16"]) == 2
    if objective == "on_policy":
        assert 0 < steps["bf16"][0]["log_ratio_mean"] < 0.05
    else:
        assert steps["bf16"][0]["loss"] == pytest.approx(steps["no"][0]["loss"], rel=0.05)
        assert steps["bf16"][0]["loss"] != steps["no"][0]["loss"]


def test_a_trainer_in_bfloat16(tmp_path):
    """transformers' Trainer with `bf16=True`, TRL's default, its steps inside the block."""
    losses = {}

    class Evicting(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            with simulated_eviction(model, CONFIG, [7] * len(inputs["input_ids"])) as trace:
                loss = super().training_step(model, inputs, *args, **kwargs)
            assert any((at <= 40).any() for at in trace.evict_at.values())
            return loss

    rows = [{"input_ids": row, "labels": row} for row in rows_of([7] * 4, steps=40, vocab=40)]
    for bf16 in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), bf16=bf16, use_cpu=True, max_steps=2, per_device_train_batch_size=2,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        model = tiny_model(dtype=torch.float32).train()
        trainer = Evicting(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses[bf16] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
