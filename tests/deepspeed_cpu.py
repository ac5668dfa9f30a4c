"""recipes/finetune.py under DeepSpeed on CPUs, without compiling its shared-memory exchange first (minutes)."""

import runpy
import sys

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
