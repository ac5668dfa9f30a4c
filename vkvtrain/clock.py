"""The day that a chat template writes into its prompts: fixed, so that prompts do not change from one day to the next.

Templates of Llama 3, gpt-oss, Granite and others write today's date by `strftime_now`, a function that transformers
gives to every template and that no argument replaces. A template may define a macro of that name itself, which then
goes before: so a fixed day is a line in front of the template, and nothing of transformers is touched.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdDeFfGHIjmMpSTuUVwWxXyYzZ")
"""Of `strftime`, those without padding first."""
_FAR_APART = (date(2001, 1, 1), date(2032, 10, 30))


def reads_clock(tokenizer: Any) -> bool:
    """Whether a chat template of the tokenizer knows the function that tells the time."""
    return any("strftime_now" in template for template in _templates(tokenizer).values())


def depends_on_date(tokenizer: Any, render: Callable[[], str]) -> bool:
    """Whether what `render` makes with the tokenizer's chat template is another text on another day."""
    if not reads_clock(tokenizer):
        return False
    texts = []
    for day in _FAR_APART:
        with fixed_date(tokenizer, day):
            texts.append(render())
    return texts[0] != texts[1]


def warn_of_clock(tokenizer: Any, render: Callable[[], str], setting: str) -> None:
    """Warn where prompts change from day to day.

    Args:
        tokenizer: with a chat template.
        render: makes a prompt with it.
        setting: what fixes the day.
    """
    if depends_on_date(tokenizer, render):
        warnings.warn(
            f"the chat template reads the clock and writes today's date, so prompts change from day to day: set "
            f"{setting} to a date such as {date.today().isoformat()}",
            stacklevel=2,
        )


@contextmanager
def fixed_date(tokenizer: Any, day: date | None) -> Iterator[None]:
    """Inside, the tokenizer's chat templates take it to be the midnight that `day` began with; None changes nothing."""
    before = tokenizer.chat_template
    if day is not None and before:
        fix_date(tokenizer, day)
    try:
        yield
    finally:
        tokenizer.chat_template = before


def fix_date(tokenizer: Any, day: date) -> None:
    """Make the tokenizer's chat templates take it to be the midnight that `day` began with."""
    before = tokenizer.chat_template
    templates = {name: _first_line(day) + template for name, template in _templates(tokenizer).items()}
    tokenizer.chat_template = templates if isinstance(before, dict) else templates[""]


def day_of(text: str | None, setting: str) -> date | None:
    """A day as it is written in settings, `2026-11-24`; raises ValueError for what is none."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{setting} {text!r} is no date: write it as 2026-11-24") from None


def fix_day(tokenizer: Any, given: date | None, remembered: Path | None, setting: str) -> date | None:
    """Fix the day that a chat template writes: the one given, the one remembered, or today; None where it writes none.

    Args:
        tokenizer: whose templates are changed.
        given: the day that was asked for.
        remembered: file beside a journal that keeps the day on which it was begun, so that the same command goes on
            the day after; written here. None where nothing is kept.
        setting: what the user calls `given`.

    Raises:
        ValueError: a day for a template that writes none, or another one than the journal's.
    """
    prompt = [{"role": "user", "content": "?"}]
    if not depends_on_date(tokenizer, lambda: tokenizer.apply_chat_template(prompt, tokenize=False)):
        if given is not None:
            raise ValueError(f"{setting} ({given}) fixes the day that a chat template writes, and this one writes none")
        return None
    began = day_of(remembered.read_text().strip(), str(remembered)) if remembered and remembered.is_file() else None
    if given is not None and began not in (None, given):
        raise ValueError(f"{setting} ({given}) is not the day that the journal was begun on ({began}): leave it out")
    day = given or began or date.today()
    if remembered is not None:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(f"{day}\n")
    elif given is None:
        logger.warning("the chat template writes today's date: set %s to %s to have the same another day", setting, day)
    fix_date(tokenizer, day)
    return day


def _templates(tokenizer: Any) -> dict[str, str]:
    """Chat templates by name; the only one is nameless."""
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {"": template} if template else {}


def _first_line(day: date) -> str:
    """A definition of `strftime_now`; transformers' templates drop the line end behind it, and with it the line."""
    midnight = datetime.combine(day, time())
    replaced = "".join(f" | replace({'%' + one!r}, {midnight.strftime('%' + one)!r})" for one in _DIRECTIVES)
    return "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro %}\n"
