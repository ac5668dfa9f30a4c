"""What a sweep's summary says, on stores with known numbers, and that nothing from data gets into the report raw."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from sweeps import rows, settings

from vkvtrain import cli
from vkvtrain.ablation.report import fenced, markdown_text, write_report
from vkvtrain.ablation.store import Store
from vkvtrain.ablation.summary import BAR, FULL_CACHE, UNTRAINED, WITH_BAR, WITH_DENSE, WITH_FULL, Key, summarise

EVIL = "<script>alert('x')</script>"
VERSIONS = {"vkvtrain": "0.1.0", "torch": "2.13"}


def make(tmp_path, cells, adapters=("ours", "dense"), missing=(), **sweep):
    """A store whose cells are (settings, grades, measured), and whose plan has the missing ones too."""
    store, planned = Store(tmp_path), []
    for number, (changes, grades, measured) in enumerate(cells):
        given = settings(f"c{number}", **changes)
        about = {
            "machine": "a machine", "seconds": 60.0, "finished": "2026-11-24 12:00:00", "versions": VERSIONS,
            "name": "a cell", "command": ["python", EVIL],
        }  # fmt: skip
        store.write(rows(grades, **measured), given, about)
        planned.append({"name": f"name {number}", **given})
    planned += [{"name": f"missing {n}", **settings(f"m{n}", **changes)} for n, changes in enumerate(missing)]
    models = sorted({cell["model"] for cell in planned})
    store.write_plan(
        {
            "sweep": {"model": "tiny", "adapters": {name: {} for name in adapters}, "controls": True,
                      "output": "runs/x", **sweep},
            "versions": VERSIONS, "misses_dense_control": "dense" not in adapters,
            "models": {m: {"given": m, "revision": None, "peft": None, "fingerprint": "f"} for m in models},
            "tasks": {"t": {"metric": "exact_match", "sampled": False, "settings": {"until": [EVIL]}}},
            "cells": planned,
        }
    )  # fmt: skip
    return store


FULL = {"policy": "full", "budget": None, "seed": None}


def cell(model, grades, policy="vase_attnv", **changes):
    return {"model": model, "policy": policy, "control": model != "ours", **changes}, grades, {}


def whole(tmp_path, **changes):
    """The untrained, the dense-trained and our model under one policy and two seeds, and the full cache."""
    right, wrong = [1] * 10, [0] * 10
    cells = [
        ({**FULL, "model": "base"}, [*right, *right], {"peak_kv_bytes": 1280.0, "evictions": 0.0}),
        ({**FULL, "model": "ours"}, [*right, *right], {"peak_kv_bytes": 1280.0, "evictions": 0.0}),
        cell("base", [*right, *wrong], seed=0), cell("base", [*wrong, *wrong], seed=1),
        cell("dense", [*right, *wrong], seed=0), cell("dense", [*right, *wrong], seed=1),
        cell("ours", [*right, *right], seed=0), cell("ours", [*right, *wrong], seed=1),
        cell("base", [*wrong, *right], policy=BAR, seed=0), cell("base", [*wrong, *right], policy=BAR, seed=1),
    ]  # fmt: skip
    return make(tmp_path, cells, **changes)


def test_estimates_comparisons_and_gaps(tmp_path):
    found = summarise(whole(tmp_path))
    ours, dense, base = (Key("t", model, "vase_attnv", 64) for model in ("ours", "dense", "base"))
    setting = found.setting(ours)
    assert setting is not None
    assert setting.grade is not None
    assert setting.grade["value"] == 0.75
    assert (setting.problems, setting.repeats, setting.cells, setting.finished) == (20, 2, 2, 2)
    assert setting.gap is not None  # base is right half of the time on the first ten problems: 0.25
    assert setting.gap["value"] == pytest.approx((0.75 - 0.25) / (1 - 0.25))
    assert setting.gap["low"] < setting.gap["value"] < setting.gap["high"]
    assert setting.peak_ratio == 2
    assert setting.compression == 160 / 64
    assert not setting.never_evicted
    kinds = {(one.ours, one.kind): one for one in found.comparisons}
    assert set(kinds) == {
        (ours, UNTRAINED), (ours, WITH_DENSE), (ours, WITH_BAR), (dense, UNTRAINED),
        (Key("t", "ours", "full", None), FULL_CACHE),
    }  # fmt: skip
    assert kinds[ours, UNTRAINED].difference["value"] == pytest.approx(0.5)
    assert kinds[ours, UNTRAINED].problems == 20
    assert kinds[ours, UNTRAINED].repeats == 2
    assert kinds[ours, WITH_DENSE].difference["value"] == pytest.approx(0.25)
    assert kinds[ours, WITH_BAR].difference["value"] == pytest.approx(0.25)
    smallest = min(found.comparisons, key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(min(1, 5 * smallest.p))
    assert found.compared(base, UNTRAINED) is None
    assert not found.missing


def test_pairs_are_the_same_problems_and_seeds(tmp_path):
    """Ours has problems 0 to 3, seeds 0 and 1; the other problems 0 to 5, seeds 1 and 2; the full cache any seed."""
    store = make(tmp_path, [
        cell("ours", [1, 1, 1, 1], seed=0), cell("ours", [1, 0, 1, 1], seed=1),
        cell("base", [0, 0, 0, 0, 1, 1], seed=1), cell("base", [1, 1, 1, 1, 1, 1], seed=2),
        ({**FULL, "model": "base"}, [1, 1, 1, 1, 0, 0], {}),
    ])  # fmt: skip
    found = summarise(store)
    (one,) = found.comparisons
    assert one.difference["value"] == pytest.approx(0.75)  # seed 1 alone: 3 of 4 against none
    assert (one.problems, one.repeats) == (4, 1)
    setting = found.setting(Key("t", "ours", "vase_attnv", 64))
    assert setting is not None
    assert setting.gap is not None
    assert setting.gap["value"] == pytest.approx(0.75)


def test_holes_are_said_and_a_budget_that_was_never_reached_too(tmp_path):
    cells = [cell("base", [1, 0], seed=0), ({"policy": "snapkv", "seed": None}, [1, 0], {"evictions": 0.0})]
    missing = [{"policy": "vase_attnv", "seed": 1}, {"policy": "tova", "seed": None}]
    store = make(tmp_path, cells, adapters=(), missing=missing)
    (store.work / "m1").mkdir(parents=True)
    failure = {"name": "missing 1", "reason": "exit status 1", "attempts": 2, "log": "log.txt", "last_lines": []}
    (store.work / "m1" / "failure.json").write_text(json.dumps(failure))
    found = summarise(store)
    assert [(status.name, status.state) for status in found.missing] == [
        ("missing 0", "not run"), ("missing 1", "failed after 2 attempts: exit status 1"),
    ]  # fmt: skip
    partly = found.setting(Key("t", "base", "vase_attnv", 64))
    hole = found.setting(Key("t", "base", "tova", 64))
    never = found.setting(Key("t", "base", "snapkv", 64))
    assert partly is not None
    assert hole is not None
    assert never is not None
    assert (partly.finished, partly.cells) == (1, 2)
    assert (hole.grade, hole.finished) == (None, 0)
    assert never.never_evicted
    write_report(store, tmp_path / "report")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "2 of 4 cells are missing" in text
        assert "failed after 2 attempts: exit status 1" in text
        assert "1 of 2 cells missing" in text
        assert "Nothing was ever evicted" in text


def test_without_adapters_policies_are_compared_with_the_full_cache_and_the_bar(tmp_path):
    cells = [
        ({**FULL, "model": "base"}, [1, 1, 1], {}), cell("base", [1, 0, 0], control=False),
        cell("base", [1, 1, 0], policy=BAR),
    ]  # fmt: skip
    found = summarise(make(tmp_path, cells, adapters=()))
    assert {(one.ours.policy, one.kind) for one in found.comparisons} == {
        ("vase_attnv", WITH_FULL), ("vase_attnv", WITH_BAR), (BAR, WITH_FULL),
    }  # fmt: skip


def test_an_undefined_gap_is_said_to_be_one(tmp_path):
    cells = [({**FULL, "model": "base"}, [1, 0, 1], {}), cell("base", [1, 0, 1]), cell("ours", [1, 1, 1])]
    store = make(tmp_path, cells, adapters=("ours",))
    setting = summarise(store).setting(Key("t", "ours", "vase_attnv", 64))
    assert setting is not None
    assert setting.gap is None
    assert setting.gap_undefined
    write_report(store, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "| undefined |" in text
    assert "No adapter is called 'dense'" in text


class Page(HTMLParser):
    """The tags of a page, its attributes, and its text outside of the style sheet."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.style = set(), [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.style = tag == "style"

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        self.text += "" if self.style else data


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A report of data that would break out wherever it is not escaped."""
    tmp_path = tmp_path_factory.mktemp("evil")
    model = f"{EVIL}$a_b$"
    said = {"prompt": f"{EVIL} &amp; ```", "target": EVIL, "response": f"{EVIL}\n```\n# heading ````"}
    cells = [
        ({**FULL, "model": "base"}, [1] * 8, said),
        ({"model": "base", "policy": "a|b"}, [0] * 7 + [1], said),
        ({"model": model, "policy": "a|b", "control": False}, [1] * 7 + [0], said),
    ]  # fmt: skip
    store = make(tmp_path, cells, adapters=(model,), output=f"runs/{EVIL}")
    write_report(store, tmp_path / "report")
    page = Page()
    page.feed((tmp_path / "report/report.html").read_text())
    return tmp_path / "report", page, model


def test_text_from_data_is_escaped_on_the_page(evil):
    _, page, model = evil
    assert "script" not in page.tags
    assert model in page.text
    assert f"{EVIL}\n```\n# heading ````" in page.text
    assert page.text.count(EVIL) > 10
    known = """html head meta title style body header h1 h2 h3 h4 h5 p section ul li span div figure figcaption table
        thead tbody tr th td small pre details summary code svg defs g path text use rect clippath"""
    assert page.tags <= set(known.split())


def test_the_page_loads_nothing(evil):
    directory, page, _ = evil
    assert not [(name, value) for name, value in page.attributes if name in ("src", "srcset", "data", "action")]
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = (directory / "report.html").read_text()
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_figures_are_sound_and_tell_their_identifiers_apart(evil):
    directory, *_ = evil
    text = (directory / "report.html").read_text()
    drawings = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) >= 4
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', drawing)) for drawing in drawings]
    assert all(not one & other for place, one in enumerate(clips) for other in clips[:place])
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "#010203" not in drawing
        assert "var(--ink)" in drawing
    for path in (directory / "figures").glob("*.svg"):
        assert "var(" not in path.read_text()
        ElementTree.parse(path)


def test_text_from_data_is_escaped_in_markdown(evil):
    directory, *_ = evil
    lines = (directory / "report.md").read_text().splitlines()
    fence, outside, inside = None, [], []
    for line in lines:
        run = re.match(r"`{3,}", line)
        if fence is None and run:
            fence = run.group()
        elif fence is not None and line == fence:
            fence = None
        else:
            (outside if fence is None else inside).append(line)
    assert fence is None
    assert "<script" not in "\n".join(outside)
    assert "# heading ````" in inside
    tables = [line for line in outside if line.startswith("|")]
    assert tables
    for line, after in pairwise(tables):
        if set(after) <= set("|- "):  # a header and its rule: equal columns; so have all rows below
            columns = len(re.findall(r"(?<!\\)\|", line))
            assert len(re.findall(r"(?<!\\)\|", after)) == columns


def test_markdown_pieces():
    assert markdown_text("a|b_c*<i>\nd `x` [y]") == r"a\|b\_c\*&lt;i&gt; d \`x\` \[y\]"
    assert fenced("one ``` two").startswith("````text\n")


def test_switched_off_controls_are_loud(tmp_path):
    store = make(tmp_path, [cell("ours", [1, 0])], controls=False)
    write_report(store, tmp_path / "report")
    assert "Controls were switched off" in (tmp_path / "report/report.html").read_text()


def test_nothing_finished_is_no_report(tmp_path, capsys):
    make(tmp_path, [], missing=[{}])
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no cell of" in capsys.readouterr().err


def test_headlines_say_what_stands_beside(tmp_path):
    whole(tmp_path)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "else")]) == 0
    text = (tmp_path / "else/report.html").read_text()
    assert "ours under vase_attnv at budget 64: 75.0% [" in text
    assert "for the untrained model" in text
    assert "for the dense-trained control" in text
    assert "It closes 66.7% [" in text
    assert re.search(r"Here, 20 problems x \d repeats? resolve differences above \d+\.\d points", text)
