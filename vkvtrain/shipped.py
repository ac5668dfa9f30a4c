"""Files that are shipped with the code: recipes, tasks, sweeps, accelerate configurations.

In a checkout they stand at the top level of the repository; the build of a wheel takes them into the package
(`force-include` in pyproject.toml). Knows nothing of what they say.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

DEFAULT = "vase"
"""The recipe of a model's directory that is meant where only the directory is named."""
TASKS = "eval/tasks"
"""How sweeps and commands name the shipped tasks."""
_PACKAGE = Path(__file__).parent


def shipped(folder: Literal["recipes", "eval", "accelerate_configs"]) -> Path:
    """The directory of shipped files, wherever the package was installed from.

    Raises:
        FileNotFoundError: an installation without them.
    """
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(
        f"this installation of vkvtrain has no {folder}: install a wheel, or a checkout of the project"
    )


def recipes() -> dict[str, Path]:
    """The shipped recipes by name: `qwen3-0.6b` is that directory's vase.yaml, `tiny/dense` its dense.yaml."""
    named = {}
    for path in sorted(shipped("recipes").glob("*/*.yaml")):
        named[path.parent.name if path.stem == DEFAULT else f"{path.parent.name}/{path.stem}"] = path
    return named


def sweeps() -> dict[str, Path]:
    """The shipped sweeps by name."""
    return {path.stem: path for path in sorted((shipped("eval") / "sweeps").glob("*.yaml"))}


def tasks_directory(given: str) -> str:
    """A directory of task files as given; `eval/tasks` is the shipped one where the current directory has none."""
    return str(shipped("eval") / "tasks") if given == TASKS and not Path(given).is_dir() else given


def find_recipe(given: str) -> Path:
    """The file of a recipe, by its path or by the name of a shipped one; raises ValueError for an unknown name."""
    return _find(given.removesuffix(f"/{DEFAULT}"), given, recipes(), "recipe", "vkvtrain recipes lists them")


def find_sweep(given: str) -> Path:
    """The file of a sweep, by its path or by the name of a shipped one; raises ValueError for an unknown name."""
    return _find(given, given, sweeps(), "sweep", f"shipped are {', '.join(sweeps())}")


def _find(name: str, given: str, named: dict[str, Path], kind: str, where: str) -> Path:
    if Path(given).is_file() or Path(given).suffix in (".yaml", ".yml"):
        return Path(given)  # a file that is not there is refused where it is read
    if name in named:
        return named[name]
    close = get_close_matches(name, named, 1)
    hint = f"did you mean {close[0]!r}?" if close else where
    raise ValueError(
        f"there is no {kind} {given!r}: give the path of a YAML file, or the name of a shipped one ({hint})"
    )
