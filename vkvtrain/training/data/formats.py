"""The shapes in which reasoning data is published, and what each says: a prompt and a response.

| format | columns | published as |
|---|---|---|
| `prompt_completion` | `prompt`, `completion`: text, or lists of messages | TRL |
| `messages` | `messages`: `[{"role", "content"}, ...]` | chat data everywhere |
| `conversations` | `conversations`: `[{"from", "value"}, ...]`, perhaps `system` | OpenThoughts, ShareGPT |
| `problem_generations` | `problem`, `generations`, `correctness_math_verify` | OpenR1-Math |

Knows nothing of tokenizers: what a chat template makes of an example is not decided here.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from vkvtrain.config import nearest
from vkvtrain.training.data.rows import Example, Message, Record
from vkvtrain.training.settings import DataFormat, DataSettings

COLUMNS: dict[str, tuple[str, ...]] = {
    "problem_generations": ("problem", "generations"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
"""What each format is told by, the most particular first: OpenR1-Math has `messages` as well."""
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "developer", "user", "assistant", "tool")}
_SYSTEM = ("system", "developer")
_TOOLS, _CALLS = ("tools", "functions"), ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_BEGIN_OF_THOUGHT = re.compile(
    r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*",
    re.DOTALL,
)
"""OpenThoughts-114k's own marks, which no model generates by itself."""


def detect(record: Record) -> str:
    """The format of a source by the columns of its first row.

    Raises:
        ValueError: columns that no format has.
    """
    for name, columns in COLUMNS.items():
        if all(column in record.values for column in columns):
            return name
    close = [  # half a format, or a misspelt one, is told by what it lacks
        f"no {lacks!r}{nearest(lacks, list(record.values))}"
        for columns in COLUMNS.values()
        for lacks in columns
        if len(columns) > 1 and sum(column in record.values for column in columns) == len(columns) - 1
        if lacks not in record.values
    ]
    known = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
    found = close[0] if close else f"columns of no known format: {', '.join(record.values) or 'none'}"
    raise ValueError(f"{record.where} has {found} (formats: {known})")


def examples_of(record: Record, form: str, settings: DataSettings) -> Iterator[Example]:
    """The examples of a record: several for `all_correct` or `turns: each`, none without a correct generation.

    Raises:
        ValueError: a malformed record, with its row number.
    """
    assert form in get_args(DataFormat)
    _check_tools(record)
    if form == "problem_generations":
        parts = (_text(record, "problem"), settings.instruction)
        problem = "\n\n".join(part for part in parts if part)
        for generation in _chosen(record, settings):
            if not isinstance(generation, str) or not generation:
                raise ValueError(f"{record.where}: 'generations' holds something that is empty or no text")
            asked = _with_system(record, ({"role": "user", "content": problem},), settings)
            yield Example(asked, generation, record.where)
    elif form == "prompt_completion":
        yield _prompt_completion(record, settings)
    else:
        yield from _conversation(record, form, settings)


def _column(record: Record, key: str) -> Any:
    if key not in record.values:
        raise ValueError(f"{record.where} has no {key!r}{nearest(key, list(record.values)) if record.values else ''}")
    return record.values[key]


def _text(record: Record, key: str) -> str:
    value = _column(record, key)
    if not isinstance(value, str):
        raise ValueError(f"{record.where}: {key!r} must be text, got {type(value).__name__}")
    return value


def _chosen(record: Record, settings: DataSettings) -> list[Any]:
    """The generations that `data.choose` takes."""
    generations = _column(record, "generations")
    if not isinstance(generations, list):
        raise ValueError(f"{record.where}: 'generations' must be a list of texts, got {type(generations).__name__}")
    if settings.choose == "first":
        return generations[:1]
    verdicts = _verdicts(record, "correctness_math_verify", len(generations))
    complete = [True] * len(generations)
    if record.values.get("is_reasoning_complete") is not None:
        complete = _verdicts(record, "is_reasoning_complete", len(generations))
    correct = [one for one, *good in zip(generations, verdicts, complete, strict=True) if all(good)]
    if settings.choose == "random_correct" and correct:
        return [random.Random(f"{settings.seed}/choose/{record.number}").choice(correct)]
    return correct if settings.choose == "all_correct" else correct[:1]


def _verdicts(record: Record, column: str, count: int) -> list[bool]:
    """A verdict for each generation; null is none, so the generation is not known to be right."""
    verdicts = record.values.get(column)
    if not isinstance(verdicts, list) or len(verdicts) != count:
        raise ValueError(
            f"{record.where}: {column!r} must have a verdict for each generation; without verdicts set data.choose to "
            "'first'"
        )
    for verdict in verdicts:
        if verdict is not None and verdict not in (True, False):
            raise ValueError(
                f"{record.where}: {column!r} must hold true and false, got {verdict!r} ({type(verdict).__name__}): "
                "convert the column, or set data.choose to 'first'"
            )
    return [bool(verdict) for verdict in verdicts]


def _prompt_completion(record: Record, settings: DataSettings) -> Example:
    """Texts are taken as they are; a list of messages is a conversation, and its completion one message."""
    prompt, completion = _column(record, "prompt"), _column(record, "completion")
    if not isinstance(prompt, list):
        prompt = _text(record, "prompt")
    reasoning = None
    if isinstance(completion, list):
        if len(completion) != 1:
            raise ValueError(f"{record.where}: 'completion' must be one message, got {len(completion)}")
        (message,) = _messages(record, completion, "completion")
        if message["role"] != "assistant":
            raise ValueError(f"{record.where}: 'completion' must be an assistant's message, got {message['role']!r}")
        completion, reasoning = _said(record, message), _reasoning(message)
    else:
        completion = _text(record, "completion")
    if not completion:
        raise ValueError(f"{record.where}: 'completion' is empty, so there is nothing to train on")
    if isinstance(prompt, str):
        if settings.system is None and _system_column(record) is not None:
            raise ValueError(
                f"{record.where}: the prompt is text, so the 'system' column would be dropped: write it into the "
                "prompt, or set data.system to '' to leave it out"
            )
        if reasoning is not None:
            raise ValueError(
                f"{record.where}: a prompt that is text leaves no template to write the reasoning: write it out"
            )
        return Example(prompt, completion, record.where)
    messages = _with_system(record, _messages(record, prompt, "prompt"), settings)
    return Example(messages, completion, record.where, reasoning)


def _conversation(record: Record, form: str, settings: DataSettings) -> Iterator[Example]:
    turns = _column(record, form)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{record.where}: {form!r} must be a list of turns, got {type(turns).__name__}")
    marked = False
    if form == "conversations":
        turns = [
            {"role": turn.get("from"), "content": turn.get("value")} if isinstance(turn, dict) else turn
            for turn in turns
        ]
    messages = _messages(record, turns, form)
    for message in messages:
        found = _BEGIN_OF_THOUGHT.fullmatch(message["content"])
        if found and message["role"] == "assistant":
            message["content"] = f"<think>\n{found[1].strip()}\n</think>\n\n{found[2].strip()}"
            marked = True
    if marked:  # OpenThoughts' own system column asks for the marks that were replaced
        record = replace(record, values={**record.values, "system": None})
    messages = _with_system(record, messages, settings)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{record.where}: the last turn must be the assistant's, got {messages[-1]['role']!r}")
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for place in places if settings.turns == "each" else places[-1:]:
        message = messages[place]
        if not message["content"]:
            raise ValueError(f"{record.where}: the assistant's turn is empty, so there is nothing to train on")
        if not place:
            raise ValueError(f"{record.where}: the assistant speaks first, so there is no prompt")
        yield Example(messages[:place], _said(record, message), record.where, _reasoning(message))


def _messages(record: Record, turns: list[Any], column: str) -> tuple[Message, ...]:
    """Checked messages with the field's role names; what is null is left away, as Parquet fills structs up with it."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"{record.where}: {column!r} must hold messages, got {type(turn).__name__}")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise ValueError(
                f"{record.where}: {column!r} has a turn of unknown role {role!r} (known: {', '.join(ROLES)})"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"{record.where}: {column!r} has a turn whose content is no text ({type(content).__name__})"
            )
        messages.append({key: value for key, value in turn.items() if value is not None} | {"role": ROLES[role]})
    if not messages:
        raise ValueError(f"{record.where}: {column!r} is empty: give at least one message")
    return tuple(messages)


def _reasoning(message: Message) -> str | None:
    return next((message[key] for key in _REASONING if message.get(key)), None)


def _check_tools(record: Record) -> None:
    """Raise ValueError for a column of tools, which no prompt would show."""
    for column in _TOOLS:
        value = record.values.get(column)
        if value and value not in ("[]", "{}", "null"):
            raise ValueError(
                f"{record.where}: the {column!r} column would be dropped, and calls of tools trained that no prompt "
                "offers: write them into a system message and remove the column, or leave such rows out"
            )


def _said(record: Record, message: Message) -> str:
    """What the assistant says in a turn that is trained on; raises ValueError where that is not all that it does."""
    call = next((key for key in _CALLS if message.get(key)), None)
    if call is not None:
        raise ValueError(
            f"{record.where}: the trained turn has {call!r}, which would be dropped: write the call into its content, "
            "or leave such rows out"
        )
    return message["content"]


def _system_column(record: Record) -> str | None:
    """The text of a `system` column, None without one."""
    value = record.values.get("system")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{record.where}: 'system' must be text, got {type(value).__name__}")
    return value or None


def _with_system(record: Record, messages: tuple[Message, ...], settings: DataSettings) -> tuple[Message, ...]:
    """The messages with their system prompt: `data.system`, or where that is None the data's own, of either place.

    Raises:
        ValueError: a `system` column and a system message that say different things.
    """
    rest = tuple(message for message in messages if message["role"] not in _SYSTEM)
    if settings.system is None:
        column = _system_column(record)
        own = [message["content"] for message in messages if message["role"] in _SYSTEM]
        if column is None or own == [column]:
            return messages
        if own:
            raise ValueError(
                f"{record.where} has both a 'system' column and a system message: set data.system to the one that "
                "holds, or remove the column"
            )
        return ({"role": "system", "content": column}, *messages)
    return ({"role": "system", "content": settings.system}, *rest) if settings.system else rest
