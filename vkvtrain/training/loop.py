"""The training loop: plain Accelerate, one function a stage. Its oracle in the tests is `transformers.Trainer`.

A run is what `Run` holds. A step is a function of the run and its number: the rows, their order, the eviction setting,
the noise and the dropout all follow from (recipe, step), so a run can be cut at any step and continued. Data,
objective, log and run directory each have their module.
"""

import resource
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import get_scheduler

from vkvtrain.config import EvictionConfig
from vkvtrain.ends import stop_at
from vkvtrain.locking import locked
from vkvtrain.threads import choose_threads
from vkvtrain.training.checkpoints import Checkpoint
from vkvtrain.training.data import Batch, TrainingData, in_batches, step_batches, step_rows
from vkvtrain.training.ending import finish, report, rescue
from vkvtrain.training.engines import accumulating, make_accelerator, restore_weights
from vkvtrain.training.fit import fitting_data
from vkvtrain.training.generated import check_generated, generated
from vkvtrain.training.held_out import held_out_losses, losses
from vkvtrain.training.interrupts import Interrupted, StepAbandoned, interruptible
from vkvtrain.training.launch import (
    asked_processes,
    check_engine,
    check_environment,
    check_world_size,
    launcher_process,
)
from vkvtrain.training.logs import Log, trackers
from vkvtrain.training.models import check_model, load_model, load_tokenizer
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.on_policy import Rollout, check_on_policy, log_ratios, roll_out
from vkvtrain.training.passes import simulation, what_happened
from vkvtrain.training.plan import plan, shortest
from vkvtrain.training.resume import (
    checkpoint_to_continue,
    identity_of,
    restore_run,
    save_run,
    with_date,
)
from vkvtrain.training.run import Run
from vkvtrain.training.run_directory import changed_versions, check_output, start_run
from vkvtrain.training.schedule import step_eviction
from vkvtrain.training.settings import Recipe
from vkvtrain.training.watch import Failed, Watch

PARTS = ("loss", "cross_entropy", "divergence", "entropy")
"""What a batch's forward pass sums over its response tokens."""
HELD_BY = "another run, or by what a killed one left behind: wait for it, end it, or choose another output"


def train(recipe: Recipe, dry_run: bool = False, overwrite: bool = False) -> None:
    """Train an adapter as the recipe says, and write it to `recipe.output`; goes on where a run was cut.

    Args:
        recipe: the settings.
        dry_run: print the plan, take one step on one row, and write nothing.
        overwrite: start afresh where the output directory holds a run, finished or not.

    Raises:
        ValueError: settings that do not fit the data, the model, the launch or what the output holds.
        Failed: a loss that is not finite, or has diverged.
        Interrupted: by SIGTERM or Ctrl-C, after a checkpoint.
    """
    check_environment()
    check_output(recipe.output, overwrite)
    launcher = launcher_process()
    accelerator = make_accelerator(recipe, trackers(recipe.log))
    check_world_size(recipe, accelerator.num_processes)
    check_engine(accelerator)
    check_model(recipe)
    check_on_policy(recipe, accelerator)
    check_generated(recipe, accelerator)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe)
    recipe = with_date(recipe, tokenizer, overwrite)
    data = fitting_data(recipe, tokenizer, progress=accelerator.is_main_process)
    check_loss_masks(data)
    if dry_run:
        model = load_with_plan(recipe, accelerator, data, tokenizer)
        try_step(prepare(recipe, accelerator, model, data, tokenizer))
        return
    with locked(recipe.output, HELD_BY) if accelerator.is_main_process else nullcontext():
        identity = identity_of(recipe, data) if accelerator.is_main_process else {}
        checkpoint = checkpoint_to_continue(recipe, identity, accelerator, overwrite)
        model = load_with_plan(recipe, accelerator, data, tokenizer)
        if accelerator.is_main_process:
            if checkpoint is not None:
                others = f" ({', '.join(changed)})" if (changed := changed_versions(recipe.output)) else ""
                print(f"continues after step {checkpoint.step}, from {checkpoint.path}{others}", flush=True)
            start_run(recipe, identity)
        run = prepare(recipe, accelerator, model, data, tokenizer, checkpoint)
        run.identity = identity
        complete(run, launcher)
        if accelerator.is_main_process:
            report(recipe)


def load_with_plan(recipe: Recipe, accelerator: Accelerator, data: TrainingData, tokenizer: Any) -> Any:
    """The adapted model; says what will be done with it."""
    model = load_model(recipe)
    stop_at(model.generation_config, data.ends)
    threads = choose_threads(model)
    if accelerator.is_main_process and threads is not None:
        print(f"threads          {threads}")
    if accelerator.is_main_process:
        print(plan(recipe, data, tokenizer, model, accelerator.num_processes, asked_processes()), flush=True)
    return model


def complete(run: Run, launcher: int | None) -> None:
    """Train what is left and write the adapter; a signal ends it after the last finished step."""
    log = Log(run.recipe, run.accelerator, run.step)
    try:
        with interruptible(partial(rescue, run, log), launcher) as run.interrupt:
            optimise(run, log)
            with run.interrupt.changing():
                finish(run, log)
    finally:
        log.close()


def check_loss_masks(data: TrainingData) -> None:
    """Raise ValueError for rows without a token to learn from, whose loss mask would be all zero."""
    empty = [row.index for row in (*data.train, *data.held_out) if not row.response_length]
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(
            f"{len(empty)} rows have no response token, so their loss mask is all zero (rows {shown}): leave them out "
            "of data.source"
        )


def try_step(run: Run) -> None:
    """One step over one row on each process, as a proof that everything works: the shortest row that is evicted."""
    recipe, processes, began = run.recipe, run.accelerator.num_processes, time.monotonic()
    row = shortest(run.data.train, recipe.eviction_configs())
    small = recipe.training.model_copy(update={"global_batch": processes, "batch_per_device": 1, "dense_fraction": 0.0})
    run.recipe = recipe.model_copy(update={"training": small})
    run.data = replace(run.data, train=[row])
    logged, _ = train_step(run)
    if run.accelerator.is_main_process:
        kept = f", {logged['evictions']:.0f} evictions at budget {logged['budget']}" if "budget" in logged else ""
        print(
            f"one step         row {row.index} of {row.length} tokens: loss {logged['loss']:.4f}{kept}, "
            f"{time.monotonic() - began:.1f} s; nothing is written"
        )


def optimise(run: Run, log: Log) -> None:
    """All steps that are left, with their log and checkpoints."""
    steps, every = run.recipe.training.steps, run.recipe.checkpoint.every
    while run.step < steps:
        try:
            row = next_step(run)
        except StepAbandoned:
            stop(run, log)
        except Failed as failure:
            saved = save_run(run, log) if run.step else None
            raise Failed(f"{failure}; the state before it: {saved or 'none was saved'}") from None
        with run.interrupt.changing():
            log.write(row)
            run.row = None
        if told_to_stop(run):
            stop(run, log)
        if run.step % every == 0 and run.step < steps:
            with run.interrupt.changing():
                save_run(run, log)


def told_to_stop(run: Run) -> bool:
    """Whether any process was: they stop together, so every process asks."""
    told = torch.tensor(int(run.interrupt.signum > 0), device=run.accelerator.device)
    return bool(over_processes(run.accelerator, told))


def stop(run: Run, log: Log) -> NoReturn:
    """Keep the last finished step, and end."""
    with run.interrupt.changing():
        saved = save_run(run, log) if run.step else None
    raise Interrupted(run.interrupt.signum or signal.SIGTERM, run.step, saved)


def prepare(
    recipe: Recipe, accelerator: Accelerator, model: Any, data: TrainingData, tokenizer: Any,
    checkpoint: Checkpoint | None = None,
) -> Run:  # fmt: skip
    """The run before its first step, or where a checkpoint left it."""
    optim = recipe.optim
    if checkpoint is not None:
        restore_weights(model, checkpoint.weights)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    schedule = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=recipe.training.steps
    )
    vocabulary = model.config.get_text_config().vocab_size
    model, optimizer = accelerator.prepare(ModelWithLoss(model, recipe.training), optimizer)
    model.train()  # as loaded it evaluates: neither dropout nor checkpointing
    run = Run(recipe, accelerator, model, optimizer, scheduler, data, tokenizer, Watch(vocabulary))
    if checkpoint is not None:
        restore_run(run, checkpoint)
    return run


def next_step(run: Run) -> dict[str, Any]:
    """The next step with learning rate, clock, memory and what is only looked at now and then; returns its log row."""
    recipe, began = run.recipe, time.monotonic()
    # dropout is a function of the step and the rank, so a resumed run draws what one never stopped would have drawn
    set_seed((recipe.seed + 1_000_003 * (run.step + 1) + run.accelerator.process_index) % 2**32)  # NumPy takes no more
    row, batches = train_step(run)
    row |= {"step": run.step + 1, "learning_rate": run.scheduler.get_last_lr()[0]}
    row["tokens_per_second"] = round(row.pop("tokens") / (time.monotonic() - began))
    row["peak_memory_gib"] = round(peak_memory(), 3)
    run.scheduler.step()
    run.step, run.saved, run.row = run.step + 1, None, dict(row)
    run.interrupt.end_change()
    if run.data.held_out and (run.step % recipe.log.evaluate_every == 0 or run.step == recipe.training.steps):
        row |= held_out_losses(run) | losses(run, [(batches[0], True)], "train")
    every = recipe.log.generate_every
    if every is not None and (run.step % every == 0 or run.step == recipe.training.steps):
        row |= generated(run)
    return row


def peak_memory() -> float:
    """Most memory that this process has had so far, in GiB: of the GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes."""
    total: Any = accelerator.reduce(values, "sum")
    return total


def batches_of_step(run: Run, config: EvictionConfig | None) -> tuple[list[Batch], list[Rollout]]:
    """This process's batches of the next step, and the rollouts that they hold where the objective is `on_policy`."""
    recipe, accelerator = run.recipe, run.accelerator
    share = (recipe, run.data.train, run.step, accelerator.process_index, accelerator.num_processes)
    if recipe.training.objective != "on_policy":
        return step_batches(*share, run.pad, accelerator.device), []
    with accelerator.autocast():  # as the training pass computes
        rollouts = roll_out(run.adapted, run.tokenizer, config, step_rows(*share), recipe)
    rollouts.sort(key=lambda rollout: -rollout.row.length)
    rows = [(rollout.row, rollout.epoch) for rollout in rollouts]
    return in_batches(rows, recipe.training.batch_per_device, run.pad, accelerator.device), rollouts


def train_step(run: Run) -> tuple[dict[str, Any], list[Batch]]:
    """The gradient of the global batch and one update of the adapter; what is logged of it, and its batches here.

    Raises:
        Failed: a loss or gradient that is no use; nothing is updated.
        StepAbandoned: a process was told to stop before the step's last forward pass; nothing is updated.
    """
    recipe, accelerator, model = run.recipe, run.accelerator, run.model
    config = step_eviction(recipe, run.step)
    batches, rollouts = batches_of_step(run, config)
    samples = [stream[0] for batch in batches for stream in batch.streams]
    counts = [sum(len(batch.targets) for batch in batches), sum(int(batch.attention_mask.sum()) for batch in batches)]
    targets, tokens = over_processes(accelerator, torch.tensor(counts, device=accelerator.device)).tolist()
    parts, seen = torch.zeros(len(PARTS), device=accelerator.device), torch.zeros(2, device=accelerator.device)
    log_probs = []
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        if number and told_to_stop(run):
            run.optimizer.zero_grad(set_to_none=True)
            raise StepAbandoned
        with accumulating(accelerator, model, last), simulation(model, config, batch) as trace:
            summed = model(batch, trace)
            # gradients are averaged over processes: divide by the mean token count, not by this process's own
            accelerator.backward(summed["loss"] * accelerator.num_processes / targets)
        parts += torch.stack([summed[name].detach().float() for name in PARTS]) / targets
        log_probs.append(summed["log_probs"].detach())
        if trace is not None:
            share = len(batch.streams) * accelerator.num_processes / recipe.training.global_batch
            seen += torch.tensor(what_happened(trace, batch), device=accelerator.device) * share
    means = dict(zip(PARTS, over_processes(accelerator, parts).tolist(), strict=True))
    total = means["loss"]
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
    problem = run.watch.problem(total, float(norm))
    if problem is not None:
        raise Failed(
            f"step {run.step + 1}: {problem}; samples {gather_object(samples)}: lower optim.learning_rate, or look at "
            "these samples"
        )
    run.interrupt.begin_change()  # until the step is counted
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    logged = {
        "loss": total,
        "grad_norm": float(norm),
        "tokens": tokens,
        "kind": "dense" if config is None else "evicted",
    }
    if recipe.training.has_teacher:
        logged |= means
    if rollouts:
        logged |= log_ratios(accelerator, rollouts, torch.cat(log_probs))
    if config is not None:
        mean = over_processes(accelerator, seen) / accelerator.num_processes
        evictions, live = mean[0].item(), mean[1].item()
        logged |= {
            "policy": config.policy,
            "budget": config.budget,
            "evictions": round(evictions, 3),
            "live_fraction": round(live, 4),
        }
    return logged, batches
