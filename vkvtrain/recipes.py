"""`vkvtrain recipes`: what is shipped, and a copy of it to change."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vkvtrain.planning.architecture import preset_names, read_architecture
from vkvtrain.planning.command import GIB, arguments_of, workload
from vkvtrain.planning.devices import find_device
from vkvtrain.planning.training import memory, peak
from vkvtrain.shipped import find_recipe, recipes
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.settings import Recipe
from vkvtrain.yaml_files import read_mapping

HELP = """usage: vkvtrain recipes [list]
       vkvtrain recipes copy NAME [DIRECTORY]

  list   the shipped recipes: model, objective, policy, budgets, planned memory of one GPU, what was measured
  copy   put the YAML of a recipe, and the one that it is based on, into a directory (by default the current one)

A recipe is trained by its name or file (`vkvtrain train NAME`), and planned by `vkvtrain plan NAME`.
"""
_BASE = re.compile(r"^base: *(\S+)", re.MULTILINE)
_MEASURED = re.compile(r"^# Measured: (.+(?:\n#  .+)*)", re.MULTILINE)


def planned_memory(recipe: Recipe) -> float | None:
    """GiB of one GPU in a training step; None for a model whose shapes are not shipped."""
    arguments = arguments_of(recipe)
    if arguments.model_config not in preset_names() and not Path(arguments.model_config).is_dir():
        return None
    architecture = read_architecture(arguments.model_config, recipe.lora.r, recipe.lora.target_modules)
    return peak(memory(architecture, workload(arguments), find_device(arguments.device))) / GIB


def measured(path: Path) -> str:
    """What the header of a recipe says was measured, after `# Measured:`."""
    said = _MEASURED.search(path.read_text())
    return " ".join(said[1].replace("\n#", " ").split()) if said else "nothing yet"


def listing() -> Table:
    """The shipped recipes, a row each."""
    made = Table("recipe", "model", "objective", "policy", "budgets", "GPU memory", "measured")
    made.columns[0].no_wrap = True
    for name, path in recipes().items():
        recipe = load_recipe(path)
        configs = recipe.eviction_configs() if recipe.training.dense_fraction < 1 else []
        gib = planned_memory(recipe)
        policies = ", ".join(dict.fromkeys(config.policy for config in configs)) or "none"
        budgets = ", ".join(dict.fromkeys(str(config.budget) for config in configs)) or "full cache"
        values = [name, recipe.model.name, recipe.training.objective, policies, budgets]
        values += ["-" if gib is None else f"{gib:.1f} GiB", measured(path)]
        made.add_row(*map(Text, values))
    return made


def copy(name: str, directory: Path) -> list[Path]:
    """Copy a recipe and what it is based on; `base` names the copies. Returns the files, the recipe's own first.

    Raises:
        ValueError: an unknown name, or a file of that name that says something else.
    """
    names = {path.resolve(): known for known, path in recipes().items()}

    def file_name(path: Path) -> str:
        return f"{names.get(path, path.stem).replace('/', '-')}.yaml"

    texts: dict[Path, str] = {}
    path = find_recipe(name).resolve()
    while True:
        base = read_mapping(path).get("base")
        target = directory / file_name(path)
        text = path.read_text()
        if base is None:
            texts[target] = text
            break
        path = (path.parent / base).resolve()
        texts[target] = _BASE.sub(f"base: {file_name(path)}", text, count=1)
    for target, text in texts.items():
        if target.exists() and target.read_text() != text:
            raise ValueError(f"{target} is there already and differs: move it away, or give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for target, text in texts.items():
        target.write_text(text)
    return list(texts)


def main(rest: Sequence[str]) -> None:
    """The command line of `vkvtrain recipes`.

    Raises:
        ValueError: one sentence that says what to give instead.
    """
    if {"-h", "--help"} & set(rest):
        print(HELP, end="")
        return
    match list(rest):
        case [] | ["list"]:
            console = Console()
            console = console if console.is_terminal else Console(width=150)
            console.print(listing())
            console.print(
                "GPU memory: of one GPU by `vkvtrain plan NAME`, for rows of the greatest length; several GPUs share "
                "the model by --config_file fsdp2", highlight=False, soft_wrap=True,
            )  # fmt: skip
        case ["copy", name] | ["copy", name, _]:
            written = copy(name, Path(rest[2]) if len(rest) > 2 else Path())
            print(f"written: {', '.join(map(str, written))}; now: vkvtrain train {written[0]}")
        case _:
            raise ValueError("say what to do: list, or copy NAME; see vkvtrain recipes --help")
