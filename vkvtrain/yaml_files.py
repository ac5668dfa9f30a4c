"""YAML files of settings: one mapping of names, each name once."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _EachNameOnce(yaml.SafeLoader):
    """Refuses a name that stands twice in a mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        ValueError: a file that cannot be read, or is no YAML mapping of names to values.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachNameOnce)  # a SafeLoader
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{path}: unknown setting {key!r}: the names of settings are text")
    return values
