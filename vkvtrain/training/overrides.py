"""Any setting of a recipe on the command line: `--optim.learning_rate 1e-3`, or `--budget 64` where the name is unique.

Values are YAML (`--budget "[64, 80]"`, `--eviction null`). Knows the recipe's schema; knows nothing of what it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vkvtrain.config import EvictionConfig, Settings, nearest
from vkvtrain.shipped import find_recipe
from vkvtrain.training.settings import DataSettings, OptimSettings, Recipe, recipe_values

FLAGS = ("dry_run", "overwrite", "help")
OF_SOURCE = ("config", "split", "revision", "rows")
"""Settings of a recipe's `data` that say which part of its source is read: another source has other ones."""


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    recipe: Path | None = None
    overrides: list[tuple[str, Any]] = field(default_factory=list)
    """(dotted name, value)."""
    dry_run: bool = False
    overwrite: bool = False
    help: bool = False


def sections() -> dict[str, type[Settings]]:
    """The sections of a recipe and their schemas."""
    found: dict[str, type[Settings]] = {}
    for name, info in Recipe.model_fields.items():
        if name == "eviction":
            found[name] = EvictionConfig
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            found[name] = info.annotation
    return found


def setting_names() -> list[str]:
    """Dotted names of everything that can be set, sections included."""
    inner = [f"{section}.{name}" for section, schema in sections().items() for name in schema.model_fields]
    return [*Recipe.model_fields, *inner]


def resolve(name: str, known: Sequence[str]) -> str:
    """The dotted name that `name` stands for: itself, or the only one that ends in it.

    Raises:
        ValueError: a name that is unknown or stands for several.
    """
    if name in known:
        return name
    candidates = [dotted for dotted in known if dotted.endswith(f".{name}")]
    if len(candidates) > 1:
        raise ValueError(f"--{name} could be {' or '.join('--' + dotted for dotted in candidates)}: write one of them")
    if not candidates:
        close = nearest(name, [*known, *(dotted.rpartition(".")[2] for dotted in known)])
        raise ValueError(
            f"--{name}: a recipe has no such setting{close if 'did you mean' in close else '; see --help'}"
        )
    return candidates[0]


def parse_command(arguments: Sequence[str]) -> Command:
    """A command line of one recipe, flags and overrides, in any order.

    Raises:
        ValueError: an unknown or ambiguous name, a value that is missing or no YAML, or not exactly one recipe.
    """
    known, recipes, overrides = setting_names(), [], []
    flags: dict[str, bool] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if argument == "-h":
                flags["help"] = True
            else:
                recipes.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name in FLAGS:
            if equals:
                raise ValueError(f"--{name.replace('_', '-')} takes no value")
            flags[name] = True
            continue
        dotted = resolve(name, known)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        try:
            overrides.append((dotted, yaml.safe_load(value)))
        except yaml.YAMLError:
            raise ValueError(f"--{name}: {value!r} is not a YAML value") from None
    if len(recipes) != 1 and "help" not in flags:
        raise ValueError(
            f"give exactly one recipe (a YAML file or a shipped one's name), got {recipes or 'none'}; see --help"
        )
    return Command(find_recipe(recipes[0]) if recipes and "help" not in flags else None, overrides, **flags)


def apply_overrides(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The recipe's values with the overrides in place; a section that was null is opened.

    Raises:
        ValueError: an override inside a section that is no mapping.
    """
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for dotted, value in overrides:
        section, _, name = dotted.rpartition(".")
        if section:
            if not isinstance(merged.get(section) or {}, dict):
                raise ValueError(f"--{dotted}: {section} is {merged[section]!r} in the recipe, not a mapping")
            merged[section] = {**(merged.get(section) or {}), name: value}
        else:
            merged[name] = value
    return merged


def load_recipe(path: Path, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """The validated recipe of a file.

    Raises:
        ValueError: one sentence that names the file, the setting and the fix.
    """
    values = recipe_values(path)
    try:
        values, notes = follow_overrides(apply_overrides(values, overrides), [name for name, _ in overrides])
        recipe = Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    recipe._notes = notes
    return recipe


def follow_overrides(values: dict[str, Any], overridden: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values with what cannot hold any more beside the overrides left out, and what is to be said of it.

    With `data.source` replaced, the part of the old source is not the part of the new one. With few `training.steps`,
    a warm-up that nobody asked for beside them is shortened. What the command line itself sets stays.
    """
    values, notes = dict(values), []
    data = values.get("data")
    if "data.source" in overridden and isinstance(data, dict):
        generated = str(data["source"]).startswith("tiny:")  # which needs to be told how many rows
        names = [name for name in OF_SOURCE if name in data and not (generated and name == "rows")]
        dropped = {
            name: data[name]
            for name in names
            if f"data.{name}" not in overridden and data[name] != DataSettings.model_fields[name].default
        }
        values["data"] = {name: value for name, value in data.items() if name not in dropped}
        notes += [f"data.{name} ({value}) is the recipe's own source's: left out" for name, value in dropped.items()]
    optim, steps = values.get("optim") or {}, (values.get("training") or {}).get("steps")
    if isinstance(optim, dict) and type(steps) is int and steps > 0:
        warmup = optim.get("warmup_steps", OptimSettings.model_fields["warmup_steps"].default)
        asked = "optim.warmup_steps" in overridden or "optim" in overridden
        beside = "warmup_steps" in optim and not {"training.steps", "training"} & set(overridden)
        if type(warmup) is int and warmup > steps and not asked and not beside:
            values["optim"] = {**optim, "warmup_steps": steps}
            notes.append(f"optim.warmup_steps is {steps} instead of {warmup}: a run of {steps} steps has no more")
    return values, notes


def describe_settings() -> str:
    """Every setting with its default and its meaning, for `--help`."""
    schemas: dict[str, type[Settings]] = {"": Recipe, **sections()}
    lines = []
    for section, schema in schemas.items():
        for name, info in schema.model_fields.items():
            if not section and name in schemas and name != "eviction":
                continue
            dotted = f"{section}.{name}" if section else name
            default = "required" if info.is_required() else info.get_default(call_default_factory=True)
            lines.append(f"  --{dotted} [{default}]\n      {info.description}")
    return "\n".join(lines)
