"""The end of a run: what is written, in which order, and what is kept where that fails.

The adapter first, whole or not at all; where it cannot be written the last step is kept as a checkpoint, and the same
command finishes the run. What comes after it, the report, can fail without taking anything along.
"""

import sys
import time
from contextlib import ExitStack

from vkvtrain.training.interrupts import Interrupted
from vkvtrain.training.logs import Log
from vkvtrain.training.report import REPORT, write_report
from vkvtrain.training.resume import gather_state, save_alone, save_last
from vkvtrain.training.run import Run
from vkvtrain.training.run_directory import Incomplete, finish_run
from vkvtrain.training.settings import Recipe

WAIT_FOR_MAIN = 5.0
"""Seconds that another process gives the main one to write a checkpoint."""


def finish(run: Run, log: Log) -> None:
    """Write the adapter; where that fails, whatever the reason, the last step is kept as a checkpoint."""
    weights, moments = gather_state(run)
    if not run.accelerator.is_main_process:
        return
    with ExitStack() as otherwise:
        otherwise.callback(save_last, run, log, weights, moments)
        finish_run(run.recipe, run.adapted, weights, run.tokenizer)
        otherwise.pop_all()
    print(f"adapter written to {run.recipe.output}", flush=True)


def report(recipe: Recipe) -> None:
    """Write the report of a run whose adapter is written."""
    try:
        write_report(recipe)
    except Exception as error:  # whatever plotting raises, the run is trained
        raise Incomplete(
            f"the run is finished and its adapter is in {recipe.output}, but {REPORT} could not be written ({error})"
        ) from error


def rescue(run: Run, log: Log) -> int:
    """End a run from outside of its loop, which does not get on: keep the last finished step; returns the status."""
    if not run.accelerator.is_main_process:
        time.sleep(WAIT_FOR_MAIN)  # its end would fail what the main process waits for
        return 128 + run.interrupt.signum
    told = Interrupted(run.interrupt.signum, run.step, save_alone(run, log))
    print(f"finetune: {told}", file=sys.stderr)
    return told.status
