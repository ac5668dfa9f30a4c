"""What each step does: dense or evicted, by which policy, at which budget. Functions of the recipe and the step."""

import random

from vkvtrain.config import EvictionConfig
from vkvtrain.training.settings import Recipe


def is_dense(step: int, fraction: float) -> bool:
    """Whether step `step` (from 0) runs without eviction: evenly spread, `fraction` of them in the long run."""
    return int((step + 1) * fraction) > int(step * fraction)


def step_eviction(recipe: Recipe, step: int) -> EvictionConfig | None:
    """The eviction setting of a step, None for a dense one."""
    if not recipe.eviction_configs() or is_dense(step, recipe.training.dense_fraction):
        return None
    progress = step / max(1, recipe.training.steps - 1)
    budget = recipe.budgets().at(progress, random.Random(f"{recipe.seed}/budget/{step}"))
    policy = random.Random(f"{recipe.seed}/policy/{step}").choice(recipe.policies())
    return EvictionConfig(**{**(recipe.eviction or {}), "policy": policy, "budget": budget})
