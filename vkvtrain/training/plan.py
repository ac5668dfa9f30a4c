"""What is said before training: who takes part, how much, and what one sample looks like."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from vkvtrain.config import EvictionConfig
from vkvtrain.events import evictions_by
from vkvtrain.training.data import Row, TrainingData
from vkvtrain.training.settings import Recipe, TrainingSettings


def expected_evictions(rows: list[Row], budget: int, window: int) -> float:
    """Mean number of events of a row when its response is decoded (its last token is never given to a cache)."""
    return mean(evictions_by(row.prompt_length, row.length - 1, budget, window) for row in rows)


def shortest(rows: list[Row], configs: Sequence[EvictionConfig]) -> Row:
    """The shortest row that is evicted under the first of the settings; where none is, the shortest row."""
    ordered = sorted(rows, key=lambda row: row.length)
    if configs and configs[0].budget is not None:
        budget, window = configs[0].budget, configs[0].window
        return next((row for row in ordered if expected_evictions([row], budget, window)), ordered[0])
    return ordered[0]


def objective(training: TrainingSettings) -> str:
    """The objective in words."""
    if not training.has_teacher:
        return training.objective
    parts = [training.divergence if training.divergence != "jsd" else f"jsd {training.jsd_weight:g}"]
    if training.temperature != 1:
        parts.append(f"temperature {training.temperature:g}")
    if training.top_k is not None:
        parts.append(f"top {training.top_k}")
    if training.cross_entropy_weight:
        parts.append(f"{training.cross_entropy_weight:g} x cross-entropy")
    if training.entropy_weight:
        parts.append(f"weight 1 + {training.entropy_weight:g} x entropy")
    return f"{training.objective} ({', '.join(parts)})"


def plan(recipe: Recipe, data: TrainingData, tokenizer: Any, model: Any, processes: int, asked: int) -> str:
    """The plan of a run as text."""
    training = recipe.training
    share = training.global_batch // processes
    forward = min(training.batch_per_device, share)
    tokens = mean(row.length for row in data.train)
    trainable, total = model.get_nb_trainable_parameters()
    first = data.train[0]
    wanting = f"{data.unusable} without a correct generation, " if data.unusable else ""
    evicts = bool(recipe.eviction_configs()) and training.dense_fraction < 1
    mixed = f", {training.dense_fraction:.0%} of them dense" if evicts else ""
    lines = [
        f"processes        {processes} (asked for {asked})",
        f"batch            {forward} a forward pass x {-(-share // forward)} accumulated x {processes} processes = "
        f"{training.global_batch} sequences, about {training.global_batch * tokens:,.0f} tokens a step",
        f"data             {len(data.train)} rows of {tokens:.0f} tokens on average, {data.left_out} left out as too "
        f"long, {wanting}{training.steps * training.global_batch / len(data.train):.2f} epochs",
        f"trainable        {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"objective        {objective(training)}, {training.steps} steps{mixed}",
    ]
    configs = recipe.eviction_configs() if evicts else []
    for config in configs:
        assert config.budget is not None
        events = expected_evictions(data.train, config.budget, config.window)
        lines.append(
            f"eviction         {config.policy}, budget {config.budget}, window {config.window}: "
            f"{events:.1f} evictions a sample"
        )
        if events == 0:
            lines.append(f"WARNING          no row ever exceeds budget {config.budget}: training would be dense")
    if not configs:
        lines.append("eviction         none: this is a dense run")
    lines += [f"note             {note}" for note in recipe.notes]
    prompt = tokenizer.decode(first.input_ids[: first.prompt_length])
    response = tokenizer.decode(first.input_ids[first.prompt_length :])
    if recipe.data.date is not None:
        lines.append(f"date             {recipe.data.date}, wherever the chat template writes today's")
    lines += [f"first sample     no loss  | {prompt}", f"                 loss     | {response}"]
    lines.append(f"output           {recipe.output}")
    return "\n".join(lines)
