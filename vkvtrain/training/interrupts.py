"""Being told to stop: SIGTERM, as schedulers send it before they take a node away, and Ctrl-C. Both end a run after
the step it is in, with a checkpoint.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A run that was told to stop and has written its checkpoint."""

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        kept = f"checkpoint {checkpoint} is written" if checkpoint else "NO checkpoint could be written"
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; {kept}, and the same command continues"
        )
        self.status = 128 + signum
        """Exit status, as a shell has it for the signal: 143 for SIGTERM, 130 for Ctrl-C."""


class Interrupt:
    """Whether this process was told to stop, and by which signal."""

    def __init__(self) -> None:
        self.signum = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.signum = signum


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Notes signals instead of dying of them; only where Python can, in the main thread."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupt
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
