"""What a chat template reads: arguments that it does not are refused, where they would change nothing."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from vkvtrain.config import nearest

_GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
"""transformers' own tag around what the assistant says, which plain jinja2 does not know."""
_SET_BY_CALLS = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")


def check_text_booleans(arguments: Mapping[str, Any], setting: str) -> None:
    """Raise ValueError for a truth value written as text: templates that ask `is false` read it as true."""
    for name, value in arguments.items():
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            raise ValueError(
                f"{setting}: {name} is the text {value!r}, which a template does not read as a truth value: write "
                f"{value.strip().lower()} without quotes"
            )


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any], setting: str) -> None:
    """Raise ValueError for an argument that the tokenizer's chat template does not read, with the nearest that it does.

    Args:
        tokenizer: with a chat template.
        arguments: of the template, beside the messages.
        setting: what the user calls them.
    """
    if not arguments:
        return
    check_text_booleans(arguments, setting)
    source = _GENERATION.sub("", tokenizer.get_chat_template())
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"the tokenizer's chat template is no valid template: {error}") from None
    read -= {*_SET_BY_CALLS, *tokenizer.special_tokens_map}
    for name in arguments:
        if name not in read:
            known = nearest(name, sorted(read)) if read else " (it reads none)"
            raise ValueError(
                f"{setting}: the chat template does not read {name!r}{known}, so it would change nothing: remove it"
            )
