"""The training loop: plain Accelerate, one function a stage. Its oracle in the tests is `transformers.Trainer`."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from vkvtrain.attention import Trace, simulated_eviction
from vkvtrain.config import EvictionConfig
from vkvtrain.support import ATTENTION, layer_kinds
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.checkpoints import check_output, finish_run, start_run
from vkvtrain.training.data import Batch, Row, TrainingData, collate, load_data, sample
from vkvtrain.training.launch import asked_processes, check_world_size
from vkvtrain.training.objectives import forward_kl, response_logits, sft_loss, teacher_logits
from vkvtrain.training.plan import plan
from vkvtrain.training.schedule import step_eviction
from vkvtrain.training.settings import Recipe


def train(recipe: Recipe, dry_run: bool = False, overwrite: bool = False) -> None:
    """Train an adapter as the recipe says, and write it to `recipe.output`.

    Args:
        recipe: the settings.
        dry_run: print the plan and stop.
        overwrite: replace a finished run in the output directory.

    Raises:
        ValueError: settings that do not fit the data, the model or the launch.
        FloatingPointError: a loss that is not finite.
    """
    check_output(recipe.output, overwrite)
    accelerator = Accelerator(
        log_with=None if recipe.log.tracker == "none" else recipe.log.tracker, project_dir=recipe.output
    )
    check_world_size(recipe, accelerator.num_processes)
    set_seed(recipe.seed)
    name = str(MODEL_PATH) if recipe.model.name == "tiny" else recipe.model.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.model.revision or "main")
    except OSError as error:
        raise ValueError(f"model.name {name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    data = load_data(recipe.data, tokenizer)
    model = load_model(recipe, name)
    if accelerator.is_main_process:
        print(plan(recipe, data, tokenizer, model, accelerator.num_processes, asked_processes()), flush=True)
    if dry_run:
        return
    log = start_run(recipe) if accelerator.is_main_process else None
    if recipe.log.tracker != "none":
        accelerator.init_trackers("vkvtrain")
    optim = recipe.optim
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    schedule = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=recipe.training.steps
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()  # as loaded it evaluates: neither dropout nor checkpointing
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    bar = tqdm(
        total=recipe.training.steps, disable=not accelerator.is_main_process, desc=recipe.output.name, mininterval=2
    )
    for step in range(recipe.training.steps):
        began = time.monotonic()
        config = step_eviction(recipe, step)
        row = train_step(recipe, accelerator, model, optimizer, data, step, config, pad)
        row |= {"step": step + 1, "learning_rate": scheduler.get_last_lr()[0]}
        scheduler.step()
        row["tokens_per_second"] = round(row.pop("tokens") / (time.monotonic() - began))
        if data.held_out and ((step + 1) % recipe.log.evaluate_every == 0 or step + 1 == recipe.training.steps):
            row |= held_out_losses(recipe, accelerator, model, data.held_out, pad)
            if accelerator.is_main_process:
                bar.write(json.dumps({key: row[key] for key in row if key.startswith("held_out") or key == "step"}))
        if log is not None:
            with log.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        if recipe.log.tracker != "none":
            accelerator.log(row, step=step + 1)
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_run(recipe, accelerator.unwrap_model(model), tokenizer)
        print(f"adapter written to {recipe.output}")
    accelerator.end_training()


def load_model(recipe: Recipe, name: str) -> Any:
    """The base model with a fresh adapter; raises ValueError for a model that cannot evict."""
    settings, lora = recipe.model, recipe.lora
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=settings.revision or "main", dtype=settings.dtype, attn_implementation=ATTENTION
    )
    for config in recipe.eviction_configs():
        layer_kinds(model.config, config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        init_lora_weights=True if lora.init == "default" else lora.init, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, adapter)


def over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes."""
    total: Any = accelerator.reduce(values, "sum")
    return total


def step_rows(recipe: Recipe, rows: list[Row], step: int, rank: int, processes: int) -> list[tuple[Row, int]]:
    """(row, epoch) of a rank's share of a step: every n-th of the global batch."""
    size = recipe.training.global_batch
    chosen = [sample(step * size + offset, len(rows), recipe.seed) for offset in range(rank, size, processes)]
    return [(rows[index], epoch) for index, epoch in chosen]


def train_step(
    recipe: Recipe, accelerator: Accelerator, model: Any, optimizer: Any, data: TrainingData, step: int,
    config: EvictionConfig | None, pad: int,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step over the global batch; returns what is logged."""
    mine = step_rows(recipe, data.train, step, accelerator.process_index, accelerator.num_processes)
    size = recipe.training.batch_per_device
    parts = [mine[start : start + size] for start in range(0, len(mine), size)]
    counts = torch.tensor(
        [sum(row.response_length for row, _ in mine), sum(row.length for row, _ in mine)], device=accelerator.device
    )
    targets, tokens = over_processes(accelerator, counts).tolist()
    loss, seen = torch.zeros((), device=accelerator.device), torch.zeros(2, device=accelerator.device)
    for number, part in enumerate(parts):
        batch = collate([row for row, _ in part], [epoch for _, epoch in part], pad, accelerator.device)
        last = number + 1 == len(parts)
        with nullcontext() if last else accelerator.no_sync(model), simulation(model, config, batch) as trace:
            summed = objective(recipe, accelerator, model, batch, trace)
            # gradients are averaged over processes: divide by the mean token count, not by this process's own
            accelerator.backward(summed * accelerator.num_processes / targets)
            loss += summed.detach().float() / targets
        if trace is not None:
            seen += torch.tensor(what_happened(trace, batch), device=accelerator.device) * len(part) / len(mine)
    total = over_processes(accelerator, loss).item()
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the loss of step {step + 1} is {total}; samples {[row.index for row, _ in mine]} on rank "
            f"{accelerator.process_index}: lower optim.learning_rate, or look at these samples"
        )
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    logged = {
        "loss": total,
        "grad_norm": float(norm),
        "tokens": tokens,
        "kind": "dense" if config is None else "evicted",
    }
    if config is not None:
        # every process has as many samples as any other
        mean = over_processes(accelerator, seen) / accelerator.num_processes
        evictions, live = mean[0].item(), mean[1].item()
        logged |= {"budget": config.budget, "evictions": round(evictions, 3), "live_fraction": round(live, 4)}
    return logged


@contextmanager
def simulation(model: Any, config: EvictionConfig | None, batch: Batch) -> Iterator[Trace | None]:
    """Simulated eviction of a batch, or nothing on a dense step."""
    if config is None:
        yield None
        return
    with simulated_eviction(model, config, batch.prompt_lengths, batch.streams) as trace:
        yield trace


def objective(recipe: Recipe, accelerator: Accelerator, model: Any, batch: Batch, trace: Trace | None) -> torch.Tensor:
    """The loss of a batch, summed over its response tokens."""
    if recipe.training.objective == "sft":
        return sft_loss(response_logits(model, batch), batch)
    with trace.suspended() if trace is not None else nullcontext():
        teacher = teacher_logits(accelerator.unwrap_model(model), batch)
    student = response_logits(model, batch)
    return forward_kl(student, teacher) + recipe.training.ce_weight * sft_loss(student, batch)


def what_happened(trace: Trace, batch: Batch) -> tuple[float, float]:
    """(evictions, share of its keys still held at its end) of the mean sample, over the evicting layers."""
    plan_rows = trace.rows
    events = sum(len(row.events) for row in plan_rows) / len(plan_rows)
    real = batch.attention_mask.bool()[:, None]
    width = batch.input_ids.shape[1]
    shares = [((at > width) & real).sum(-1).float().mean(-1) / real.sum((-2, -1)) for at in trace.evict_at.values()]
    return events, torch.stack(shares).mean().item()


@torch.no_grad()
def held_out_losses(
    recipe: Recipe, accelerator: Accelerator, model: Any, rows: list[Row], pad: int
) -> dict[str, float]:
    """Loss per response token on the held-out rows: full cache, and evicted at each of the recipe's budgets."""
    model.eval()
    size = recipe.training.batch_per_device
    settings: list[EvictionConfig | None] = [None, *recipe.eviction_configs()]
    losses = {}
    for config in settings:
        summed = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = collate(part, [0] * len(part), pad, accelerator.device)
            with simulation(model, config, batch):
                summed += sft_loss(response_logits(accelerator.unwrap_model(model), batch), batch).item()
        name = "full" if config is None else f"evicted_{config.budget}"
        losses[f"held_out_loss_{name}"] = round(summed / sum(row.response_length for row in rows), 5)
    model.train()
    return losses
