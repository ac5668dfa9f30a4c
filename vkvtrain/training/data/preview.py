"""`vkvtrain data preview`: the rows of a recipe as the trainer sees them, before any model is loaded."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vkvtrain.config import EvictionConfig
from vkvtrain.events import evictions_by
from vkvtrain.training.data.batching import packing_length
from vkvtrain.training.data.order import pack, step_samples
from vkvtrain.training.data.rows import Row, TrainingData
from vkvtrain.training.fit import fitting_data
from vkvtrain.training.models import load_tokenizer
from vkvtrain.training.overrides import load_recipe, parse_command
from vkvtrain.training.settings import Recipe

HELP = """usage: vkvtrain data preview RECIPE [--show N] [any setting of the recipe, such as --budget 2048]

Prints rows as the trainer sees them (decoded tokens, prompt and response apart), lengths, evictions at each budget, how
full batches are, and what is left out. Loads the tokenizer, not the model.
"""
_HEAD, _TAIL = 160, 80
"""Tokens of a long prompt or response that are shown."""
_FEW = 0.5
"""Share of rows without any eviction above which the budget does not fit the data."""


def never_evicted(rows: Sequence[Row], config: EvictionConfig) -> float:
    """Share of the rows that never reach the budget: under eviction they are trained densely."""
    return statistics.mean(evictions(row, config) == 0 for row in rows)


def evictions(row: Row, config: EvictionConfig) -> int:
    """Events while the row's response is decoded: its last token is never given to a cache."""
    assert config.budget is not None
    return evictions_by(row.prompt_length, row.length - 1, config.budget, config.window)


def main(arguments: Sequence[str]) -> None:
    """The command line of `vkvtrain data preview`."""
    rest, shown = list(arguments), 3
    if "-h" in rest or "--help" in rest:
        print(HELP, end="")
        return
    if "--show" in rest:
        place = rest.index("--show")
        value = rest[place + 1] if place + 1 < len(rest) else ""
        if not value.isdecimal():
            raise ValueError(f"--show needs a number of rows, got {value!r}")
        shown = int(value)
        del rest[place : place + 2]
    command = parse_command(rest)
    assert command.recipe is not None
    recipe = load_recipe(command.recipe, command.overrides)
    tokenizer = load_tokenizer(recipe)
    preview(recipe, fitting_data(recipe, tokenizer, progress=True), tokenizer, Console(), shown)


def preview(recipe: Recipe, data: TrainingData, tokenizer: Any, console: Console, shown: int = 3) -> None:
    """Print the rows of a recipe and what eviction will make of them."""
    for row in data.train[:shown]:
        console.print(rendered(row, tokenizer, console.is_terminal), soft_wrap=True)
    console.print(lengths_table(data.train))
    configs = recipe.eviction_configs()
    if configs:
        console.print(evictions_table(data.train, configs))
    for config in {config.budget: config for config in configs}.values():
        share = never_evicted(data.train, config)
        if share > 0:
            which = "NO ROW REACHES" if share == 1 else f"{share:.0%} OF THE ROWS NEVER REACH"
            advice = "; lower the budget, or use longer traces" if share > _FEW else ""
            loud = "bold red" if share > _FEW else "yellow"
            console.print(
                Text(f"{which} BUDGET {config.budget}: what never reaches it is trained densely{advice}", loud)
            )
    console.print(Text(batches(recipe, data.train)))
    for line in left_out(data, recipe):
        console.print(Text(line))


def visible(text: str) -> str:
    """A text whose control characters are written out, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def rendered(row: Row, tokenizer: Any, colours: bool) -> Text:
    """A row with its loss mask: the prompt dim, the tokens of the response in two alternating colours.

    Without colours the two parts are marked by words, as the plan of a run does.
    """
    text = Text()
    prompt, response = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
    parts = (
        (f"row {row.index}, prompt, {len(prompt)} tokens, no loss", prompt, ("dim", "dim")),
        (f"row {row.index}, response, {len(response)} tokens, loss", response, ("green", "bold cyan")),
    )
    for title, tokens, styles in parts:
        text.append(f"--- {title}\n", "bold")
        gap = len(tokens) - _HEAD - _TAIL
        for start, some in ((0, tokens[:_HEAD]), (_HEAD + gap, tokens[-_TAIL:])) if gap > 0 else ((0, tokens),):
            if start:
                text.append(f"\n... {gap} tokens ...\n", "bold")
            if not colours:
                text.append(visible(tokenizer.decode(some)))
                continue
            for place, piece in enumerate(pieces(some, tokenizer)):
                text.append(visible(piece), styles[place % 2])
        text.append("\n")
    return text


def pieces(tokens: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Tokens as texts, one by one; those that make one character only together, together."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\ufffd") or len(held) == 4:
            yield text
            held = []
    if held:
        yield tokenizer.decode(held)


def lengths_table(rows: Sequence[Row]) -> Table:
    """Least, median, 90th percentile and most tokens."""
    table = Table("tokens", "min", "median", "p90", "max", title=f"{len(rows)} training rows")
    columns = {
        "prompt": [row.prompt_length for row in rows],
        "response": [row.response_length for row in rows],
        "both": [row.length for row in rows],
    }
    for name, lengths in columns.items():
        lengths.sort()
        marks = (lengths[0], statistics.median_low(lengths), lengths[int(0.9 * (len(lengths) - 1))], lengths[-1])
        table.add_row(name, *(f"{mark:,}" for mark in marks))
    return table


def evictions_table(rows: Sequence[Row], configs: Sequence[EvictionConfig]) -> Table:
    """Expected evictions at each budget."""
    title = "evictions while the responses are decoded"
    table = Table("budget", "mean", "max", "final length / budget", "rows without any", title=title)
    for config in {config.budget: config for config in configs}.values():  # events depend on lengths alone
        assert config.budget is not None
        events = [evictions(row, config) for row in rows]
        ratio = statistics.mean(row.length for row in rows) / config.budget
        table.add_row(
            str(config.budget), f"{statistics.mean(events):.1f}", str(max(events)), f"{ratio:.2f}x",
            f"{never_evicted(rows, config):.0%}",
        )  # fmt: skip
    return table


def batches(recipe: Recipe, rows: Sequence[Row], steps: int = 16) -> str:
    """How full the forward passes of the first steps are, on one process."""
    training, lengths = recipe.training, [row.length for row in rows]
    capacity = packing_length(recipe, rows)
    used = allocated = sequences = 0
    steps = min(steps, training.steps)
    for step in range(steps):
        chosen = [index for index, _ in step_samples(
            lengths, step, training.global_batch, recipe.seed, recipe.data.group_by_length
        )]  # fmt: skip
        bins = [[place] for place in range(len(chosen))]
        if recipe.data.packing:
            bins = pack([lengths[index] for index in chosen], capacity)
        widths = [sum(lengths[chosen[place]] for place in one) for one in bins]
        sequences += len(bins)
        size = training.batch_per_device
        for part in (widths[start : start + size] for start in range(0, len(widths), size)):
            used, allocated = used + sum(part), allocated + max(part) * len(part)
    packed = (
        f"packed into {sequences / steps:.1f} sequences of at most {capacity} tokens, " if recipe.data.packing else ""
    )
    return f"a step: {training.global_batch} rows, {packed}{1 - used / allocated:.0%} padding (first {steps} steps)"


def left_out(data: TrainingData, recipe: Recipe, named: int = 5) -> list[str]:
    """What is not trained on, and why."""
    lines = []
    if data.too_long:
        longest = sorted(data.too_long, key=lambda one: -one[1])[:named]
        names = ", ".join(f"row {index} ({tokens:,} tokens)" for index, tokens in longest)
        lines.append(f"left out: {data.left_out} rows above data.max_length ({recipe.data.max_length}): {names}")
    if data.unusable:
        lines.append(f"left out: {data.unusable} problems without a correct generation")
    return lines or ["left out: nothing"]
