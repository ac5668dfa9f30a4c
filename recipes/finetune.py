"""Fine-tune a model with LoRA while its KV cache is being evicted.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/finetune.py recipes/tiny/vase.yaml --budget 64

Any setting of the recipe can be overridden: `--optim.learning_rate 1e-3`, or `--budget 64` where the name is unique.

Features: objectives `sft`, `distill` (forward KL, reverse KL, JSD; teacher: the same model without adapter, full cache)
and `on_policy` (the same on what the model generates with the evicting cache); a share of dense steps; one budget or
policy, or several, drawn per step or annealed; LoRA through peft; one or many processes through accelerate.

    --dry-run     print the plan (processes, batch, trainable share, a sample with its loss mask, evictions), take one
                  step on one row, and write nothing
    --overwrite   start afresh where the output directory holds a run, finished or not
    --help        this text and every setting

Writes the adapter, eviction_config.json, recipe.yaml, metrics.jsonl, environment.json, report.md and training.png to
`output`. A run that was killed or stopped is continued by the same command, from its newest checkpoint. Bad settings
are one sentence on standard error and exit status 2, before any model is loaded; a loss that is no use is status 1,
SIGTERM 143 and Ctrl-C 130, each after a checkpoint; something that could not be written at the end is status 1 too.
"""

import sys

from vkvtrain_cli import wait_passively


def main(arguments: list[str]) -> int:
    wait_passively()  # before torch is imported
    from vkvtrain.training.command import finetune

    return finetune(arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
