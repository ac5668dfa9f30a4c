"""What a run shows: its log, trackers, held-out losses, generated answers, and the report at its end."""

import json
import random

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from short_runs import metrics, short_recipe
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.generation import Completion, generate
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training import generated, logs
from vkvtrain.training.data import Row, TrainingData, load_data
from vkvtrain.training.generated import requests, right
from vkvtrain.training.held_out import shares
from vkvtrain.training.logs import trackers
from vkvtrain.training.loop import check_loss_masks, train
from vkvtrain.training.report import plot, report
from vkvtrain.training.settings import LogSettings


def recipe(output, **sections):
    defaults = {
        "data": {"source": "tiny:keyed_sum", "rows": 12, "held_out": 5},
        "lora": {"r": 4, "alpha": 8},
        "eviction": {"policy": "vase_attnv", "budget": [48, 64], "window": 16},
        "training": {"steps": 4, "global_batch": 3, "batch_per_device": 2, "dense_fraction": 0.25},
        "log": {"tracker": "auto", "evaluate_every": 2, "generate_every": 3, "generate_samples": 3},
    }
    return short_recipe(output, defaults, sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    settings = recipe(tmp_path_factory.mktemp("finished") / "run")
    train(settings)
    return settings


def test_the_log_has_what_is_promised(finished):
    rows = metrics(finished.output)
    always = {
        "step", "kind", "loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gib",
    }  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert always <= row.keys()
        assert 0.1 < row["peak_memory_gib"] < 50
        assert ("evictions" in row) == ("live_fraction" in row) == (row["kind"] == "evicted")
    for name in ("held_out", "train"):
        losses = {f"{name}_{part}" for part in ("loss_full", "loss_evicted_48", "gap_evicted_48", "gap_evicted_64")}
        assert [losses <= row.keys() for row in rows] == [False, True, False, True]
        last = rows[-1]
        assert last[f"{name}_gap_evicted_48"] == pytest.approx(
            last[f"{name}_loss_evicted_48"] - last[f"{name}_loss_full"], abs=2e-5
        )
        assert last[f"{name}_gap_evicted_48"] > last[f"{name}_gap_evicted_64"] > 0
    assert ["generated_right_48" in row for row in rows] == [False, False, True, True]
    assert rows[-1]["generated_evictions_48"] > 5


def test_the_held_out_losses_are_those_of_the_finished_adapter_row_by_row(finished):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
    model = PeftModel.from_pretrained(base, finished.output)
    rows = load_data(finished.data, AutoTokenizer.from_pretrained(str(MODEL_PATH))).held_out
    config, summed, targets = EvictionConfig(policy="vase_attnv", budget=48, window=16), 0.0, 0
    for row in rows:
        ids, start = torch.tensor(row.input_ids).long(), row.prompt_length
        with torch.no_grad(), simulated_eviction(model, config, [start], [(row.index, 0, 0)]):
            logits = model(input_ids=ids[None]).logits[0]
        summed += cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item()
        targets += row.response_length
    last = metrics(finished.output)[-1]
    assert last["held_out_loss_evicted_48"] == pytest.approx(summed / targets, rel=1e-3)


def test_generated_answers_are_graded_and_counted(finished):
    """The same answers outside of training: by the slot engine, from the finished adapter."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    base = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
    model = PeftModel.from_pretrained(base, finished.output).eval()
    rows = load_data(finished.data, tokenizer).held_out[:3]
    config = EvictionConfig(policy="vase_attnv", budget=48, window=16)
    answers = generate(model, config, requests(rows), slots=2, end_tokens=[tokenizer.eos_token_id])
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    wanted = [tokenizer.decode(list(row.input_ids[row.prompt_length :])) for row in rows]
    totals = [
        text.partition("</think>")[2][:1] == want.partition("</think>")[2][:1]
        for text, want in zip(texts, wanted, strict=True)
    ]
    last = metrics(finished.output)[-1]
    assert last["generated_right_48"] == pytest.approx(sum(totals) / 3, abs=1e-4)
    assert last["generated_finished_48"] == pytest.approx(sum(answer.finished for answer in answers) / 3, abs=1e-4)


def test_what_is_right():
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))

    class FakeRun:
        recipe = recipe("x")

    FakeRun.tokenizer = tokenizer
    prompt = tokenizer("a1@58?")["input_ids"]

    def tokens(text):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    row = Row(0, [*prompt, *tokens("<think>a:1+0=1;</think>1@58")], len(prompt))

    def answer(text):
        return Completion(tokens(text), True, [], 0, 0)

    assert right(FakeRun, row, answer("<think>a:1+0=1;</think>1@58"))
    assert right(FakeRun, row, answer("<think>a:2+0=1;</think>1@99"))  # graded by the total
    assert not right(FakeRun, row, answer("<think>a:1+0=1;</think>2@58"))
    assert not right(FakeRun, row, answer("1@58"))
    FakeRun.recipe = recipe("x", data={"source": "rows.jsonl"})  # without a grader: the same text
    assert right(FakeRun, row, answer("<think>a:1+0=1;</think>1@58"))
    assert not right(FakeRun, row, answer("<think>a:2+0=1;</think>1@58"))


def test_generating_needs_rows_and_whole_models(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"log.generate_every needs held-out rows: raise data.held_out"):
        recipe(tmp_path, data={"held_out": 0})
    monkeypatch.setattr(generated, "shards_weights", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"log.generate_every generates on every process, which FSDP and ZeRO-3"):
        generated.check_generated(recipe(tmp_path), Accelerator())
    never = {"generate_every": None, "generate_samples": 16}
    generated.check_generated(recipe(tmp_path, log=never), Accelerator())


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_held_out_rows_are_counted_once_in_as_many_passes_everywhere(processes):
    rng = random.Random(processes)
    for _ in range(20):
        rows = [Row(index, [1, 2], 1) for index in range(rng.randint(1, 30))]
        size = rng.randint(1, 5)
        parts = [shares(rows, size, rank, processes) for rank in range(processes)]
        assert len({len(part) for part in parts}) == 1
        counted = [row.index for part in parts for chosen, counts in part if counts for row in chosen]
        assert sorted(counted) == list(range(len(rows)))
        assert all(1 <= len(chosen) <= size for part in parts for chosen, _ in part)


def test_the_report_says_what_happened(finished):
    text = (finished.output / "report.md").read_text()
    rows = metrics(finished.output)
    assert (finished.output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "- steps: 4, 1 of them dense" in text
    assert f"| held_out_loss_full | {rows[1]['held_out_loss_full']} | {rows[3]['held_out_loss_full']} |" in text
    assert f"- loss: {rows[0]['loss']:.4f} at first, {rows[3]['loss']:.4f} over the last 1" in text
    assert "policy: vase_attnv" in text
    assert "nothing was evicted" not in text
    quiet = [{**row, "evictions": 0.0} if row["kind"] == "evicted" else row for row in rows]
    assert "nothing was evicted, and this was a dense run" in report(quiet, finished)
    drawn = [axes for axes in plot(rows, finished).axes if axes.lines]
    assert len(drawn) == 4
    assert list(drawn[1].lines[0].get_ydata()) == [rows[1]["held_out_loss_full"], rows[3]["held_out_loss_full"]]


def test_tensorboard_is_the_default_where_it_is_installed(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert finished.log.tracker == "auto"
    events = EventAccumulator(str(finished.output / "vkvtrain"))
    events.Reload()
    rows = metrics(finished.output)
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3, 4]
    assert [event.value for event in logged] == pytest.approx([row["loss"] for row in rows])


def test_every_tracker_of_accelerate_can_be_chosen():
    from typing import get_args

    from vkvtrain.training.settings import Tracker

    assert set(get_args(Tracker)) - {"auto", "none"} == {str(kind) for kind in LoggerType} - {"all"}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    assert trackers(LogSettings(tracker="none")) == []
    assert trackers(LogSettings()) == ["tensorboard"]
    assert trackers(LogSettings(tracker="tensorboard")) == ["tensorboard"]
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    assert trackers(LogSettings()) == []
    with pytest.raises(ValueError, match=r"log.tracker 'wandb' is not installed: pip install wandb"):
        trackers(LogSettings(tracker="wandb"))


def test_rows_without_a_token_to_learn_from_are_named():
    rows = [Row(0, [1, 2], 1), Row(7, [1, 2], 2)]
    with pytest.raises(ValueError, match=r"1 rows have no response token, so their loss mask is all zero \(rows 7\)"):
        check_loss_masks(TrainingData(rows, [], 0))
    check_loss_masks(TrainingData(rows[:1], [], 0))


def test_metrics_are_json(finished):
    for line in (finished.output / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
