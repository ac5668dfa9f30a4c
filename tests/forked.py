"""`vkvtrain lm-eval` in a fork of the test's process: it has the imports already, and what it sets is gone with it."""

import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

from lm_eval import tasks
from lm_eval.tasks import TaskManager

from vkvtrain import cli

ROOT = Path(__file__).parents[1]


def lm_eval(output: Path, *arguments: str) -> tuple[int, str]:
    """Run with the model `vkv` and the tasks of eval/tasks; the exit status, and what the command printed.

    lm-eval's own tasks, whose index takes seconds, are not there. What is printed goes to the file `output`.
    """
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(300)  # ends the child, should a lock that another thread held keep it for ever
        try:
            with output.open("wb") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
            tasks.TaskManager = partial(TaskManager, include_defaults=False)
            where = ["--include_path", str(ROOT / "eval/tasks"), "--device", "cpu"]
            status = cli.main(["lm-eval", "run", "--model", "vkv", *where, *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()
