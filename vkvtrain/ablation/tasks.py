"""What a sweep must know of lm-eval's tasks before they run: grade, filter, repeats, sampling, a fingerprint."""

import glob
import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from vkvtrain.ablation.grid import Sweep, TaskEntry
from vkvtrain.config import nearest

GRADES = ("exact_match", "acc")
"""Metrics that are taken for the grade where a sweep names none, in this order."""
NAMES_DATA = ("dataset_path", "dataset_kwargs")
"""Settings of a task that can name files."""
DATA_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class TaskInfo:
    """A task as a sweep runs it.

    Attributes:
        name: name in lm-eval.
        metric: the metric that is the grade.
        filter: the filter of the answers that are graded.
        repeats: responses to every problem.
        sampled: whether its generation samples.
        settings: generation settings in force; empty for a task that scores continuations.
        fingerprint: hash of the task's definition, of the source of its functions, and of local files that it names.
    """

    name: str
    metric: str
    filter: str
    repeats: int
    sampled: bool
    settings: dict[str, Any]
    fingerprint: str


def find_tasks(sweep: Sweep) -> dict[str, TaskInfo]:
    """The sweep's tasks by name; loads no data.

    Raises:
        ValueError: an include_path that is not there, or a task that is unknown, is a group, or has no single grade.
    """
    if not Path(sweep.include_path).is_dir():
        raise ValueError(f"include_path: there is no directory {sweep.include_path!r}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    index = TaskManager(include_path=sweep.include_path, include_defaults=False).task_index
    if any(entry.task not in index for entry in sweep.tasks):  # reading lm-eval's own takes seconds
        index = TaskManager(include_path=sweep.include_path).task_index
    found = {}
    for entry in sweep.tasks:
        if entry.task not in index:
            where = f"lm-eval's and those of {sweep.include_path}"
            hint = nearest(entry.task, list(index))
            hint = hint if "did you mean" in hint else ""
            raise ValueError(f"tasks: there is no task {entry.task!r} among {where}{hint}")
        known = index[entry.task]
        if known.kind.name not in ("TASK", "PY_TASK") or known.cfg is None:
            raise ValueError(f"tasks: {entry.task!r} is a {known.kind.name.lower()}; name the tasks themselves")
        found[entry.task] = task_info(entry, known.cfg)
    return found


def task_info(entry: TaskEntry, definition: Mapping[str, Any]) -> TaskInfo:
    """A task from its definition, a YAML file with its includes and unresolved functions."""
    metrics = [metric["metric"] for metric in definition.get("metric_list") or []]
    metric = entry.metric or next((name for name in GRADES if name in metrics), None)
    if metric is None or (metrics and metric not in metrics):
        raise ValueError(f"tasks: {entry.task} needs metric: one of {', '.join(metrics) or 'none'}")
    filters = [chosen["name"] for chosen in definition.get("filter_list") or [{"name": "none"}]]
    chosen = entry.filter or (filters[0] if len(filters) == 1 else None)
    if chosen is None or chosen not in filters:
        raise ValueError(f"tasks: {entry.task} needs filter: one of {', '.join(filters)}")
    settings: dict[str, Any] = {}
    if definition.get("output_type", "generate_until") == "generate_until":
        settings = {**(definition.get("generation_kwargs") or {}), **entry.gen_kwargs}
    elif entry.gen_kwargs:
        raise ValueError(f"tasks: {entry.task} generates nothing, so gen_kwargs mean nothing: remove them")
    return TaskInfo(
        name=entry.task,
        metric=metric,
        filter=chosen,
        repeats=entry.metadata.get("repeats", definition.get("repeats", 1)),
        sampled=bool(settings) and bool(normalize_gen_kwargs(settings).get("do_sample")),
        settings=settings,
        fingerprint=fingerprint(definition) + data_hash(entry),
    )


def fingerprint(definition: Mapping[str, Any]) -> str:
    """Hash of a definition: functions count by the source of their module and of those beside it, and local data files
    by their contents, not by where they lie."""

    def normal(value: Any, names_data: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {str(key): normal(inner, names_data or key in NAMES_DATA) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [normal(inner, names_data) for inner in value]
        if isinstance(value, str) and names_data and (files := data_files(value)):
            return f"{Path(value).name}:{_hash(files)}"
        if isinstance(value, str) and value.startswith("/") and "." in value:
            return function_source(value)
        return value

    return hashlib.blake2b(json.dumps(normal(definition), sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_files(value: str) -> list[Path]:
    """The local files of problems that a setting of a task names: a file, a directory, or a pattern."""
    path = Path(value).expanduser()
    named = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path)))
    return sorted(file for file in named if file.suffix in DATA_FILES and file.is_file())


def data_hash(entry: TaskEntry) -> str:
    """`:` and the hash of the problems in the local file or directory that the task's metadata name as `data`."""
    data = entry.metadata.get("data")
    if data is None:
        return ""
    path = Path(str(data)).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"tasks: {entry.task}: metadata.data: there is no file {str(data)!r}")
    return ":" + _hash(files)


def function_source(reference: str) -> str:
    """A `!function`, as lm-eval leaves it unresolved (`/directory/module.function`): its name and its module's hash."""
    path, _, function = reference.rpartition(".")
    source = Path(f"{path}.py")
    if not source.is_file():
        module = Path(path).name
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            return reference
        source = Path(spec.origin)
    beside = sorted(source.parent.glob("*.py"))  # what it may import
    return f"{source.stem}.{function}:{_hash(beside)}"


def _hash(files: Sequence[Path]) -> str:
    """Hash of the contents of files."""
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
