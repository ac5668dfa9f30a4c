"""What a run says while it trains: a row of `metrics.jsonl` for each step, a tracker, and a bar on the main process."""

import json
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from vkvtrain.training.run_directory import METRICS
from vkvtrain.training.settings import Recipe


class Log:
    """The log of a run; every process calls it, the main one writes."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._path = recipe.output / METRICS
        self._tracked = recipe.log.tracker != "none"
        if self._tracked:
            accelerator.init_trackers("vkvtrain")
        self._bar = tqdm(
            total=recipe.training.steps, disable=not accelerator.is_main_process, desc=recipe.output.name,
            mininterval=2,
        )  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of a finished step."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        if self._tracked:
            self._accelerator.log(row, step=row["step"])
        if any(name.startswith("held_out") for name in row) and self._accelerator.is_main_process:
            self._bar.write(json.dumps({k: row[k] for k in row if k.startswith("held_out") or k == "step"}))
        self._bar.update()
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

    def close(self) -> None:
        self._bar.close()
        self._accelerator.end_training()
