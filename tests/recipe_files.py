"""Recipes as files, for the tests of what is read from them."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EVICTED = {"policy": "vase_attnv", "budget": 64, "window": 16}


def values(tmp_path, **sections):
    """The smallest recipe, with sections replaced."""
    return {
        "model": {"name": "tiny"},
        "data": {"source": "tiny:keyed_sum", "rows": 20, "held_out": 2},
        "eviction": EVICTED,
        "training": {"steps": 20, "global_batch": 4},
        "output": str(tmp_path / "run"),
        **sections,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path
