"""The day that a chat template writes: fixed without a change to anything else, remembered by runs and journals."""

import json
import logging
import warnings
from datetime import date

import pytest
import yaml
from chat_templates import chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from short_runs import EVICTED, short_recipe

from vkvtrain.clock import day_of, depends_on_date, fix_date, fix_day, fixed_date, reads_clock
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.traces.command import TraceArguments
from vkvtrain.traces.command import run as generate_traces
from vkvtrain.training import loop
from vkvtrain.training.data import load_data
from vkvtrain.training.loop import train
from vkvtrain.training.resume import with_date
from vkvtrain.training.settings import DataSettings

ASKED = [{"role": "user", "content": "1+1?"}]
DAY = date(2026, 1, 5)
DATED = "{{- '<|system|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' -}}"


def tokenizer_with(beginning):
    tokenizer = chat_tokenizer("phi4")
    tokenizer.chat_template = beginning + tokenizer.chat_template
    return tokenizer


def rendered(tokenizer, **arguments):
    return tokenizer.apply_chat_template(ASKED, tokenize=False, **arguments)


@pytest.mark.parametrize("beginning", ["", "\n", "  ", "\n\n x\n", "  {% if true %}a{% endif %}\n", "{#- c -#}  \n "])
def test_nothing_but_the_day_changes(beginning):
    tokenizer = tokenizer_with(beginning)
    before, template = rendered(tokenizer), tokenizer.chat_template
    with fixed_date(tokenizer, DAY):
        assert tokenizer.chat_template != template
        assert rendered(tokenizer) == before
    assert tokenizer.chat_template == template
    with fixed_date(tokenizer, None):
        assert tokenizer.chat_template == template


@given(st.dates(date(1990, 1, 1), date(2100, 1, 1)), st.lists(st.sampled_from([*"aAbBdHIjmMpSyYU", "-d"]), min_size=1))
def test_every_day_is_written_as_strftime_does(day, directives):
    form = " of ".join("%" + one for one in directives)
    tokenizer = tokenizer_with("{{ strftime_now('" + form + "') + '|' }}")
    with fixed_date(tokenizer, day):
        assert rendered(tokenizer).split("|")[0] == day.strftime(form)


def test_several_templates_are_fixed_alike():
    tokenizer = chat_tokenizer("phi4")
    tokenizer.chat_template = {"default": DATED + tokenizer.chat_template, "tool_use": DATED}
    with fixed_date(tokenizer, DAY):
        assert "2026-01-05" in rendered(tokenizer)
        assert rendered(tokenizer, chat_template="tool_use") == "<|system|>Today: 2026-01-05<|end|>"


def test_a_template_that_is_told_the_day_does_not_depend_on_the_clock():
    """Llama 3's `date_string`."""
    told = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    tokenizer = tokenizer_with(told + "{{ date_string }}")
    assert reads_clock(tokenizer)
    assert depends_on_date(tokenizer, lambda: rendered(tokenizer))
    assert not depends_on_date(tokenizer, lambda: rendered(tokenizer, date_string="26 Jul 2024"))
    assert not reads_clock(chat_tokenizer("phi4"))


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "2" * n}]} for n in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_do_not_change_from_day_to_day(conversations):
    """With data.date; without it a warning names that."""
    tokenizer = tokenizer_with(DATED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(DataSettings(source=str(conversations), held_out=0, date=DAY), tokenizer)
    assert "2026-01-05" in tokenizer.decode(data.train[0].input_ids)
    with pytest.warns(UserWarning, match=r"reads the clock and writes today's date.*set data.date"):
        load_data(DataSettings(source=str(conversations), held_out=0), tokenizer)


def on(monkeypatch, day):
    class Calendar(date):
        @classmethod
        def today(cls):
            return day

    monkeypatch.setattr("vkvtrain.training.resume.date", Calendar)


def test_a_run_keeps_the_day_that_it_began_on(conversations, tmp_path, monkeypatch, capsys):
    """A checkpoint of yesterday is continued on yesterday's rows; a new run, and --overwrite, take today."""
    settings = short_recipe(
        tmp_path / "run", {"data": {"source": str(conversations)}, "eviction": EVICTED, "lora": {"r": 2, "alpha": 4}},
        {"training": {"steps": 2, "global_batch": 2, "batch_per_device": 2}, "checkpoint": {"every": 1}},
    )  # fmt: skip
    tokenizer = chat_tokenizer("phi4")
    tiny = loop.load_tokenizer(settings)
    tiny.chat_template = "{{ 'd' + strftime_now('%d') + 'm' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(loop, "load_tokenizer", lambda recipe: tiny)
    seen, inner = [], loop.fitting_data

    def noted(*args, **kwargs):
        data = inner(*args, **kwargs)
        seen.append(tiny.decode(data.train[0].input_ids)[:8])
        return data

    monkeypatch.setattr(loop, "fitting_data", noted)
    on(monkeypatch, date(2026, 11, 24))
    train(settings)
    assert yaml.safe_load((settings.output / "recipe.yaml").read_text())["data"]["date"] == "2026-11-24"
    assert "date             2026-11-24" in capsys.readouterr().out
    (settings.output / "adapter_model.safetensors").unlink()
    on(monkeypatch, date(2026, 11, 25))
    train(settings)
    assert "continues after step 1" in capsys.readouterr().out
    train(settings, overwrite=True)
    assert [text.partition("d")[2][:2] for text in seen] == ["24", "24", "25"]
    assert tiny.chat_template.startswith("{{ 'd'")
    assert with_date(settings, tiny, overwrite=True).data.date == date(2026, 11, 25)
    fixed = settings.model_copy(update={"data": settings.data.model_copy(update={"date": DAY})})
    assert with_date(fixed, tiny, overwrite=False).data.date == DAY
    with pytest.raises(ValueError, match=r"data.date fixes the day that a chat template writes, and this one writes"):
        with_date(fixed, tokenizer, overwrite=False)


def test_what_has_a_journal_keeps_the_day_that_it_began_on(tmp_path, caplog):
    first, later, path = tokenizer_with(DATED), tokenizer_with(DATED), tmp_path / "journal/date"
    assert fix_day(first, DAY, path, "date") == DAY
    assert fix_day(later, None, path, "date") == DAY
    assert rendered(first) == rendered(later)
    assert "2026-01-05" in rendered(later)
    with pytest.raises(ValueError, match=r"date \(2026-01-06\) is not the day .* journal was begun on \(2026-01-05\)"):
        fix_day(tokenizer_with(DATED), date(2026, 1, 6), path, "date")
    with caplog.at_level(logging.WARNING):
        assert fix_day(tokenizer_with(DATED), None, None, "--date") == date.today()
    assert f"set --date to {date.today()}" in caplog.text
    with pytest.raises(ValueError, match=r"date \(2026-01-05\) fixes .* and this one writes none"):
        fix_day(chat_tokenizer("phi4"), DAY, None, "date")
    assert fix_day(chat_tokenizer("phi4"), None, tmp_path / "other/date", "date") is None
    assert not (tmp_path / "other").exists()


def test_a_day_in_settings():
    assert day_of("2026-01-05", "date") == DAY
    assert day_of(None, "date") is None
    with pytest.raises(ValueError, match="--date 'tomorrow' is no date: write it as"):
        day_of("tomorrow", "--date")


def test_the_day_of_an_evaluation_and_of_generated_traces(tmp_path):
    """Refused where the embedded model's tokenizer has no template that would write it, before a model is loaded."""
    with pytest.raises(ValueError, match="date 'x' is no date"):
        EvictionLM("tiny", date="x")
    with pytest.raises(ValueError, match="--date 'x' is no date"):
        generate_traces(TraceArguments(model="tiny", source="x.jsonl", output=tmp_path / "x.jsonl", date="x"))


def test_a_fixed_template_is_fixed_for_good():
    tokenizer = tokenizer_with(DATED)
    fix_date(tokenizer, DAY)
    assert not depends_on_date(tokenizer, lambda: rendered(tokenizer))
