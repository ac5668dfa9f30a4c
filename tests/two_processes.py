"""What test_distributed.py runs in one process and in two: a float64 step by DDP and by FSDP2, and what came of it.

torchrun --nproc_per_node 2 tests/two_processes.py RECIPE OUTPUT
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from vkvtrain.training.data import load_data
from vkvtrain.training.engines import gather_moments, gather_weights, restore_moments, trained
from vkvtrain.training.held_out import held_out_losses
from vkvtrain.training.loop import batches_of_step, prepare, train_step
from vkvtrain.training.models import load_model, load_tokenizer
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.overrides import load_recipe
from vkvtrain.training.passes import simulation
from vkvtrain.training.schedule import step_eviction


def adapted(recipe):
    """The model in float64, with an adapter that does something."""
    set_seed(0)
    model = load_model(recipe).double()
    for name, weight in trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def ddp(recipe, accelerator, output):
    """Gradient, updated adapter and held-out losses of a step of the loop; and the streams of each rank."""
    tokenizer = load_tokenizer(recipe)
    data = load_data(recipe.data, tokenizer)
    run = prepare(recipe, accelerator, adapted(recipe), data, tokenizer)
    streams = [stream for batch in batches_of_step(run, None)[0] for stream in batch.streams]
    inner, gradients = run.optimizer.optimizer.step, {}

    def step(*args):
        gradients.update({name: weight.grad.clone() for name, weight in trained(run.adapted).items()})
        return inner(*args)

    run.optimizer.optimizer.step = step
    row, _ = train_step(run)
    weights = gather_weights(accelerator, run.adapted)
    (output / f"rank{accelerator.process_index}.json").write_text(
        json.dumps({"streams": streams, "row": row, "held_out": held_out_losses(run)})
    )
    if accelerator.is_main_process:
        save_file(gradients, output / "gradients.safetensors")
        save_file(weights, output / "weights.safetensors")
    return run


def fsdp2(recipe, accelerator, output, run):
    """The same step with every layer's weights sharded; moments gathered, and restored into a fresh optimiser."""
    run.step = 0
    model = ModelWithLoss(adapted(recipe), recipe.training)
    for layer in model.model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=recipe.optim.learning_rate)
    config = step_eviction(recipe, 0)
    batches, _ = batches_of_step(run, config)
    targets = sum(len(batch.targets) for batch in batches)
    counts = torch.tensor(targets)
    torch.distributed.all_reduce(counts)
    for batch in batches:
        with simulation(model, config, batch) as trace:
            (model(batch, trace)["loss"] * accelerator.num_processes / counts).backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in trained(model.model).items()}
    optimizer.step()
    moments = gather_moments(accelerator, model.model, optimizer)
    weights = gather_weights(accelerator, model.model)
    fresh = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad])
    restore_moments(accelerator, model.model, SimpleNamespace(optimizer=fresh), weights, moments, 1)
    again = gather_moments(accelerator, model.model, fresh)
    assert all(torch.equal(moments[name], again[name]) for name in moments)
    assert all(state["exp_avg"].placements == w.placements for w, state in fresh.state.items())
    if accelerator.is_main_process:
        save_file(gradients, output / "fsdp2.safetensors")


def main(path, output):
    output = Path(output)
    output.mkdir(exist_ok=True)
    recipe, accelerator = load_recipe(Path(path)), Accelerator()
    run = ddp(recipe, accelerator, output)
    if accelerator.num_processes > 1:
        fsdp2(recipe, accelerator, output, run)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
