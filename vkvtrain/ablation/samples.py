"""From lm-eval's logged samples to rows of results: one for each problem and repeat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vkvtrain.ablation.tasks import TaskInfo
from vkvtrain.evaluation.records import records_of

MEASURED = ("tokens", "final_length", "evictions", "peak_kv_bytes", "looping_or_cut_off", "answered", "looping")
"""What a record may hold; absent is null."""


def read_rows(directory: Path, task: TaskInfo) -> list[dict[str, Any]]:
    """The rows of the newest samples of a task under lm-eval's output directory.

    Raises:
        ValueError: no samples, or samples without the task's grade.
    """
    files = sorted(directory.rglob(f"samples_{task.name}_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"lm-eval left no samples of {task.name}")
    with files[-1].open(encoding="utf-8") as lines:
        samples = [sample for sample in map(json.loads, lines) if sample.get("filter", "none") == task.filter]
    if not samples:
        raise ValueError(f"lm-eval left no samples of {task.name} with the filter {task.filter!r}")
    return [row for sample in samples for row in rows_of(sample, task)]


def rows_of(sample: dict[str, Any], task: TaskInfo) -> Iterator[dict[str, Any]]:
    """The rows of one logged sample.

    The grades of each repeat are in `responses` (`vkvtrain.evaluation.tasks.measure`); where a task has none, a metric
    is that of all repeats, or a list with one of each.
    """
    if task.metric not in sample:
        raise ValueError(f"the samples of {task.name} have no metric {task.metric!r} (they have {sample['metrics']})")
    records = records_of(sample)
    several = len(sample["arguments"]) > 1
    if several and records:  # a task that scores several continuations of one problem: it cost what the longest did
        names = {name for record in records for name in record if name in MEASURED}
        records = [{name: max(record[name] for record in records) for name in names}]
    responses = sample.get("responses", [])
    repeats = 1 if several else min(task.repeats, len(responses or records) or task.repeats)
    texts = sample["resps"][0]
    metrics = {name: sample[name] for name in sample["metrics"]}
    for repeat in range(repeats):
        record = records[repeat] if repeat < len(records) else {}
        own = {name: number(value, repeat) for name, value in metrics.items()}
        own |= {name: number(value, repeat) for name, value in responses[repeat].items()} if responses else {}
        grade = own[task.metric]
        if grade is None or not 0 <= grade <= 1:
            raise ValueError(f"{task.metric} of {task.name} is no grade from 0 to 1: {metrics[task.metric]!r}")
        answer = texts[repeat] if not several and repeat < len(texts) else sample["filtered_resps"]
        yield {
            "doc_id": sample["doc_id"],
            "repeat": repeat,
            "grade": grade,
            **{name: number(record.get(name, own.get(name)), 0) for name in MEASURED},
            "metrics": {name: value for name, value in own.items() if name not in MEASURED and value is not None},
            "prompt": str(sample["arguments"]["gen_args_0"]["arg_0"]),
            "target": str(sample["target"]),
            "response": str(record.get("text", answer if isinstance(answer, str) else json.dumps(answer))),
        }


def number(value: Any, repeat: int) -> float | None:
    """A metric's value for a repeat; None for what is no number."""
    if isinstance(value, list):
        value = value[repeat] if repeat < len(value) else None
    return float(value) if isinstance(value, bool | int | float) else None
