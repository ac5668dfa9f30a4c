"""Held-out prompts answered with the evicting cache during training: a few, greedily, and how many are right.

Right means: the whole response is the one that the data has, or for the embedded task, which can be graded, that the
total is. On other data a right answer in other words counts as wrong, so look at how the number moves, not at its size.
"""

from collections.abc import Collection, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from vkvtrain.config import EvictionConfig
from vkvtrain.ends import end_tokens
from vkvtrain.generation import Completion, Request, generate
from vkvtrain.generation.requests import positions
from vkvtrain.tiny import task
from vkvtrain.training.data import Row
from vkvtrain.training.engines import shards_weights
from vkvtrain.training.run import Run
from vkvtrain.training.settings import Recipe

SOURCE = "tiny:keyed_sum"
"""Generated data that have a grader."""


def right(run: Run, row: Row, completion: Completion, ends: Collection[int] = ()) -> bool:
    """Whether a response is right, whichever of the end tokens it stops with; see the module."""
    expected = list(row.input_ids[row.prompt_length :])
    if run.recipe.data.source == SOURCE:
        final = run.tokenizer.decode(expected).partition(task.END_THINK)[2]
        return task.grade(run.tokenizer.decode(completion.tokens), final[0], final[2:4])[0]
    return completion.finished and _open(completion.tokens, ends) == _open(expected, ends)


def _open(tokens: list[int], ends: Collection[int]) -> list[int]:
    """A response without its end token."""
    return tokens[:-1] if tokens[-1] in ends else tokens


def requests(rows: Sequence[Row], longest: int | None = None) -> list[Request]:
    """Greedy requests with room for a response a quarter longer than the longest one that is expected.

    Args:
        rows: whose prompts are answered.
        longest: most tokens of a sequence, if there is a limit.
    """
    limit = max(row.response_length for row in rows) * 5 // 4 + 1

    def room(row: Row) -> int:
        return limit if longest is None else min(limit, longest - row.prompt_length)

    return [Request(tuple(row.input_ids[: row.prompt_length]), room(row), (row.index, 0)) for row in rows]


@torch.no_grad()
def generated(run: Run) -> dict[str, float]:
    """Share of right and of finished responses at the recipe's first setting; every process calls it."""
    accelerator, settings = run.accelerator, run.recipe
    configs = settings.eviction_configs()
    config = configs[0] if configs else EvictionConfig(policy="full")
    rows = run.data.held_out[: settings.log.generate_samples]
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    run.model.eval()
    found = []
    if mine:
        ends = end_tokens(run.tokenizer, run.adapted.generation_config)
        asked = requests(rows, positions(run.adapted.config))[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():  # as the training pass computes
            answers = generate(
                run.adapted, config, asked, slots=settings.training.batch_per_device, end_tokens=ends,
                tokenizer=run.tokenizer,
            )  # fmt: skip
        pairs = zip(mine, answers, strict=True)
        found = [(right(run, row, one, ends), one.finished, one.evictions) for row, one in pairs]
    run.model.train()
    everyone = gather_object(found)
    exact, finished, evictions = (sum(column) / len(everyone) for column in zip(*everyone, strict=True))
    name = "full" if config.budget is None else str(config.budget)
    return {
        f"generated_right_{name}": round(exact, 4),
        f"generated_finished_{name}": round(finished, 4),
        f"generated_evictions_{name}": round(evictions, 2),
    }


def check_generated(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise ValueError where `log.generate_every` is set but no process holds the whole model."""
    if recipe.log.generate_every is not None and shards_weights(accelerator):
        raise ValueError(
            "log.generate_every generates on every process, which FSDP and ZeRO-3 leave without the whole model: leave "
            "it out, and evaluate the adapter afterwards"
        )
