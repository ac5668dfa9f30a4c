"""One writer for a directory: a file `lock` in it that the writer holds as long as it lives, however it ends."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = "lock"


@contextmanager
def locked(directory: Path, held_by: str) -> Iterator[int]:
    """Keep other writers out of a directory, which is made if it is missing; gives the lock's descriptor.

    A process that inherits the descriptor holds the lock as well. A file system that cannot lock gives a warning. A
    directory that was made for the lock and is otherwise empty in the end is removed.

    Args:
        directory: what is written.
        held_by: who may hold the lock and what to do then, for the message.

    Raises:
        ValueError: another process holds it.
    """
    is_new = not directory.exists()
    while (file := _acquired(directory, held_by)) is None:
        pass
    with file:
        try:
            yield file.fileno()
        finally:
            if is_new and directory.is_dir() and os.listdir(directory) == [LOCK]:
                (directory / LOCK).unlink()
                directory.rmdir()


def _acquired(directory: Path, held_by: str) -> IO[str] | None:
    """The locked file; None where its last holder removed it in the meantime."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output {str(directory)!r} is in use by {held_by}") from None
    except OSError as error:
        warnings.warn(
            f"{str(directory)!r} cannot be locked ({error.strerror}): make sure that nothing else writes there",
            stacklevel=4,
        )
    try:
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None
