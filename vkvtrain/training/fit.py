"""Whether rows and model fit together, from the model's configuration alone, before any weight is loaded."""

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from vkvtrain.ends import configured_ends
from vkvtrain.generation.requests import positions
from vkvtrain.training.data import Row, TrainingData, load_data
from vkvtrain.training.models import model_name
from vkvtrain.training.settings import Recipe

_NAMED = 5
"""Rows that a sentence names."""


def fitting_data(recipe: Recipe, tokenizer: Any, progress: bool = False) -> TrainingData:
    """The tokenised rows of a recipe, which its model can read and, once trained, end.

    Args:
        recipe: `data`, `model`, and what is generated on policy.
        tokenizer: the model's.
        progress: whether to show a bar, and to warn: on one process.

    Raises:
        ValueError: a model without a configuration, data that cannot be used, rows of more tokens than the model has
            positions, or tokens that it has no embedding of.
    """
    config, generation = _configurations(recipe)
    data = load_data(recipe.data, tokenizer, progress, configured_ends(generation))
    check_positions(recipe, data, config)
    check_vocabulary(data, config, tokenizer)
    unknown = _unknown_ends(data, generation, tokenizer)
    if unknown is not None and progress:
        warnings.warn(unknown, stacklevel=2)
    return data


def _configurations(recipe: Recipe) -> tuple[Any, GenerationConfig]:
    """The model's configuration and that of its generation, which without a file of its own follows from the first."""
    name, revision = model_name(recipe), recipe.model.revision or "main"
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"model.name {name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    try:
        return config, GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        return config, GenerationConfig.from_model_config(config)


def check_positions(recipe: Recipe, data: TrainingData, model_config: Any) -> None:
    """Raise ValueError for rows, or room for rollouts, beyond the positions that the model was made for."""
    if getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None) is None:
        return
    limit = positions(model_config)
    long = [row for row in (*data.train, *data.held_out) if row.length > limit]
    if long:
        raise ValueError(
            f"{len(long)} of {len(data.train) + len(data.held_out)} rows have more tokens than the model's {limit:,} "
            f"positions ({_named(long)}): leave them out with data.max_length {limit}"
        )
    tokens = recipe.training.rollout_tokens
    if recipe.training.objective == "on_policy" and tokens is not None:
        prompt = max(row.prompt_length for row in data.train)
        if prompt + tokens > limit:
            raise ValueError(
                f"training.rollout_tokens ({tokens}) behind the longest prompt ({prompt} tokens) exceeds the model's "
                f"{limit:,} positions: lower it"
            )


def check_vocabulary(data: TrainingData, model_config: Any, tokenizer: Any) -> None:
    """Raise ValueError for a token, one added to the tokenizer for example, that the model has no embedding of."""
    entries = model_config.get_text_config(decoder=True).vocab_size
    for part, rows in (("training", data.train), ("held-out", data.held_out)):
        for row in rows:
            token = max(row.input_ids)
            if token >= entries:
                raise ValueError(
                    f"{part} row {row.index} holds token {token} ({tokenizer.decode([token])!r}), but the model's "
                    f"embedding has {entries} entries: use the model's own tokenizer, or resize the embedding first"
                )


def _unknown_ends(data: TrainingData, generation: GenerationConfig, tokenizer: Any) -> str | None:
    """What to say of rows that end with a token at which the base model does not stop; None if there is no such one."""
    own = configured_ends(generation)
    taught = sorted({row.input_ids[-1] for row in data.train} - set(own))
    if not taught:
        return None

    def names(tokens: Sequence[int]) -> str:
        return ", ".join(repr(tokenizer.decode([token])) for token in tokens) or "nothing"

    return (
        f"rows end with {names(taught)}, but the base model's generation config stops at {names(own)}: every command "
        "of vkvtrain, and the generation_config.json beside the adapter, stop at both; PeftModel.from_pretrained alone "
        f"never does, there pass eos_token_id={[*own, *taught]} to generate"
    )


def _named(rows: Sequence[Row]) -> str:
    longest = sorted(rows, key=lambda row: -row.length)[:_NAMED]
    return ", ".join(f"row {row.index}: {row.length:,}" for row in longest) + (", ..." if len(rows) > _NAMED else "")
