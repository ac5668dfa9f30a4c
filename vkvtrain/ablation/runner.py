"""Runs the cells of a plan as processes of their own: several at once, retried, interruptible.

Only this process writes results, and a cell's only once it has ended well, so a worker that dies takes nothing with it.
"""

import asyncio
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vkvtrain.ablation.grid import Sweep
from vkvtrain.ablation.plan import Plan, PlannedCell, settings_of, versions, what_changed
from vkvtrain.ablation.samples import read_rows
from vkvtrain.ablation.store import Store

LAST_LINES = 12
"""Of a failed cell's log, to show."""
PATIENCE = 10.0
"""Seconds that a process gets to end by itself before it is killed."""
USER_ERROR = 2
"""Exit status of a setting that does not hold: trying again is no use."""


@dataclass(frozen=True)
class Slot:
    """A share of the machine in which one cell runs at a time.

    Attributes:
        processes: processes of a cell.
        threads: threads of each process.
        gpus: the GPUs' names for CUDA_VISIBLE_DEVICES; empty for a CPU.
    """

    processes: int
    threads: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A cell that did not end well."""

    name: str
    reason: str
    attempts: int
    log: str
    last_lines: list[str]


class Watcher(Protocol):
    """What is told as cells run."""

    def started(self, planned: PlannedCell) -> None: ...
    def finished(self, planned: PlannedCell, rows: Sequence[dict[str, Any]], seconds: float) -> None: ...
    def failed(self, planned: PlannedCell, failure: Failure, again: bool) -> None: ...


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def slots(sweep: Sweep, devices: Sequence[str]) -> list[Slot]:
    """The machine's shares: its GPUs, or its cores, divided by the cells that run at once.

    Raises:
        ValueError: more cells at once, or more processes of one, than there are GPUs.
    """
    parallel = sweep.parallel_cells
    if not devices or sweep.device == "cpu":
        processes = sweep.processes or 1
        given = os.environ.get("OMP_NUM_THREADS")
        cores = int(given) if given and given.isdigit() else os.cpu_count() or 1
        return [Slot(processes, max(1, cores // (parallel * processes)))] * parallel
    if parallel > len(devices):
        raise ValueError(f"parallel_cells ({parallel}) is more than the {len(devices)} GPUs: lower it")
    each = len(devices) // parallel
    processes = sweep.processes or each
    if processes > each:
        raise ValueError(
            f"processes ({processes}) is more than the {each} GPUs of one cell: lower it or parallel_cells"
        )
    shares = [tuple(devices[place * each : place * each + processes]) for place in range(parallel)]
    return [Slot(processes, max(1, (os.cpu_count() or 1) // (parallel * processes)), share) for share in shares]


def command_of(planned: PlannedCell, sweep: Sweep, slot: Slot, directory: Path) -> list[str]:
    """The command of a cell, which anyone can run again; its eviction setting is read from `directory`."""
    model = planned.model
    arguments = {"pretrained": model.pretrained, "eviction_config": str(directory), **sweep.model_args}
    arguments |= {} if model.revision is None else {"revision": model.revision}
    arguments |= {} if model.peft is None else {"peft": model.peft}
    launch = [sys.executable]
    if slot.processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(slot.processes), "--main_process_port", "0"]
    command = [*launch, "-m", "vkvtrain.cli", "lm-eval", "run", "--model", "vkv", "--model_args", json.dumps(arguments)]
    command += ["--tasks", planned.task.name, "--batch_size", str(sweep.batch_size)]
    command += ["--output_path", str(directory / "lm-eval"), "--log_samples"]
    optional: dict[str, Any] = {
        "--include_path": sweep.include_path,
        "--device": sweep.device,
        "--limit": planned.limit,
        "--num_fewshot": planned.cell.task.num_fewshot,
        "--gen_kwargs": json.dumps(planned.cell.task.gen_kwargs) if planned.cell.task.gen_kwargs else None,
        "--metadata": json.dumps(planned.cell.task.metadata) if planned.cell.task.metadata else None,
    }
    for name, value in optional.items():
        command += [] if value is None else [name, str(value)]
    return command + ["--apply_chat_template"] * sweep.apply_chat_template


def environment_of(slot: Slot) -> dict[str, str]:
    """The environment of a cell's processes."""
    own = {"OMP_NUM_THREADS": str(slot.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if slot.gpus:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    elif slot.processes > 1:
        own["ACCELERATE_USE_CPU"] = "true"  # with --multi_gpu: what connects CPU processes in accelerate 1.15
    return {**os.environ, **own}


def last_lines(log: Path) -> list[str]:
    """The last lines of a log as a terminal would show them, progress bars reduced to their last state."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-LAST_LINES:]


class Runner:
    """Runs what is left of a plan.

    Args:
        plan: the cells.
        store: where results go.
        shares: shares of the machine, as many as cells run at once.
        watcher: is told what happens.
        lock: descriptor that the processes inherit, so that a directory stays locked while one of them lives.
    """

    def __init__(self, plan: Plan, store: Store, shares: Sequence[Slot], watcher: Watcher, lock: int) -> None:
        self.plan, self.store, self.shares, self.watcher, self.lock = plan, store, shares, watcher, lock

    def run(self, todo: Sequence[PlannedCell]) -> list[Failure]:
        """Run cells; returns those that failed after all attempts.

        Raises:
            KeyboardInterrupt: interrupted, or asked to end; the processes have ended by then.
        """
        try:
            return asyncio.run(self._run(todo))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    async def _run(self, todo: Sequence[PlannedCell]) -> list[Failure]:
        main = asyncio.current_task()
        assert main is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
        free: asyncio.Queue[Slot] = asyncio.Queue()
        for slot in self.shares:
            free.put_nowait(slot)

        async def one(planned: PlannedCell) -> Failure | None:
            slot = await free.get()
            try:
                return await self._cell(planned, slot)
            finally:
                free.put_nowait(slot)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(planned)) for planned in todo]
        except* OSError as errors:  # a full disk, say: nothing that another attempt at one cell would mend
            raise errors.exceptions[0] from None
        return [failure for failure in (task.result() for task in tasks) if failure is not None]

    async def _cell(self, planned: PlannedCell, slot: Slot) -> Failure | None:
        directory = self.store.work / planned.id
        directory.mkdir(parents=True, exist_ok=True)
        planned.cell.config.save_pretrained(directory)
        command = command_of(planned, self.plan.sweep, slot, directory)
        (directory / "log.txt").unlink(missing_ok=True)
        attempts = 1 + self.plan.sweep.retries
        for attempt in range(1, attempts + 1):
            self.watcher.started(planned)
            began = time.monotonic()
            reason, hopeless = await self._attempt(command, slot, directory)
            seconds = time.monotonic() - began
            if reason is None and (changed := await asyncio.to_thread(what_changed, planned, self.plan.sweep)):
                reason, hopeless = f"{changed} changed after the sweep began, so run the sweep again", True
            if reason is None:
                try:
                    rows = read_rows(directory / "lm-eval", planned.task)
                    self._keep(planned, rows, command, slot, seconds)
                    (directory / "failure.json").unlink(missing_ok=True)
                    self.watcher.finished(planned, rows, seconds)
                    return None
                except ValueError as error:
                    reason = str(error)
            log = directory / "log.txt"
            failure = Failure(planned.cell.name, reason, attempt, str(log), last_lines(log))
            again = attempt < attempts and not hopeless
            if not again:
                (directory / "failure.json").write_text(json.dumps(asdict(failure), indent=1) + "\n")
            self.watcher.failed(planned, failure, again)
            if not again:
                return failure
        raise AssertionError("unreachable")

    async def _attempt(self, command: Sequence[str], slot: Slot, directory: Path) -> tuple[str | None, bool]:
        """One process to its end: (why it failed or None, whether another attempt is useless)."""
        shutil.rmtree(directory / "lm-eval", ignore_errors=True)
        with (directory / "log.txt").open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment_of(slot),
                start_new_session=True, pass_fds=[self.lock],
            )  # fmt: skip
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                await end(process)
                raise
        clear(process)
        if status < 0:
            return f"killed by {signal.Signals(-status).name}", False
        return (f"exit status {status}" if status else None), status == USER_ERROR

    def _keep(
        self, planned: PlannedCell, rows: Sequence[dict[str, Any]], command: Sequence[str], slot: Slot, seconds: float
    ) -> None:
        about = {
            "name": planned.cell.name,
            "model": asdict(planned.model),
            "eviction": planned.cell.config.model_dump(mode="json"),
            "task": asdict(planned.task),
            "command": list(command),
            "seconds": round(seconds, 1),
            "processes": slot.processes,
            "threads": slot.threads,
            "machine": torch.cuda.get_device_name()
            if slot.gpus
            else f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "versions": versions(),
        }
        self.store.write(rows, {"cell": planned.id, **settings_of(planned)}, about)


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process and all that it started; kill what does not listen."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), PATIENCE)
    clear(process)
    await process.wait()


def clear(process: asyncio.subprocess.Process) -> None:
    """Kill what a process left behind: ranks whose launcher died."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
