"""On policy: what the simulation says of generated tokens is what they were generated with; and the loop around it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from passes import decode, tiny_model
from peft import LoraConfig, get_peft_model
from short_runs import EVICTED, adapter_bytes, column, run, short_recipe
from transformers import AutoTokenizer

from vkvtrain import simulated_eviction
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import loop
from vkvtrain.training.data import Row, collate, load_data
from vkvtrain.training.loop import train
from vkvtrain.training.models import load_model
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.on_policy import check_on_policy, log_ratios, roll_out
from vkvtrain.training.settings import CheckpointSettings, Recipe


def recipe(output, eviction=EVICTED, **training):
    chosen = {"steps": 2, "global_batch": 4, "batch_per_device": 2, "objective": "on_policy", "rollout_tokens": 40}
    data = {"source": "tiny:keyed_sum", "rows": 8}
    return short_recipe(output, {"data": data, "training": chosen | training, "eviction": eviction})


def moved_row(row):
    return Row(row.index + 100, row.input_ids, row.prompt_length)


def simulated_log_probs(model, settings, config, rollouts):
    batch = collate([rollout.row for rollout in rollouts], [0] * len(rollouts), 0, torch.device("cpu"))
    wrapped = ModelWithLoss(model, settings.training)
    with torch.no_grad(), simulated_eviction(wrapped, config, batch.prompt_lengths, batch.streams) as trace:
        found = wrapped(batch, trace)
    return found["log_probs"], trace


@pytest.mark.parametrize("policy", ["vase_attnv", "rkv", "random", "curdkv"])
def test_simulation_and_rollout_give_equal_log_probabilities_in_float64(tmp_path, policy):
    """A random model with an adapter that does something; decoding once more in float64 tells how near they are."""
    settings = recipe(tmp_path, {**EVICTED, "policy": policy})
    config = settings.trained_for()
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    rows = [(Row(index, [3 + index, 1, 4, 1, 5, 9, 2, 6][: 8 - index], 8 - index), 0) for index in range(3)]
    rollouts = roll_out(model, SimpleNamespace(eos_token_id=None, chat_template=None), config, rows, settings)
    assert {len(rollout.log_probs) for rollout in rollouts} == {40}
    log_probs, trace = simulated_log_probs(model, settings, config, rollouts)
    assert min(len(row.events) for row in trace.rows) >= 2
    assert log_ratios(Accelerator(), rollouts, log_probs)["log_ratio_max"] < 1e-9
    for place, rollout in enumerate(rollouts):
        ids, prompt = rollout.row.input_ids, rollout.row.prompt_length
        logits, _, _ = decode(model, config, [ids], [prompt], [(rollout.row.index, 0, 0)])
        exact = logits[0].log_softmax(-1)[range(prompt - 1, len(ids) - 1), ids[prompt:]]
        assert (exact - log_probs[40 * place : 40 * (place + 1)]).abs().max() < 1e-9


def test_simulation_and_rollout_agree_on_the_embedded_model_in_float32(tmp_path):
    settings = recipe(tmp_path / "run", {**EVICTED, "budget": 48, "window": 16}, rollout_tokens=160)
    torch.manual_seed(0)
    model, tokenizer = load_model(settings), AutoTokenizer.from_pretrained(str(MODEL_PATH))
    rows = [(row, 0) for row in load_data(settings.data, tokenizer).train[:4]]
    rollouts = roll_out(model, tokenizer, settings.trained_for(), rows, settings)
    log_probs, trace = simulated_log_probs(model, settings, settings.trained_for(), rollouts)
    assert min(len(row.events) for row in trace.rows) >= 3
    assert any(rollout.finished for rollout in rollouts)
    ratios = log_ratios(Accelerator(), rollouts, log_probs)
    assert ratios["log_ratio_mean"] <= ratios["log_ratio_max"] < 1e-3
    # with another stream the simulation keeps other entries: the check can fail
    moved = [replace(rollout, row=moved_row(rollout.row)) for rollout in rollouts]
    other, _ = simulated_log_probs(model, settings, settings.trained_for(), moved)
    assert log_ratios(Accelerator(), rollouts, other)["log_ratio_max"] > 1e-2


def test_a_rollout_depends_on_its_row_and_epoch_alone(tmp_path):
    settings = recipe(tmp_path / "run")
    torch.manual_seed(0)
    model, tokenizer = load_model(settings).train(), AutoTokenizer.from_pretrained(str(MODEL_PATH))
    rows = load_data(settings.data, tokenizer).train[:3]
    together = roll_out(model, tokenizer, settings.trained_for(), [(row, 0) for row in rows], settings)
    assert model.training
    alone = roll_out(model, tokenizer, settings.trained_for(), [(rows[2], 0)], settings)[0]
    assert alone.row == together[2].row
    assert alone.log_probs == pytest.approx(together[2].log_probs, abs=1e-4)
    later = roll_out(model, tokenizer, settings.trained_for(), [(rows[2], 1)], settings)[0]
    assert later.row.input_ids != alone.row.input_ids
    assert [rollout.row.prompt_length for rollout in together] == [row.prompt_length for row in rows]
    for rollout, row in zip(together, rows, strict=True):
        assert rollout.row.input_ids[: row.prompt_length] == row.input_ids[: row.prompt_length]
        assert len(rollout.log_probs) == rollout.row.response_length
        assert rollout.finished == (rollout.row.input_ids[-1] == tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_the_loop_trains_on_what_was_generated(tmp_path, name):
    settings = recipe(tmp_path / "run", divergence=name, dense_fraction=0.34, steps=3, rollout_temperature=1.0)
    rows = run(settings)
    assert [row["kind"] for row in rows] == ["evicted", "evicted", "dense"]
    for row in rows:
        assert row["log_ratio_max"] < 1e-3
        assert 0 < row["rollout_tokens"] <= 40
        assert 0 <= row["rollout_finished"] <= 1
        assert row["loss"] == pytest.approx(row["divergence"], rel=1e-6)
    assert all(row["evictions"] > 1 and row["loss"] > 1e-3 for row in rows[:2])


def test_accumulation_does_not_change_on_policy_training(tmp_path):
    logs = [run(recipe(tmp_path / str(size), batch_per_device=size, steps=2)) for size in (4, 1)]
    for name in ("loss", "grad_norm", "evictions", "rollout_tokens"):
        assert column(logs[1], name) == pytest.approx(column(logs[0], name), rel=1e-4), name


def test_a_run_that_is_stopped_goes_on_with_the_same_rollouts(tmp_path, monkeypatch):
    """Bit for bit, through a checkpoint; policy and budget move with the steps too."""
    moving = {"policy": ["vase_attnv", "snapkv"], "budget": {"from": 40, "to": 24}, "window": 8}

    def settings(name):
        chosen = recipe(tmp_path / name, moving, steps=3, global_batch=2, rollout_tokens=30)
        return chosen.model_copy(update={"checkpoint": CheckpointSettings(every=1)})

    whole, inner = run(settings("whole")), loop.train_step

    def stopping(state):
        if state.step == 2:
            raise KeyboardInterrupt
        return inner(state)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(settings("parts"))
    monkeypatch.setattr(loop, "train_step", inner)
    parts = run(settings("parts"))
    for name in ("step", "loss", "grad_norm", "policy", "budget", "rollout_tokens", "log_ratio_max"):
        assert column(parts, name) == column(whole, name), name
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")


def test_an_untrained_adapter_that_generates_without_eviction_is_its_teacher(tmp_path):
    rows = run(recipe(tmp_path / "run", {**EVICTED, "budget": 96}, steps=1))
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["evictions"] == 0


def test_dropout_would_make_training_see_another_model(tmp_path):
    values = recipe(tmp_path).model_dump(mode="json")
    values["lora"]["dropout"] = 0.1
    with pytest.raises(ValueError, match=r"lora.dropout \(0.1\) would make training see another model.*on_policy"):
        Recipe(**values)


@pytest.mark.parametrize(
    ("kind", "stage", "refused"),
    [
        (DistributedType.FSDP, None, True),
        (DistributedType.DEEPSPEED, 3, True),
        (DistributedType.DEEPSPEED, 2, False),
        (DistributedType.MULTI_GPU, None, False),
        (DistributedType.NO, None, False),
    ],
)
def test_engines_that_shard_the_model_are_refused(tmp_path, kind, stage, refused):
    accelerator = SimpleNamespace(
        distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    )
    check_on_policy(recipe(tmp_path, objective="distill", rollout_tokens=None), accelerator)
    if not refused:
        check_on_policy(recipe(tmp_path), accelerator)
        return
    with pytest.raises(ValueError, match=r"on_policy generates on every process.*DDP or DeepSpeed ZeRO-2"):
        check_on_policy(recipe(tmp_path), accelerator)
