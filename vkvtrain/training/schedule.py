"""What each step does: dense or evicted, at which budget. Pure functions of the recipe and the step."""

import random

from vkvtrain.config import EvictionConfig
from vkvtrain.training.settings import Recipe


def is_dense(step: int, fraction: float) -> bool:
    """Whether step `step` (from 0) runs without eviction: evenly spread, `fraction` of them in the long run."""
    return int((step + 1) * fraction) > int(step * fraction)


def step_eviction(recipe: Recipe, step: int) -> EvictionConfig | None:
    """The eviction setting of a step, None for a dense one; budgets are drawn evenly from the recipe's list."""
    configs = recipe.eviction_configs()
    if not configs or is_dense(step, recipe.training.dense_fraction):
        return None
    return random.Random(f"{recipe.seed}/budget/{step}").choice(configs)
