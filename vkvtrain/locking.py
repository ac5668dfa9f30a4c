"""One writer for a directory: a file `lock` in it that the writer holds as long as it lives, however it ends."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def locked(directory: Path, held_by: str) -> Iterator[int]:
    """Keep other writers out of a directory, which is made if it is missing; gives the lock's descriptor.

    A process that inherits the descriptor holds the lock as well. A file system that cannot lock gives a warning.

    Args:
        directory: what is written.
        held_by: who may hold the lock and what to do then, for the message.

    Raises:
        ValueError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output {str(directory)!r} is in use by {held_by}") from None
        except OSError as error:
            warnings.warn(
                f"{str(directory)!r} cannot be locked ({error.strerror}): make sure that nothing else writes there",
                stacklevel=3,
            )
        yield file.fileno()
