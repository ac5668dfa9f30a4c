"""The sweep: a YAML file that spans a grid of models, policies, budgets, tasks and seeds, validated before it runs.

Knows settings and what they span; knows nothing of processes, files of results or statistics.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vkvtrain.config import EvictionConfig, Settings, nearest
from vkvtrain.shipped import TASKS, tasks_directory
from vkvtrain.yaml_files import read_mapping

BASE, DENSE = "base", "dense"
"""Names of the untrained model and of the adapter that was trained on the same data and steps without eviction."""
FULL = "full"


class ModelEntry(Settings):
    """An adapter, or a model with weights of its own."""

    peft: str | None = None
    """Directory or Hub name of a PEFT adapter."""
    pretrained: str | None = None
    """Directory or Hub name of full weights (a merged adapter); by default the sweep's model."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the Hub."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.peft is None) == (self.pretrained is None):
            raise ValueError("give either peft (an adapter) or pretrained (full weights)")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("revision goes with pretrained; an adapter's own revision is a downloaded directory")
        return self


class PolicyEntry(Settings):
    """A policy with its protections."""

    policy: str
    """Name of the policy."""
    protect_prompt: bool = False
    """Keep the prompt."""
    protected_fraction: float | None = None
    """Share of the budget that is protected as sinks or large values; None is the policy's own."""
    measure: Literal["range", "variance", "l2", "random"] = "range"
    """What makes a value large."""
    retention: Literal["sampled", "top_k"] | None = None
    """Whether the unprotected are sampled in proportion to their scores or the highest kept; None: the policy's own."""
    policy_args: dict[str, Any] = Field(default_factory=dict)
    """The policy's own parameters."""
    sinks: int | None = None
    """First positions that are always kept; by default the sweep's."""
    smooth: bool = True
    """Average-pool the window attention over five neighbours."""
    skip_layers: tuple[int, ...] = ()
    """Layers that keep everything."""

    @property
    def label(self) -> str:
        """The policy and what differs from its defaults, in one line."""
        given = [f"{name}={value}" for name, value in sorted(self.policy_args.items())]
        given += [
            f"{name}={value}"
            for name, value in (("protected", self.protected_fraction), ("sinks", self.sinks))
            if value is not None
        ]
        given += [] if self.measure == "range" else [f"by {self.measure}"]
        given += [] if self.retention is None else [self.retention]
        given += [] if self.smooth else ["not smoothed"]
        given += [f"layers {','.join(map(str, self.skip_layers))} kept"] if self.skip_layers else []
        return self.policy + " + prompt" * self.protect_prompt + (f" ({', '.join(given)})" if given else "")


class TaskEntry(Settings):
    """A task of lm-eval."""

    task: str
    """Name of the task, among lm-eval's own and those of `include_path`."""
    limit: int | None = Field(default=None, ge=1)
    """First problems only; by default the sweep's."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Generation settings instead of the task's own."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before the question, instead of the task's own number."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """lm-eval's `--metadata`, which a task may read."""
    metric: str | None = None
    """The metric that is the grade; by default exact_match or acc."""
    filter: str | None = None
    """The filter of the answers; needed where the task has several."""


def _entries(value: Any, schema: type[Settings], name: str) -> Any:
    """A list whose items are a name or a mapping, as settings; their errors then name their own fields."""
    items = value if isinstance(value, list) else [value]
    return [
        schema(**{name: item}) if isinstance(item, str) else schema(**item) if isinstance(item, Mapping) else item
        for item in items
    ]


class Sweep(Settings):
    """Everything that decides an ablation.

    Raises:
        ValueError: one sentence that names the setting and the fix.
    """

    model: str
    """Directory or Hub name of the untrained model (`base` in the tables); `tiny` is the embedded one."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    adapters: dict[str, ModelEntry] = Field(default_factory=dict)
    """Trained models by name: the directory of an adapter, or a mapping. `dense` is the control without eviction."""
    policies: list[PolicyEntry] = Field(min_length=1)
    """Policies: a name, or a mapping with protections (`{policy: random, protect_prompt: true}`)."""
    budgets: list[int] = Field(min_length=1)
    """Entries kept after an event."""
    window: int = 64
    """Newest entries, always kept; tokens between two events."""
    sinks: int = 4
    """First positions, always kept."""
    tasks: list[TaskEntry] = Field(min_length=1)
    """Tasks of lm-eval: a name, or a mapping."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of the policy's noise and of sampling; what has neither runs once."""
    controls: bool = True
    """Add the full cache, the untrained model, and random eviction with a protected prompt."""
    limit: int | None = Field(default=None, ge=1)
    """First problems of every task only."""
    include_path: str = TASKS
    """Directory with task files beside lm-eval's own; `eval/tasks` is found wherever the package is installed."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the lm-eval model, for example `{dtype: bfloat16, think_end_token: </think>}`."""
    apply_chat_template: bool = False
    """Put every prompt into the tokenizer's chat template."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences generated at once by one process."""
    device: str | None = None
    """Device, for example `cpu`; by default what is there."""
    processes: int | None = Field(default=None, ge=1)
    """Processes of one cell, which share its problems; by default one for each of its GPUs."""
    parallel_cells: int = Field(default=1, ge=1)
    """Cells that run at once; they share the machine's GPUs or cores."""
    retries: int = Field(default=1, ge=0)
    """Further attempts at a cell that failed."""
    output: Path
    """Directory to write."""

    @field_validator("include_path")
    @classmethod
    def _tasks_directory(cls, value: str) -> str:
        return tasks_directory(value)

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for name in value:
            if name == BASE:
                raise ValueError(f"{BASE!r} is the untrained model: call the adapter something else")
        return {
            name: ModelEntry(peft=entry) if isinstance(entry, str) else ModelEntry(**entry)
            if isinstance(entry, Mapping) else entry
            for name, entry in value.items()
        }  # fmt: skip

    @field_validator("policies", mode="before")
    @classmethod
    def _policies(cls, value: Any) -> Any:
        return _entries(value, PolicyEntry, "policy")

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        return _entries(value, TaskEntry, "task")

    @field_validator("budgets", "seeds", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("budgets", "seeds", "policies", "tasks"):
            values = getattr(self, name)
            doubles = [value for place, value in enumerate(values) if value in values[:place]]
            if doubles:
                raise ValueError(f"{name}: {getattr(doubles[0], 'label', doubles[0])!r} is there twice")
        names = [entry.task for entry in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("tasks: the same task is there twice; other settings of a task belong into another sweep")
        own = {"pretrained", "peft", "revision", "eviction_config", *EvictionConfig.model_fields}
        if taken := own & set(self.model_args):
            raise ValueError(f"model_args: {sorted(taken)[0]} is a setting of the sweep itself, or of its policies")
        if all(entry.policy == FULL for entry in self.policies) and not self.adapters:
            raise ValueError("policies: 'full' alone is no ablation; name at least one that evicts")
        for _ in self.cells():
            pass
        return self

    def limit_of(self, task: TaskEntry) -> int | None:
        """Problems of a task, or None for all of them."""
        return self.limit if task.limit is None else task.limit

    def config(self, entry: PolicyEntry, budget: int | None, seed: int) -> EvictionConfig:
        """The eviction setting of a cell; raises ValueError with the policy's name where it does not hold."""
        if entry.policy == FULL:
            return EvictionConfig(policy=FULL, seed=seed)
        sinks = self.sinks if entry.sinks is None else entry.sinks
        given = entry.model_dump(exclude={"sinks"})
        try:
            return EvictionConfig(**given, sinks=sinks, budget=budget, window=self.window, seed=seed)
        except ValueError as error:
            where = f"policy {entry.label!r}" + ("" if budget is None else f" at budget {budget}")
            raise ValueError(f"{where}: {error}") from None

    def spans(self) -> Iterator[tuple[str, PolicyEntry, int | None, bool]]:
        """(model, policy, budget, whether it is a control), every combination once; None is no budget."""
        evicting = [entry for entry in self.policies if entry.policy != FULL]
        full = PolicyEntry(policy=FULL)
        trained = list(self.adapters)
        models = [BASE, *trained] if self.controls or not trained else trained
        if self.controls or len(evicting) < len(self.policies):
            yield from ((model, full, None, True) for model in models)
        for model, entry, budget in itertools.product(models, evicting, self.budgets):
            yield model, entry, budget, model in (BASE, DENSE) and bool(trained)
        bar = PolicyEntry(policy="random", protect_prompt=True)
        if self.controls and bar not in evicting:
            yield from ((BASE, bar, budget, True) for budget in self.budgets)

    def cells(self) -> Iterator["Cell"]:
        """Every cell of the grid in the order in which they run; one that uses no seed is there with each of them."""
        for task, seed, (model, entry, budget, control) in itertools.product(self.tasks, self.seeds, self.spans()):
            yield Cell(model, entry.label, self.config(entry, budget, seed), task, seed, control)

    @property
    def misses_dense_control(self) -> bool:
        """Whether trained adapters stand without the control that was trained on the same data without eviction."""
        return bool(self.adapters) and DENSE not in self.adapters


@dataclass(frozen=True)
class Cell:
    """One evaluation: a model under an eviction setting on a task.

    Attributes:
        model: `base`, or the name of an adapter.
        label: the policy with its protections, as tables show it.
        config: the eviction setting, its seed included.
        task: the task.
        seed: the seed, or None where nothing is random and the cell stands for every seed.
        control: whether it is there to be compared with.
    """

    model: str
    label: str
    config: EvictionConfig
    task: TaskEntry
    seed: int | None
    control: bool

    @property
    def name(self) -> str:
        """The cell in one line."""
        budget = "" if self.config.budget is None else f" {self.config.budget}"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.task.task}: {self.model}, {self.label}{budget}{seed}"


def without_repeats(cells: Sequence[Cell], sampled: Mapping[str, bool]) -> list[Cell]:
    """The cells to run: one for all seeds where neither the policy nor the task's generation draws anything.

    Args:
        cells: the grid.
        sampled: for every task, whether its generation samples.
    """
    kept: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        if not (cell.config.draws or sampled[cell.task.task]):
            cell = replace(cell, seed=None, config=cell.config.model_copy(update={"seed": 0}))
        kept.setdefault((cell.model, cell.label, cell.config.budget, cell.task.task, cell.seed), cell)
    return list(kept.values())


def sweep_values(path: Path) -> dict[str, Any]:
    """A sweep file as values; raises ValueError for a missing file or one that is no YAML mapping."""
    if not path.is_file():
        raise ValueError(f"there is no sweep {str(path)!r}: give a YAML file, such as eval/sweeps/quickstart.yaml")
    return read_mapping(path)


def load_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """The validated sweep of a file, with settings replaced by `overrides`.

    Raises:
        ValueError: one sentence that names the file, the setting and the fix.
    """
    values = sweep_values(path)
    known = list(Sweep.model_fields)
    for name in overrides or {}:
        if name not in known:
            raise ValueError(f"--{name}: a sweep has no such setting{nearest(name, known)}")
    try:
        return Sweep(**{"output": f"runs/sweeps/{path.stem}", **values, **(overrides or {})})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
