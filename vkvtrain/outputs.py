"""Whether a place can be written, known before hours of work are spent on what belongs there."""

import os
import tempfile
from pathlib import Path


def check_directory(path: Path, setting: str) -> None:
    """Raise ValueError, one sentence that names the setting, unless files can be written into a directory.

    The directory may be missing: then it can be made. Nothing is left behind.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest(path)):
            pass
    except OSError as error:
        raise ValueError(f"{setting} {str(path)!r} cannot be written: {_reason(path, error)}") from None


def check_file(path: Path, setting: str) -> None:
    """Raise ValueError, one sentence that names the setting, unless a file can be written, in place of one or not."""
    if path.is_dir():
        raise ValueError(f"{setting} {str(path)!r} is a directory: give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{setting} {str(path)!r} cannot be written: it may only be read")
    try:
        check_directory(path.parent, setting)
    except ValueError as error:
        raise ValueError(str(error).replace(repr(str(path.parent)), repr(str(path)), 1)) from None


def _nearest(path: Path) -> Path:
    """The directory itself, or the nearest above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _reason(path: Path, error: OSError) -> str:
    above = _nearest(path)
    if not above.is_dir():
        return f"{str(above)!r} is a file; choose another place"
    return f"{(error.strerror or 'no such place').lower()} in {str(above)!r}; choose another place"
