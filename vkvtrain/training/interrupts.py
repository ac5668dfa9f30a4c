"""Being told to stop: SIGTERM, as schedulers send it before they take a node away, Ctrl-C, and a launcher that is gone.

A run looks between two forward passes whether it was told to stop, gives the step up that it is in, writes a checkpoint
of the last finished one, and ends. Launchers do not wait long: torch elastic kills its processes 30 seconds after it
passed a signal on. So a thread, which no long forward pass holds up, ends the process after `PATIENCE` seconds by
itself, with the same checkpoint where this process holds all that belongs into it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 10.0
"""Seconds that a run has to reach a place where it can end."""
LOOK = 0.5
"""Seconds between two looks of the thread."""
ONE_PRESS = 1.0
"""Seconds within which several SIGINT are one: the terminal sends it to all processes, and a launcher passes it on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepAbandoned(Exception):
    """A step that was given up because the run was told to stop; weights and moments are those before it."""


class Interrupted(Exception):
    """A run that was told to stop and has written its checkpoint."""

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        kept = f"checkpoint {checkpoint} is written" if checkpoint else "NO checkpoint could be written"
        kept = f"{kept}, and the same command continues" if step else "the same command begins again"
        where = f"after step {step}" if step else "before its first step was finished"
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}; {kept}")
        self.status = 128 + signum
        """Exit status, as a shell has it for the signal: 143 for SIGTERM, 130 for Ctrl-C."""


class Interrupt:
    """Whether this process was told to stop, and by which signal; a launcher that is gone counts as SIGTERM."""

    def __init__(self, launcher: int | None = None) -> None:
        """
        Args:
            launcher: process that started this one and whose end counts as SIGTERM; None where there is none.
        """
        self.launcher = launcher
        self.signum = 0
        self.over = threading.Event()
        self._handled, self._pressed = 0, 0.0
        self._lock = threading.Lock()
        self._changing = self._ending = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        another = self.launcher is None or time.monotonic() - self._pressed > ONE_PRESS
        if self._handled == signal.SIGINT == signum and another:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._handled, self._pressed = signum, time.monotonic()
        self.signum = self.signum or signum

    def begin_change(self) -> None:
        """From here to `end_change` weights, moments and step do not belong together, or are being written."""
        with self._lock:
            ending = self._ending
            self._changing = not ending
        while ending:
            time.sleep(LOOK)  # the thread is writing them, and ends the process

    def end_change(self) -> None:
        self._changing = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """`begin_change` and `end_change` around a block."""
        self.begin_change()
        try:
            yield
        finally:
            self.end_change()

    def watch(self, wakeups: int, rescue: Callable[[], int]) -> None:
        """What the thread does: wait for a signal or the launcher's end, then for the run's, and then end the process.

        Args:
            wakeups: descriptor from which the numbers of signals can be read, without blocking.
            rescue: writes a checkpoint of the last finished step, says so, and gives the exit status.
        """
        while not self.signum and not self.over.wait(LOOK):
            with suppress(BlockingIOError):  # nothing has come
                self.signum = self.signum or next((one for one in os.read(wakeups, 64) if one in SIGNALS), 0)
            if self.launcher not in (None, os.getppid()):
                self.signum = self.signum or signal.SIGTERM
        if self.over.wait(PATIENCE) or (self.signum == signal.SIGINT and self.launcher is None):
            return  # at a terminal, whoever pressed Ctrl-C can press it again
        with self._lock:
            self._ending = not self._changing
        while not self._ending:
            if self.over.wait(LOOK):
                return
            with self._lock:
                self._ending = not self._changing
        status = rescue()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def interruptible(rescue: Callable[[], int] | None = None, launcher: int | None = None) -> Iterator[Interrupt]:
    """Notes signals instead of dying of them; only where Python can, in the main thread.

    Args:
        rescue: see `Interrupt.watch`; without it nothing ends the process but the run itself.
        launcher: see `Interrupt`.
    """
    interrupt = Interrupt(launcher)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    # written to by the signal itself, where a handler would wait for the end of a long call into torch
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {signum: signal.signal(signum, interrupt) for signum in SIGNALS}
    thread = threading.Thread(target=interrupt.watch, args=(reader, rescue), daemon=True)
    if rescue is not None:
        thread.start()
    try:
        yield interrupt
    finally:
        interrupt.over.set()
        if rescue is not None:
            thread.join()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(earlier)
        os.close(reader)
        os.close(writer)
