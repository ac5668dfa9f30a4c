"""What a run says while it trains: a row of `metrics.jsonl` for each step, trackers, and a bar on the main process."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from vkvtrain.training.checkpoints import sync
from vkvtrain.training.run_directory import METRICS
from vkvtrain.training.settings import LogSettings, Recipe


def trackers(settings: LogSettings) -> list[str]:
    """The accelerate trackers of a recipe.

    Raises:
        ValueError: one whose package is not installed.
    """
    if settings.tracker == "none":
        return []
    if settings.tracker == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if importlib.util.find_spec(settings.tracker) is None:
        raise ValueError(f"log.tracker {settings.tracker!r} is not installed: pip install {settings.tracker}")
    return [settings.tracker]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log, in order; a last line that was cut is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsFile:
    """`metrics.jsonl`: rows are whole or not there, and wait in memory while the disk is full."""

    def __init__(self, path: Path, step: int) -> None:
        """Begin a log, or keep the rows of the first `step` steps of one."""
        self.path = path
        rows = read_metrics(path) if step and path.is_file() else []
        beside = path.with_suffix(".unfinished")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        beside.replace(path)
        self._size = path.stat().st_size
        self._waiting = ""

    def append(self, row: dict[str, Any]) -> None:
        self._waiting += json.dumps(row) + "\n"
        self.attempt()

    def attempt(self) -> None:
        """Write what waits, or say that it goes on waiting."""
        try:
            self.flush()
        except OSError as error:
            warnings.warn(f"{self.path} could not be written ({error.strerror}): its rows wait", stacklevel=2)

    def flush(self) -> None:
        """Write what waits; raises OSError if that cannot be, and nothing of it is written then."""
        if not self._waiting:
            return
        text = self._waiting.encode()
        with self.path.open("r+b") as file:
            file.truncate(self._size)  # what a failed attempt may have left
            file.seek(self._size)
            file.write(text)
        self._size, self._waiting = self._size + len(text), ""


class Log:
    """The log of a run; every process calls it, the main one writes."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, step: int = 0) -> None:
        """Begin a log, or go on after `step` steps."""
        self._accelerator = accelerator
        self._file = MetricsFile(recipe.output / METRICS, step) if accelerator.is_main_process else None
        self._tracks = bool(accelerator.log_with)
        if self._tracks:
            accelerator.init_trackers("vkvtrain", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        self._bar = tqdm(
            total=recipe.training.steps, initial=step, disable=not accelerator.is_main_process,
            desc=recipe.output.name, mininterval=2,
        )  # fmt: skip

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to `metrics.jsonl` alone."""
        if self._file is not None:
            self._file.append(row)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of a finished step."""
        self.add(row)
        if self._file is not None:
            seldom = {name: value for name, value in row.items() if name.startswith(("held_out", "generated"))}
            if seldom:
                self._bar.write(json.dumps({"step": row["step"]} | seldom))
        if self._tracks:
            values = {name: value for name, value in row.items() if name != "step"}
            self._track(lambda: self._accelerator.log(values, step=row["step"]))
        self._bar.update()
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

    def sync(self) -> None:
        """Wait until all rows are on the disk, so that a checkpoint never knows more steps than the log.

        Raises:
            OSError: they cannot be written.
        """
        if self._file is not None:
            self._file.flush()
            sync(self._file.path)

    def close(self) -> None:
        """Write what waits and end the trackers; says what of it fails, and raises nothing."""
        if self._file is not None:
            self._file.attempt()
        self._bar.close()
        self._track(self._accelerator.end_training)

    def _track(self, call: Callable[[], None]) -> None:
        """Tell the trackers something; from the first failure on nothing."""
        try:
            call()
        except Exception as error:  # a tracker is others' code, and no run may end because of one
            self._tracks = False
            warnings.warn(f"the tracker failed ({error}) and is told nothing any more; {METRICS} goes on", stacklevel=3)
