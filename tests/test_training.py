"""The training loop against transformers' Trainer, its own equivalence classes, objectives, schedule, run directory."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from short_runs import EVICTED, adapter_bytes, adapter_weights, assert_same_adapter, column, metrics, run, short_recipe
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.events import evictions_by
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.data import Row, load_data, sample, step_batches
from vkvtrain.training.loop import train, train_step
from vkvtrain.training.models import load_model
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.run import Run
from vkvtrain.training.schedule import is_dense, step_eviction
from vkvtrain.training.watch import Failed, Watch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def recipe(source, output, eviction=None, **sections):
    """Sections add to the defaults."""
    defaults = {"data": {"source": str(source)}, "training": {"steps": 3, "global_batch": 16}}
    return short_recipe(output, defaults, sections, {"eviction": eviction})


def assert_same_training(ours, theirs, relative):
    """Losses, norms and what was evicted, of two runs' logs."""
    for name in ("loss", "grad_norm"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=relative)
    for name in ("kind", "budget", "evictions"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def pad_right(rows):
    """A Trainer's batch: -100 where there is no loss."""
    width = max(len(row["ids"]) for row in rows)
    padded = {
        "input_ids": [row["ids"] + [0] * (width - len(row["ids"])) for row in rows],
        "attention_mask": [[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows],
        "labels": [row["labels"] + [-100] * (width - len(row["ids"])) for row in rows],
    }
    return {name: torch.tensor(values) for name, values in padded.items()}


@pytest.mark.parametrize(("ours", "theirs"), [((8, 8), (8, 1)), ((8, 3), (2, 4))], ids=["whole batch", "accumulated"])
def test_agrees_with_the_trainer_of_transformers(noise, tmp_path, ours, theirs):
    """20 float32 steps without eviction: the same data, initial weights and learning rate, stock attention there."""
    (batch, forward), steps = ours, 20
    settings = recipe(
        noise, tmp_path / "ours", lora={"r": 8, "alpha": 24},
        optim={"weight_decay": 0.1, "betas": [0.8, 0.99]},
        training={"steps": steps, "global_batch": batch, "batch_per_device": forward},
    )  # fmt: skip
    logged = run(settings)

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    rows = []
    for line in noise.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"ids": prompt + response, "labels": [-100] * len(prompt) + response})
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=steps, per_device_train_batch_size=theirs[0],
        gradient_accumulation_steps=theirs[1], learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1,
        adam_beta1=0.8, adam_beta2=0.99,
        max_grad_norm=1.0, logging_steps=1, logging_nan_inf_filter=False, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    ordered = [rows[sample(position, len(rows), 0)[0]] for position in range(steps * batch)]
    trainer = InOrder(model, arguments, train_dataset=ordered, data_collator=pad_right)
    trainer.train()
    history = [row for row in trainer.state.log_history if "grad_norm" in row]

    assert len(history) == len(logged) == steps
    assert column(logged, "loss") == pytest.approx(column(history, "loss"), rel=2e-5)
    assert column(logged, "grad_norm") == pytest.approx(column(history, "grad_norm"), rel=2e-5)
    assert column(logged, "learning_rate") == column(history, "learning_rate")
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5  # it trained, so the later steps compare something


def test_the_first_loss_is_what_the_public_context_gives_row_by_row(noise, tmp_path):
    """A fresh adapter changes nothing, so the first step is the base model's, by one row at a time."""
    settings = recipe(
        noise, tmp_path / "run", EVICTED, training={"steps": 1, "global_batch": 60, "batch_per_device": 7}
    )
    logged = run(settings)[0]
    rows = load_data(settings.data, AutoTokenizer.from_pretrained(str(MODEL_PATH))).train
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
    summed, targets, events = 0.0, 0, 0
    for position in range(60):  # more than there are rows: the second epoch draws its own noise
        index, epoch = sample(position, len(rows), 0)
        row = rows[index]
        config, ids = EvictionConfig(**EVICTED), torch.tensor(row.input_ids)
        with torch.no_grad(), simulated_eviction(model, config, [row.prompt_length], [(index, 0, epoch)]):
            logits = model(input_ids=ids[None]).logits[0]
        start = row.prompt_length
        summed += cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item()
        targets += len(ids) - start
        events += evictions_by(start, len(ids), 24, 8)
    assert logged["loss"] == pytest.approx(summed / targets, rel=1e-5)
    assert logged["evictions"] == pytest.approx(events / 60, abs=1e-3)
    assert 0 < logged["live_fraction"] < 1
    assert (logged["step"], logged["kind"], logged["budget"]) == (1, "evicted", 24)


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_accumulation_does_not_change_training_under_eviction(noise, tmp_path, objective):
    logs = {}
    for size in (16, 4, 1):
        logs[size] = run(
            recipe(
                noise, tmp_path / str(size), {**EVICTED, "budget": [24, 32]},
                training={"objective": objective, "dense_fraction": 0.25, "steps": 4, "batch_per_device": size},
            )
        )  # fmt: skip
    assert column(logs[16], "kind") == ["evicted"] * 3 + ["dense"]
    assert all(row["evictions"] > 0.3 for row in logs[16][:3])
    for size in (4, 1):
        assert_same_training(logs[size], logs[16], 1e-5)
        assert_same_adapter(tmp_path / str(size), tmp_path / "16", 2e-3)


def test_the_logged_live_share_does_not_depend_on_accumulation(noise, tmp_path):
    shares = []
    for size in (16, 5, 1):
        settings = recipe(noise, tmp_path / str(size), EVICTED, training={"steps": 1, "batch_per_device": size})
        shares.append(run(settings)[0]["live_fraction"])
    assert shares == pytest.approx([shares[0]] * 3, abs=2e-4)


@pytest.fixture
def layer_calls(monkeypatch):
    """Counts the forward passes of decoder layers, recomputation included."""
    calls, forward = [], Qwen3MLP.forward

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    return calls


@pytest.mark.parametrize(("objective", "passes"), [("sft", 1), ("distill", 2)])
def test_gradient_checkpointing_recomputes_and_changes_nothing(noise, tmp_path, layer_calls, objective, passes):
    logs, calls = [], []
    for checkpointing in (False, True):
        layer_calls.clear()
        settings = recipe(
            noise, tmp_path / str(checkpointing), EVICTED, model={"gradient_checkpointing": checkpointing},
            training={"objective": objective, "dense_fraction": 0.5, "steps": 2, "batch_per_device": 8},
        )  # fmt: skip
        logs.append(run(settings))
        calls.append(len(layer_calls))
    assert_same_training(logs[1], logs[0], 1e-6)
    assert_same_adapter(tmp_path / "True", tmp_path / "False", 1e-3)
    layers = 4 * 2 * 2  # of the model, over two steps of two forward passes
    check = 2 * 4  # the head is compared with the model's own logits once
    # the teacher's pass keeps nothing to recompute
    assert calls == [check + passes * layers, check + (passes + 1) * layers]


def test_dropout_of_the_adapter_is_on_in_training(noise, tmp_path):
    """With a fresh adapter dropout shows in the gradient alone."""
    settings = {"training": {"steps": 1}}
    without = run(recipe(noise, tmp_path / "0", **settings))[0]
    with_dropout = run(recipe(noise, tmp_path / "1", lora={"dropout": 0.5}, **settings))[0]
    assert with_dropout["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert abs(with_dropout["grad_norm"] / without["grad_norm"] - 1) > 0.01


def test_a_recipe_gives_the_same_adapter_every_time(noise, tmp_path):
    sections = {"lora": {"dropout": 0.1}, "training": {"batch_per_device": 8}}
    logs = [run(recipe(noise, tmp_path / name, EVICTED, **sections)) for name in ("a", "b")]
    other = run(recipe(noise, tmp_path / "c", EVICTED, **sections, seed=1))
    for row in (*logs[0], *logs[1]):
        del row["tokens_per_second"], row["peak_memory_gib"]
    assert logs[0] == logs[1]
    weights = [adapter_bytes(tmp_path / name) for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert column(other, "loss") != column(logs[0], "loss")


def test_distillation_runs_end_to_end(noise, tmp_path):
    evicted = run(recipe(noise, tmp_path / "a", EVICTED, training={"objective": "distill", "steps": 2}))
    assert all(math.isfinite(row["loss"]) and row["evictions"] > 0 for row in evicted)
    # a fresh adapter with the full cache is the teacher: without cross-entropy nothing is left to learn
    divergence = {"objective": "distill", "ce_weight": 0.0, "steps": 1}
    dense = run(recipe(noise, tmp_path / "b", training=divergence))
    assert dense[0]["loss"] == pytest.approx(0, abs=1e-6)
    alone = run(recipe(noise, tmp_path / "c", EVICTED, training=divergence))
    assert alone[0]["loss"] > 1e-3
    sft = run(recipe(noise, tmp_path / "d", EVICTED, training={"steps": 1}))
    assert evicted[0]["loss"] == pytest.approx(alone[0]["loss"] + sft[0]["loss"], rel=1e-5)


def test_dense_fractions_of_zero_and_one(noise, tmp_path):
    assert not any(is_dense(step, 0) for step in range(100))
    assert all(is_dense(step, 1) for step in range(100))
    never = run(recipe(noise, tmp_path / "never", EVICTED, training={"dense_fraction": 1}))
    run(recipe(noise, tmp_path / "without"))
    assert column(never, "kind") == ["dense"] * 3
    assert not any("evictions" in row for row in never)
    weights = [adapter_bytes(tmp_path / name) for name in ("never", "without")]
    assert weights[0] == weights[1]
    for name in ("never", "without"):
        assert EvictionConfig.from_pretrained(tmp_path / name) == EvictionConfig(policy="full")


def test_the_log_says_which_budget_a_step_had(noise, tmp_path):
    settings = recipe(
        noise, tmp_path / "run", {**EVICTED, "budget": [24, 64]},
        training={"steps": 24, "dense_fraction": 0.34, "global_batch": 1},
    )  # fmt: skip
    configs = [step_eviction(settings, step) for step in range(24)]
    logged = run(settings)
    assert [row.get("budget") for row in logged] == [config and config.budget for config in configs]
    assert {row.get("budget") for row in logged} == {24, 64, None}
    assert column(logged, "step") == list(range(1, 25))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *((1 + math.cos(math.pi * part / 4)) / 2 for part in range(4))]),
    ],
)
def test_learning_rate_after_the_warm_up(noise, tmp_path, schedule, expected):
    settings = recipe(
        noise, tmp_path / "run", training={"steps": 6, "global_batch": 2},
        optim={"schedule": schedule, "warmup_steps": 2},
    )  # fmt: skip
    assert column(run(settings), "learning_rate") == pytest.approx([1e-3 * share for share in expected])


def test_what_a_run_leaves_behind(noise, tmp_path):
    settings = recipe(
        noise, tmp_path / "run", {**EVICTED, "budget": [32, 24]}, data={"held_out": 4, "max_length": 70},
        log={"evaluate_every": 2},
    )  # fmt: skip
    logged = run(settings)
    directory = settings.output
    assert load_recipe(directory / "recipe.yaml") == settings
    assert EvictionConfig.from_pretrained(directory) == EvictionConfig(**{**EVICTED, "budget": 32})
    environment = json.loads((directory / "environment.json").read_text())
    assert torch.__version__.startswith(environment["torch"])  # a wheel may not state its "+cpu"
    assert {"python", "vkvtrain", "transformers", "peft", "accelerate", "git"} <= environment.keys()
    assert json.loads((directory / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<eos>"
    weights = adapter_weights(directory)
    assert weights
    assert all("lora_" in name and weight.isfinite().all() for name, weight in weights.items())
    assert column(logged, "step") == [1, 2, 3]
    held_out = {"held_out_loss_full", "held_out_loss_evicted_24", "held_out_loss_evicted_32"}
    assert [held_out <= row.keys() for row in logged] == [False, True, True]  # each second step, and the last
    assert not any(name in logged[0] for name in held_out)
    assert all(row["tokens_per_second"] > 0 for row in logged)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_the_adapter_reloads_with_plain_peft(noise, tmp_path, init):
    """On a stock model; its losses on the held-out rows, full and evicted, are those that training printed last."""
    settings = recipe(noise, tmp_path / "run", EVICTED, data={"held_out": 6}, lora={"init": init})
    last = run(settings)[-1]
    rows = load_data(settings.data, AutoTokenizer.from_pretrained(str(MODEL_PATH))).held_out

    def loss(attention, config):
        model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation=attention)
        model = PeftModel.from_pretrained(model, settings.output)
        summed = 0.0
        for row in rows:
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                if config is None:
                    logits = model(input_ids=ids).logits[0]
                else:
                    with simulated_eviction(model, config, [row.prompt_length], [(row.index, 0, 0)]):
                        logits = model(input_ids=ids).logits[0]
            start = row.prompt_length
            summed += cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()
        return summed / sum(row.response_length for row in rows)

    full, evicted = loss("sdpa", None), loss("vkvtrain", EvictionConfig.from_pretrained(settings.output))
    assert full == pytest.approx(last["held_out_loss_full"], rel=1e-4)
    assert evicted == pytest.approx(last["held_out_loss_evicted_24"], rel=1e-4)
    assert abs(full - evicted) > 1e-3


def test_a_finished_run_is_not_overwritten_by_accident(noise, tmp_path):
    settings = recipe(noise, tmp_path / "run", training={"steps": 1, "global_batch": 2})
    run(settings)
    before = adapter_bytes(settings.output)
    again = recipe(noise, tmp_path / "run", training={"steps": 2, "global_batch": 2}, seed=1)
    with pytest.raises(ValueError, match=r"holds a finished run.*--overwrite"):
        train(again)
    assert adapter_bytes(settings.output) == before
    assert len(metrics(settings.output)) == 1
    assert len(run(again, overwrite=True)) == 2
    assert adapter_bytes(settings.output) != before
    assert load_recipe(settings.output / "recipe.yaml") == again


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_adapter(noise, tmp_path):
    run(recipe(noise, tmp_path / "run", training={"steps": 1, "global_batch": 2}))
    broken = recipe(noise, tmp_path / "run", training={"global_batch": 2}, optim={"learning_rate": 1e30})
    with pytest.raises(Failed, match=r"step 2: the loss is nan; samples \[\d+, \d+\].*learning_rate"):
        train(broken, overwrite=True)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert len(metrics(tmp_path / "run")) == 1
    other = recipe(noise, tmp_path / "run", training={"steps": 1, "global_batch": 2})
    with pytest.raises(ValueError, match="holds checkpoints of another recipe"):
        run(other)
    run(other, overwrite=True)


def test_gradients_are_clipped_to_the_norm(noise, tmp_path):
    """Adam forgets the scale of all gradients, so the clipped gradient itself is looked at."""
    settings = recipe(noise, tmp_path / "run", optim={"max_grad_norm": 0.25})
    torch.manual_seed(0)
    model, accelerator = ModelWithLoss(load_model(settings), settings.training), Accelerator()
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            grads = [weight.grad for group in self.param_groups for weight in group["params"]]
            seen.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    optimizer = Recorder([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    logged, _ = train_step(
        Run(settings, accelerator, model, optimizer, None, load_data(settings.data, tokenizer), tokenizer, Watch(64))
    )
    assert logged["grad_norm"] > 0.5
    assert seen == pytest.approx([0.25], rel=1e-4)


def test_the_adapter_is_float32_whatever_the_base_is(noise, tmp_path):
    model = load_model(recipe(noise, tmp_path, model={"dtype": "bfloat16"}))
    kinds = {("lora_" in name, weight.dtype, weight.requires_grad) for name, weight in model.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", [False, True])
def test_the_global_batch_does_not_depend_on_the_processes(noise, tmp_path, processes, packing):
    settings = recipe(noise, tmp_path, data={"packing": packing}, training={"global_batch": 8, "batch_per_device": 2})
    rows = [Row(index, range(1, 3 + 5 * index % 17), 1) for index in range(20)]
    for step in range(6):
        shares = [step_batches(settings, rows, step, rank, processes, 0, CPU) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1  # as many forward passes in every process
        streams = [stream for share in shares for batch in share for stream in batch.streams]
        assert sorted(streams) == sorted(
            (index, 0, epoch) for index, epoch in (sample(step * 8 + offset, 20, 0) for offset in range(8))
        )
        assert all(batch.input_ids.shape[0] <= 2 for share in shares for batch in share)
