"""`vkvtrain data preview`: rows as the trainer sees them, lengths, evictions, what is left out."""

import io
import json
import re

import pytest
from chat_templates import chat_tokenizer
from rich.console import Console
from short_runs import short_recipe

from vkvtrain.cli import main
from vkvtrain.config import EvictionConfig
from vkvtrain.events import events_of
from vkvtrain.tiny import task
from vkvtrain.training.data import Row, TrainingData
from vkvtrain.training.data.preview import evictions, lengths_table, never_evicted, pieces, preview, rendered, visible

RECIPE = "recipes/tiny/vase.yaml"


def shown(data, recipe, tokenizer, terminal=False, **options):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, color_system="standard" if terminal else None)
    preview(recipe, data, tokenizer, console, **options)
    return file.getvalue()


def recipe(**sections):
    defaults = {
        "data": {"source": "x"}, "eviction": {"policy": "vase_attnv", "budget": 64, "window": 16},
        "training": {"steps": 20, "global_batch": 4},
    }  # fmt: skip
    return short_recipe("runs/x", defaults, sections)


def printed(capsys, *arguments):
    assert main(["data", "preview", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_command_shows_rows_lengths_and_evictions(capsys):
    out = printed(capsys, RECIPE, "--rows", "40", "--budget", "[64, 160, 256]", "--show", "1")
    problem = task.problem("train", 0, 0)
    assert f"row 0, prompt, 37 tokens, no loss <bos>{problem.prompt} ---" in out
    assert f"row 0, response, 135 tokens, loss {problem.response}<eos>" in out
    assert "row 1," not in out
    assert re.search(r"both │ 172 │ 172 │ 172 │ 172", out)
    assert re.search(r"64 │ 6.0 │ 6 │ 2.69x │ 0%", out)
    assert "NO ROW REACHES BUDGET 256" in out
    assert "REACHES BUDGET 64" not in out
    assert "a step: 16 rows, 0% padding" in out
    assert out.endswith("left out: nothing")


def test_settings_are_overridden_and_checked(capsys):
    assert "packed into 6.0 sequences of at most 600 tokens" in printed(
        capsys, RECIPE, "--rows", "40", "--packing", "true", "--packing_length", "600", "--show", "0"
    )
    assert "usage: vkvtrain data preview" in printed(capsys, "--help")
    for arguments, says in {
        (RECIPE, "--show"): "--show needs a number of rows, got ''",
        (RECIPE, "--rows", "none"): "'rows'",
        (): "exactly one recipe",
        ("nowhere.yaml",): "there is no recipe",
        (RECIPE, "--source", "nowhere.jsonl"): "no file 'nowhere.jsonl'",
    }.items():
        assert main(["data", "preview", *arguments]) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert captured.out == ""


def rows(*lengths):
    return [Row(index, [5] * (prompt + response), prompt) for index, (prompt, response) in enumerate(lengths)]


def test_the_share_of_rows_that_never_reach_the_budget():
    config = EvictionConfig(policy="snapkv", budget=32, window=16)
    data = rows((10, 30), (10, 37), (10, 39), (50, 14), (50, 15), (1, 100))
    expected = [len(events_of(row.prompt_length, row.length - 1, 32, 16)) for row in data]
    assert [evictions(row, config) for row in data] == expected == [0, 0, 1, 0, 1, 4]
    assert never_evicted(data, config) == 0.5


@pytest.mark.parametrize(
    ("data", "says", "loud"),
    [
        (rows((10, 20)), "NO ROW REACHES BUDGET 64", True),
        (rows((10, 20), (10, 20), (10, 200)), "67% OF THE ROWS NEVER REACH BUDGET 64", True),
        (rows((10, 20), *[(10, 200)] * 3), "25% OF THE ROWS NEVER REACH BUDGET 64", False),
        (rows((10, 200)), None, False),
    ],
)
def test_data_that_does_not_fit_the_budget_is_called_out(data, says, loud):
    tokenizer = chat_tokenizer(None)
    out = shown(TrainingData(data, [], []), recipe(), tokenizer, terminal=True, shown=0)
    assert ("\x1b[1;31m" in out) is loud  # bold red
    assert (says in out) if says else "BUDGET" not in out
    assert ("lower the budget" in out) is loud
    dense = shown(TrainingData(data, [], []), recipe(eviction=None), tokenizer, shown=0)
    assert "evictions" not in dense


def test_the_loss_mask_is_seen_in_colour_and_without():
    tokenizer = chat_tokenizer("qwen3")
    ids = tokenizer("abé<think>")["input_ids"]
    row = Row(3, [*ids, *ids], len(ids))
    plain = rendered(row, tokenizer, colours=False)
    assert plain.plain.splitlines() == [
        "--- row 3, prompt, 5 tokens, no loss", "abé<think>", "--- row 3, response, 5 tokens, loss", "abé<think>",
    ]  # fmt: skip
    coloured = rendered(row, tokenizer, colours=True)
    assert coloured.plain == plain.plain
    styles = [(coloured.plain[span.start : span.end], span.style) for span in coloured.spans]
    assert [one for one in styles if one[1] == "dim"] == [(text, "dim") for text in ("a", "b", "é", "<think>")]
    response = [one for one in styles if one[1] in ("green", "bold cyan")]
    assert response == [("a", "green"), ("b", "bold cyan"), ("é", "green"), ("<think>", "bold cyan")]


def test_pieces_join_the_bytes_of_a_character():
    tokenizer = chat_tokenizer(None)
    ids = tokenizer("aé漢")["input_ids"]
    assert len(ids) == 6
    assert list(pieces(ids, tokenizer)) == ["a", "é", "漢"]
    assert "".join(pieces(ids[:-1], tokenizer)).startswith("aé")  # a character that is cut off is shown somehow


def test_data_cannot_steer_the_terminal():
    assert visible("a\x1b[2Jb\rc\td\n漢") == "a\\x1b[2Jb\\rc\\td\n漢"
    tokenizer = chat_tokenizer(None)
    ids = tokenizer("[red]\x1b[2J")["input_ids"]
    out = shown(TrainingData([Row(0, [*ids, *ids], len(ids))], [], []), recipe(), tokenizer)
    assert out.count("[red]\\x1b[2J") == 2


def test_long_rows_are_shown_by_their_ends():
    tokenizer = chat_tokenizer(None)
    prompt, response = tokenizer("a" * 300)["input_ids"], tokenizer("b" * 170 + "c" * 170)["input_ids"]
    text = rendered(Row(0, [*prompt, *response], 300), tokenizer, colours=False).plain
    assert re.search(r"\na{160}\n\.\.\. 60 tokens \.\.\.\na{80}\n", text)
    assert re.search(r"\nb{160}\n\.\.\. 100 tokens \.\.\.\nc{80}\n", text)


def test_lengths():
    table = lengths_table(rows(*((1, n) for n in range(11))))
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["prompt", "response", "both"],
        ["1", "0", "1"],
        ["1", "5", "6"],
        ["1", "9", "10"],
        ["1", "10", "11"],
    ]


def test_what_is_left_out_is_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a1?", "completion": "1" * n}) + "\n" for n in (1, 30, 2, 3, 50, 4)))
    out = printed(capsys, RECIPE, "--source", str(path), "--rows", "null", "--held_out", "0", "--max_length", "20")
    assert out.endswith("left out: 2 rows above data.max_length (20): row 4 (55 tokens), row 1 (35 tokens)")
    data = TrainingData(rows((1, 2)), [], [], unusable=7)
    assert "7 problems without a correct generation" in shown(data, recipe(), chat_tokenizer(None), shown=0)
