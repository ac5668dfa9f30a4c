"""The training command with forward passes that take SECONDS_A_PASS, from the second step on.

python tests/slow_steps.py RECIPE ...
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

from vkvtrain.training import loop
from vkvtrain.training.objectives import ModelWithLoss

path = Path(__file__).parents[1] / "recipes" / "finetune.py"
spec = importlib.util.spec_from_file_location("finetune", path)
finetune = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune)
forward, train_step, steps = ModelWithLoss.forward, loop.train_step, []


def slow(self, *args, **kwargs):
    if len(steps) > 1:
        print("SLOW PASS", flush=True)
        time.sleep(float(os.environ["SECONDS_A_PASS"]))
    return forward(self, *args, **kwargs)


def counted(run):
    steps.append(run.step)
    return train_step(run)


ModelWithLoss.forward, loop.train_step = slow, counted
if __name__ == "__main__":
    sys.exit(finetune.main(sys.argv[1:]))
