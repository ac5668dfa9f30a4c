"""What was measured of a model and of its controls, as an evaluation wrote it. Knows nothing of cards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

RESULTS = "results.json"
Control = Literal["base", "dense"]
CONTROLS: dict[str, Control] = {"base": "base", "dense": "dense", "dense_lora": "dense"}
"""What models of an evaluation are by their names: the untrained model, and the adapter that was trained on the same
data and steps without eviction. Any other name is no control, unless the row's `control` says so."""
_CONTROL_NAMES: dict[Control, str] = {"base": "the base model", "dense": "a dense-trained adapter on the same data"}


class Interval(BaseModel):
    """A share of the problems, with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    value: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class MeasuredRow(BaseModel):
    """One model under one cache on one task; what was not recorded is None.

    Further columns of a results file are left out.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    task: str | None = None
    metric: str = "exact_match"
    """What `exact_match` is called by the task."""
    cache: str = Field(pattern="^(full|evicted)$")
    policy: str
    budget: int | None = None
    compression: float | None = None
    """Mean final length / budget."""
    n: int = Field(ge=1)
    """Problems."""
    seed: int | None = None
    adapter: str | None = None
    """Hash of the adapter's files that were measured, see `vkvtrain.identity.adapter_hash`."""
    control: Control | None = None
    """Which control the model is; by default by its name, see `CONTROLS`."""
    exact_match: Interval
    fact_match: float | None = None
    gap_closed: Interval | None = None
    """Share of the untrained model's loss to eviction that is won back."""
    tokens: float | None = None
    looping_or_cut_off: float | None = None
    peak_kv_bytes: float | None = None
    """Per sequence."""
    evictions: float | None = None

    @property
    def setting(self) -> str:
        """The cache in words."""
        return "full cache" if self.cache == "full" else f"evicted by {self.policy} at budget {self.budget}"

    @property
    def measured(self) -> tuple[Any, ...]:
        """What a model and its control must have in common."""
        return self.task, self.metric, self.cache, self.policy, self.budget, self.n

    @property
    def role(self) -> Control | None:
        """Which control this row measured, None if it is none."""
        return self.control or CONTROLS.get(self.model)

    @property
    def task_name(self) -> str:
        return self.task or "unnamed task"


@dataclass(frozen=True)
class MeasuredDifference:
    """The model to publish less one of its controls, on the same problems."""

    task: str
    cache: str
    kind: str
    """What it is compared with."""
    problems: int
    difference: Interval
    p: float
    """Adjusted for the number of comparisons."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and which of its models is the one to publish."""

    rows: Sequence[MeasuredRow]
    model: str
    comparisons: Sequence[MeasuredDifference] = ()
    unfinished: Sequence[str] = ()
    """What was planned and has not been measured."""

    @property
    def own(self) -> list[MeasuredRow]:
        """The rows of the model itself; the others are its controls."""
        return [row for row in self.rows if row.model == self.model]

    def missing_controls(self) -> list[str]:
        """The comparisons that a claim about eviction needs and that were not measured.

        A control is the same task, metric and number of problems, under the same cache.
        """
        wanted: list[tuple[Control, MeasuredRow]] = []
        for row in self.own:
            if row.cache == "evicted":
                full = row.model_copy(update={"cache": "full", "policy": "full", "budget": None})
                wanted.extend([("base", full), ("base", row), ("dense", row)])
        missing = [
            f"{_CONTROL_NAMES[control]} {'with the full cache' if row.cache == 'full' else row.setting}"
            for control, row in wanted
            if not any(one.role == control and one.measured == row.measured for one in self.rows)
        ]
        return list(dict.fromkeys(missing))


def find_results(run: Path) -> Path | None:
    """The results that `vkvtrain` commands leave in a run's directory or beside it."""
    return next((path for path in (run / RESULTS, run.parent / RESULTS) if path.is_file()), None)


def read_results(path: Path, model: str) -> Evaluation:
    """The evaluation in a results file.

    Args:
        path: a JSON list of rows, as `make demo` writes it.
        model: what the rows of the model to publish call it.

    Raises:
        ValueError: no such file, rows that are none, no row of the model, or none of it under eviction.
    """
    try:
        rows = TypeAdapter(list[MeasuredRow]).validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"--results {str(path)!r} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--results {str(path)!r} is not valid JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        number = f"row {int(first['loc'][0]) + 1}: " if first["loc"] else ""
        raise ValueError(f"--results {str(path)!r}: {number}{place}: {first['msg']}".replace(": : ", ": ")) from None
    return checked(Evaluation(rows, model), path)


def check_weights(evaluation: Evaluation, path: Path, adapter: str) -> bool:
    """Whether the rows say that they measured the adapter; raises ValueError where they measured other weights."""
    measured = {row.adapter for row in evaluation.own}
    if measured - {None, adapter}:
        raise ValueError(
            f"--results {str(path)!r} measured other weights than those that the run holds now: evaluate it again"
        )
    return None not in measured


def checked(evaluation: Evaluation, path: Path) -> Evaluation:
    """Raise ValueError unless the model was measured under eviction."""
    known = sorted({row.model for row in evaluation.rows})
    if not evaluation.own:
        raise ValueError(
            f"--results {str(path)!r} has no row of model {evaluation.model!r}: say which one this run is with "
            f"--results-model (there are: {', '.join(known) or 'none'})"
        )
    if all(row.cache == "full" for row in evaluation.own):
        raise ValueError(
            f"--results {str(path)!r} measured {evaluation.model!r} with the full cache only: evaluate it under "
            "eviction too, or pass --not-evaluated"
        )
    return evaluation
