"""The evidence on a pretrained model: arms that differ in one thing, what their records say, and the tables of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vkvtrain import EvictionConfig, ledger
from vkvtrain.ablation.grid import load_sweep
from vkvtrain.events import events_of
from vkvtrain.training.overrides import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/smollm2"))
    import arms

    return arms


@pytest.fixture
def study(arms, tmp_path):
    return arms.Study(records=tmp_path / "records")


@pytest.fixture
def findings(arms):
    import findings

    return findings


def settings_of(arms, recipe):
    return load_recipe(str(ROOT / arms.HERE / f"{recipe}.yaml"), {}).model_dump(mode="json")


def test_arms_differ_in_what_they_are_named_for_alone(arms):
    vase = settings_of(arms, "vase")
    assert vase["eviction"]["budget"] == list(arms.BUDGETS)
    assert vase["eviction"]["window"] == arms.WINDOW
    assert vase["data"]["source"] == "ledger:people=4,events=6,seed=1"
    assert settings_of(arms, "base")["data"]["source"] == "ledger:people=4,events=6"  # other rows than the arms'
    named = {
        "dense": {"eviction": None},
        "random": {"eviction": vase["eviction"] | {"policy": "random"}},
        "snapkv": {"eviction": vase["eviction"] | {"policy": "snapkv"}},
        "distill": {"training": vase["training"] | {"objective": "distill", "ce_weight": 0.0}},
    }
    assert {arm.recipe for arm in arms.ARMS} == {"vase", *named}
    for recipe, changes in named.items():
        assert settings_of(arms, recipe) == vase | changes | {"output": f"runs/ledger/{recipe}"}


def test_the_sweep_has_every_arm_and_every_cell(arms):
    sweep = load_sweep(ROOT / arms.SWEEP)
    assert {name: entry.peft for name, entry in sweep.adapters.items()} == {
        arm.name: str(arms.Study().runs / arm.name) for arm in arms.ARMS
    }
    cells = {(cell.label, cell.config.budget) for cell in sweep.cells() if cell.model == "vase"}
    assert cells >= {*arms.MAIN, *arms.TRANSFER}
    assert sweep.window == arms.WINDOW
    assert sweep.model == str(arms.MODEL)


def spelling_model():
    """A random model of one token a character, and its tokenizer."""
    letters = sorted(
        {letter for one in ledger.problems("test", 30, ledger.Dial()) for letter in one.prompt + one.response}
    )
    tokenizer = Tokenizer(
        models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token=letters[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, attn_implementation="vkvtrain",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_held_is_what_the_cache_holds_when_a_line_needs_it(arms):
    """StreamingLLM keeps sinks and the newest, so whether a balance is there follows from the event times."""
    model, tokenizer = spelling_model()
    problems = list(ledger.problems("test", 3, ledger.Dial(people=4, events=8)))
    config = EvictionConfig(policy="streaming", budget=64, window=8)
    found = arms.held(model, tokenizer, problems, config)
    shares = {}
    for problem in problems:
        prompt, text = len(problem.prompt), problem.prompt + problem.response
        for need in ledger.needs(problem):
            ends = [event.position + 1 for event in events_of(prompt, len(text), 64, 8) if event.position < need.at - 1]
            oldest = max((end - (64 - config.sinks) for end in ends), default=0)
            digits = range(*need.stated)
            shares.setdefault(need.age, []).append(sum(place >= oldest for place in digits) / len(digits))
    assert {int(age): one["needs"] for age, one in found.items()} == {age: len(of) for age, of in shares.items()}
    for age, of in shares.items():
        assert found[str(age)]["held"] == pytest.approx(sum(of) / len(of))
    assert 0 < found["3"]["held"] < found["1"]["held"]


def test_loss_on_other_text_is_that_of_the_model_and_grows_with_eviction(arms):
    import other_text

    model, _ = spelling_model()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.config.vocab_size, (200,), generator=generator).tolist() for _ in range(2)]
    losses = other_text.losses(model, rows, EvictionConfig(policy="full"))
    for ids, loss in zip(rows, losses, strict=True):
        labels = torch.tensor([[-100] * other_text.PROMPT + ids[other_text.PROMPT :]])
        assert loss == pytest.approx(model(input_ids=torch.tensor([ids]), labels=labels).loss.item(), rel=1e-5)
    assert other_text.losses(model, rows, other_text.EVICTED) != losses


def test_an_adapter_is_shipped_in_bfloat16_with_its_log(arms, monkeypatch, tmp_path):
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    for name in arms.STAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f"{name}\n")
    source = tmp_path / arms.STAGES[-1]
    save_file({"a.lora_A.weight": torch.randn(2, 3)}, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    arms.ship(Path(source.name), Path("shipped"))
    weights = load_file(tmp_path / "shipped/adapter_model.safetensors")
    assert weights["a.lora_A.weight"].dtype == torch.bfloat16
    expected = load_file(source / "adapter_model.safetensors")["a.lora_A.weight"].to(torch.bfloat16)
    assert torch.equal(weights["a.lora_A.weight"], expected)
    assert (tmp_path / "shipped/metrics.jsonl").read_text() == "base\nbase_second\n"


def response(problem, right_lines):
    """A response whose first lines are right, and the rest of which is missing."""
    return "\n".join(problem.response.split("\n")[:right_lines])


def cell(arms, lines_right):
    """A cell in which problem i has `lines_right[i]` right lines, all of them with the answer where it is 7."""
    problems = ledger.problems("test", len(lines_right), arms.DIAL)
    rows = [
        {
            "prompt": one.prompt, "target": one.response, "response": response(one, count), "looping": 0.0,
            "tokens": 10.0 + count, "final_length": 128.0, "peak_kv_bytes": 1000.0,
        }
        for one, count in zip(problems, lines_right, strict=True)
    ]  # fmt: skip
    return {"seconds": 1.0, "finished": "2026-11-25 12:00:00", **arms.graded(rows)}


def write(arms, study, name, full, first, second):
    cells = dict(zip(("full", *(arms.label(*one) for one in arms.MAIN[1:])), (full, first, second), strict=True))
    study.write(name, {"weights": "x", "cells": {label: cell(arms, counts) for label, counts in cells.items()}})


def test_grades_of_a_cell(arms):
    graded = cell(arms, [7, 6, 0, 3])
    assert graded["exact"] == graded["trace"] == "1000"
    assert graded["right"] == graded["follows"] == "111111 111111 000000 111000"
    assert [len(ages) for ages in graded["ages"].split()] == [6] * 4
    assert graded["tokens"] == [17, 16, 10, 13]


def test_tables_say_what_the_records_say(arms, study, findings):
    write(arms, study, "base", [7] * 4, [7, 0, 0, 0], [0, 3, 0, 0])
    write(arms, study, "vase", [7] * 4, [7] * 4, [7, 7, 7, 6])
    write(arms, study, "vase_1", [7] * 4, [7] * 4, [7, 7, 7, 7])
    found = findings.records(study)
    assert [(name, len(runs)) for name, runs in found.items()] == [("base", 1), ("vase", 2)]
    header, _, base, vase = findings.main_table(found).splitlines()
    assert "64 entries (2.0x)" in header
    assert "56 entries (2.3x)" in header
    assert base.startswith("| base, not trained on | - | 100.0 [")
    assert "| 25.0 [" in base
    assert vase.startswith("| `vase_attnv`, sft | 2 | 100.0 [")
    assert "| 87.5 [" in vase
    (*_, difference) = findings.comparisons(found).splitlines()
    assert difference.startswith("| trained under eviction, less the base | +0.0 [")
    assert "| +75.0 [" in difference
    assert "| +87.5 [" in difference
    (*_, base, vase) = findings.detail_table(found).splitlines()
    assert base.split(" | ")[3].startswith("12.5 [")  # 3 of 24 lines
    assert "dense" not in findings.age_table(found)
    missing = findings.still_missing(study, found)
    assert "- `vase_attnv`, sft: 2 of 3 training seeds" in missing
    assert "- dense: 0 of 3 training seeds" in missing
    assert "- transfer of base, not trained on: 4 of 4 cells" in missing


def test_lines_by_age_are_counted_over_all_runs(arms, study, findings):
    write(arms, study, "base", [7] * 3, [7, 6, 2], [0, 0, 0])
    ages = [
        line.age
        for one, count in zip(ledger.problems("test", 3, arms.DIAL), (7, 6, 2), strict=True)
        for place, line in enumerate(ledger.grade(one.prompt, one.response, one.response).lines)
        if place < count
    ]
    (base,) = findings.records(study)["base"]
    found = findings.by_age([base, base], findings.EVICTED[0])
    assert {age: round(lines * share) for age, (lines, share) in found.items() if share} == {
        age: 2 * ages.count(age) for age in sorted(set(ages))
    }


def test_a_record_stands_for_what_is_measured(arms, study):
    assert study.missing("vase", arms.MAIN)
    write(arms, study, "vase", [7], [7], [7])
    assert not study.missing("vase", arms.MAIN)
    assert study.missing("vase", arms.TRANSFER)
    assert json.loads((study.records / "vase.json").read_text())["cells"]["full"]["exact"] == "1"


def test_parts_of_a_page_are_replaced_in_place(findings, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a <!-- x -->\nold\n<!-- end of x --> b\n<!-- y -->\n<!-- end of y -->\n")
    findings.fill(page, {"x": "new \\1", "y": "z"})
    assert page.read_text() == "a <!-- x -->\nnew \\1\n<!-- end of x --> b\n<!-- y -->\nz\n<!-- end of y -->\n"
    with pytest.raises(ValueError, match="the part 'w' is there 0 times"):
        findings.fill(page, {"w": ""})


def test_loss_on_other_text_stands_beside_the_base(arms, study, findings):
    for name, evicted in (("base", [2.0, 3.0, 4.0]), ("vase", [1.5, 2.5, 3.5])):
        write(arms, study, name, [7], [7], [7])
        study.write(name, study.record(name) | {"other_text": {"full": [1.0, 2.0, 3.0], "evicted": evicted}})
    *_, base, vase = findings.text_table(findings.records(study)).splitlines()
    assert base.startswith("| base, not trained on | 2.000 [")
    assert "| +0.000 [" in base
    assert vase.split(" | ")[2:] == ["2.500 [1.500, 3.500]", "-0.500 [-0.500, -0.500] |"]


def test_the_pages_have_their_parts(arms, study, findings, monkeypatch, tmp_path):
    """The whole report from few records, on copies of the pages."""
    write(arms, study, "base", [7] * 4, [7, 0, 0, 0], [0, 3, 0, 0])
    write(arms, study, "vase", [7] * 4, [7] * 4, [7, 7, 7, 6])
    (tmp_path / "docs").mkdir()
    for name in ("docs/evidence.md", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    log = tmp_path / "base"
    log.mkdir()
    (log / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 9, "loss": 0.01}\n')
    for name, value in {"ROOT": tmp_path, "SHIPPED": Path("base"), "DOCS": tmp_path / "docs/evidence.md"}.items():
        monkeypatch.setattr(findings, name, value)
    monkeypatch.setattr(findings, "README", tmp_path / "README.md")
    findings.write(study)
    assert (tmp_path / "docs/evidence.png").stat().st_size > 10_000
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "2 steps of four problems, loss 1.50 to 0.0100" in page
    assert "- dense: 0 of 3 training seeds" in page
    assert "| base, not trained on | - | 100.0" in (tmp_path / "README.md").read_text()
