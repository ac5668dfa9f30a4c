"""`vkvtrain ablate`, `vkvtrain results` and `vkvtrain report`: the command lines."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vkvtrain.ablation.export import cells_table, export, samples_table, statuses
from vkvtrain.ablation.grid import DENSE, Sweep, load_sweep
from vkvtrain.ablation.store import Store
from vkvtrain.config import nearest
from vkvtrain.outputs import check_directory, check_file
from vkvtrain.shipped import find_sweep

if TYPE_CHECKING:  # what runs cells loads lm-eval, which takes seconds
    from vkvtrain.ablation.plan import Plan, PlannedCell
    from vkvtrain.ablation.runner import Failure

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
_ABLATE = """usage: vkvtrain ablate SWEEP [--dry-run] [--SETTING VALUE ...]

Runs the grid of models, policies, budgets, tasks and seeds that SWEEP spans, a YAML file or the name of a shipped one
(quickstart), each cell as an lm-eval process of its own. What is finished is kept: a rerun continues, and a changed
setting makes new cells. Exit status 1 if a cell failed.

  --dry-run   show the cells, and which of them are finished, and stop

Settings of the file that can be replaced here (values are YAML), and their defaults:
"""


def parse_ablate(arguments: Sequence[str]) -> tuple[Path | None, dict[str, Any], bool]:
    """(sweep file or None for help, replaced settings, whether it is a dry run); raises ValueError."""
    files, overrides, dry_run, rest = [], {}, False, list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            return None, {}, False
        if argument == "--dry-run":
            dry_run = True
        elif argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name not in Sweep.model_fields:
                raise ValueError(f"--{name}: a sweep has no such setting{nearest(name, list(Sweep.model_fields))}")
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ValueError(f"--{name} needs a value")
                value = rest.pop(0)
            try:
                overrides[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"--{name}: {value!r} is not a YAML value") from None
        else:
            files.append(argument)
    if len(files) != 1:
        raise ValueError(
            f"give exactly one sweep (a YAML file or a shipped one's name), got {files or 'none'}; see --help"
        )
    return find_sweep(files[0]), overrides, dry_run


def describe_settings() -> str:
    """Every setting of a sweep with its default and its meaning."""
    lines = []
    for name, info in Sweep.model_fields.items():
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        lines.append(f"  --{name} [{'runs/sweeps/NAME' if name == 'output' else default}]\n      {info.description}")
    return "\n".join(lines)


class Terminal:
    """Shows cells as they run: a bar with what is done, running and failed, and a line for each that ends."""

    def __init__(self, console: Console, total: int, finished: int) -> None:
        self.console, self.count = console, Counter(done=finished)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, completed=finished)
        self._show()

    def started(self, planned: "PlannedCell") -> None:
        self.count["running"] += 1
        self._show()

    def finished(self, planned: "PlannedCell", rows: Sequence[dict[str, Any]], seconds: float) -> None:
        self.count.update(done=1, running=-1)
        grades = [row["grade"] for row in rows if row["grade"] is not None]
        grade = f"{mean(grades):.1%}" if grades else "no grade"
        self._say(f"done    {planned.cell.name}: {grade} of {len(rows)} ({seconds:.0f} s)", "green")
        self.bar.advance(self.task)
        self._show()

    def failed(self, planned: "PlannedCell", failure: "Failure", again: bool) -> None:
        self.count["running"] -= 1
        self.count["failed"] += not again
        what = "trying again" if again else "given up"
        self._say(f"FAILED  {failure.name}: {failure.reason}; attempt {failure.attempts}, {what}; {failure.log}", "red")
        for line in failure.last_lines:
            self._say(f"        | {line}", "")
        self._show()

    def _say(self, text: str, style: str) -> None:
        self.console.print(Text(text, style), soft_wrap=True)

    def _show(self) -> None:
        count = self.count
        shown = f"{count['done']} done, {count['running']} running, {count['failed']} failed"
        self.bar.update(self.task, description=shown)


def say_controls(sweep: Sweep, console: Console) -> None:
    """Say loudly what a result would lack."""
    if not sweep.controls:
        console.print(
            Text("WARNING: controls are switched off: a number without its controls is no result", "bold yellow")
        )
    if sweep.misses_dense_control:
        console.print(
            Text(
                f"WARNING: no adapter is called {DENSE!r}: without one that was trained on the same data and steps "
                "without eviction, a gain may come from the data alone",
                "bold yellow",
            )
        )


def show_plan(plan: "Plan", finished: Sequence[str], console: Console) -> None:
    """Print the cells and which are finished."""
    table = Table(title=f"{len(plan.cells)} cells")
    for column in ("cell", "task", "model", "policy", "budget", "seed", "control", "status"):
        table.add_column(column)
    for planned in plan.cells:
        cell = planned.cell
        budget = "" if cell.config.budget is None else str(cell.config.budget)
        seed = "any" if cell.seed is None else str(cell.seed)
        values = [planned.id, cell.task.task, cell.model, cell.label, budget, seed, "yes" if cell.control else ""]
        table.add_row(*map(Text, [*values, "finished" if planned.id in finished else "to run"]))
    console.print(table)


def ablate(arguments: list[str]) -> None:
    """The command line of `vkvtrain ablate`; exits with 1 if a cell failed."""
    path, overrides, dry_run = parse_ablate(arguments)
    if path is None:
        print(_ABLATE + describe_settings())
        return
    sweep = load_sweep(path, overrides)
    from vkvtrain.ablation.plan import make_plan
    from vkvtrain.ablation.runner import Runner, gpus, slots

    check_directory(sweep.output, "output")
    shares = slots(sweep, gpus())
    console = Console()
    say_controls(sweep, console)
    plan = make_plan(sweep)
    store = Store(sweep.output)
    if dry_run:
        show_plan(plan, list(store.finished()), console)
        return
    with store.lock() as lock:
        done = store.finished()
        store.write_plan(plan.record())
        todo = [planned for planned in plan.cells if planned.id not in done]
        console.print(
            f"{len(plan.cells)} cells, {len(plan.cells) - len(todo)} finished; {sweep.output}", highlight=False
        )
        watcher = Terminal(console, len(plan.cells), len(plan.cells) - len(todo))
        try:
            with watcher.bar:
                failures = Runner(plan, store, shares, watcher, lock).run(todo)
        except KeyboardInterrupt:
            console.print("interrupted: finished cells are kept, the same command continues", highlight=False)
            sys.exit(INTERRUPTED)
    if failures:
        console.print(
            Text(f"{len(failures)} of {len(plan.cells)} cells failed; the same command tries them again", "red")
        )
        sys.exit(1)
    console.print(f"all cells finished; now: vkvtrain report {sweep.output}", highlight=False)


@dataclass
class Results:
    """List, filter and export the results of a sweep.

    The columns for --where are those of a sample: cell, model, policy, budget, window, sinks, protect_prompt, control,
    task, "limit", seed, doc_id, repeat, grade, tokens, final_length, evictions, peak_kv_bytes, looping_or_cut_off,
    answered, looping, metrics['name'], prompt, target, response.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP")]
    """Output directory of a sweep."""
    where: str | None = None
    """An SQL condition on samples, for example "budget = 64 AND policy = 'snapkv'"."""
    samples: bool = False
    """Samples instead of cells: one row for each problem and repeat."""
    every: bool = False
    """Cells of earlier settings too, which the sweep as it was last run does not have."""
    export: Path | None = None
    """File to write: .csv, .json or .parquet."""


def results(arguments: list[str]) -> None:
    """The command line of `vkvtrain results`."""
    given = tyro.cli(Results, args=arguments, prog="vkvtrain results", config=(tyro.conf.FlagCreatePairsOff,))
    if given.export is not None:
        check_file(given.export, "--export")
    store = Store.existing(given.directory)
    cells = None if given.every else [cell["cell"] for cell in store.plan()["cells"]]
    console = Console(width=max(Console().width, 150))
    table = (samples_table if given.samples else cells_table)(store, cells, given.where)
    if given.export is not None:
        export(table, given.export)
        console.print(f"{table.num_rows} rows written: {given.export}", highlight=False)
    else:
        hidden = ["window", "sinks", "protect_prompt", "control", "limit", "prompt", "target", "metrics"]
        shown = table.drop_columns([name for name in hidden if name in table.column_names])
        _print_table(shown, console)
    missing = [status for status in statuses(store) if status.state != "finished"]
    for status in missing:
        console.print(Text(f"MISSING {status.name}: {status.state}", "red"), soft_wrap=True)


@dataclass
class Report:
    """Write the report of a sweep: report.md with its figures, and report.html, one page that loads nothing."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP")]
    """Output directory of a sweep."""
    output: Path | None = None
    """Directory to write; by default `report` in the sweep's."""


def report(arguments: list[str]) -> None:
    """The command line of `vkvtrain report`."""
    from vkvtrain.ablation.report import write_report

    given = tyro.cli(Report, args=arguments, prog="vkvtrain report")
    output = given.output or given.directory / "report"
    store = Store.existing(given.directory)
    check_directory(output, "--output")
    written = write_report(store, output)
    print(f"written: {written[0]}, {written[1]}")


def _print_table(table: Any, console: Console, longest: int = 60) -> None:
    """Print an Arrow table, without empty columns and with long text cut."""
    shown = Table()
    names = [name for name in table.column_names if table[name].null_count < table.num_rows]
    for name in names:
        shown.add_column(Text(name.replace("_", " ")), no_wrap=name in ("cell", "model", "grade"))
    for row in table.to_pylist():
        cells = []
        for name in names:
            value = row[name]
            text = "" if value is None else f"{value:,.5g}" if isinstance(value, float) else str(value)
            cells.append(Text(text if len(text) <= longest else text[: longest - 3] + "..."))
        shown.add_row(*cells)
    console.print(shown)
