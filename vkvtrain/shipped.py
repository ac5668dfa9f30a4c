"""Files that are shipped with the code: recipes, tasks, sweeps, accelerate configurations.

In a checkout they stand at the top level of the repository; the build of a wheel takes them into the package
(`force-include` in pyproject.toml). Knows nothing of what they say.
"""

from pathlib import Path
from typing import Literal

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
