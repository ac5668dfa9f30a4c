"""From lm-eval's logged samples to rows of results: one for each problem and repeat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vkvtrain.ablation.tasks import TaskInfo

RECORD = "vkvtrain"
"""Key of the records, a list with one of each repeat, in the arguments of a logged sample."""
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

    A metric is a number, which then is that of every repeat (their mean, or there is one), or a list with one of each.
    """
    if task.metric not in sample:
        raise ValueError(f"the samples of {task.name} have no metric {task.metric!r} (they have {sample['metrics']})")
    requests = list(sample["arguments"].values())
    records = [record for request in requests for record in records_of(request)]
    if len(requests) > 1:  # a task that scores several continuations of one problem: it cost what the longest did
        names = {name for record in records for name in record if name in MEASURED}
        records = [{name: max(record[name] for record in records) for name in names}] if records else []
    repeats = max(1, min(task.repeats, len(records)) if records else task.repeats)
    texts = sample["resps"][0]
    metrics = {name: sample[name] for name in sample["metrics"]}
    for repeat in range(repeats):
        record = records[repeat] if repeat < len(records) else {}
        own = {name: number(value, repeat) for name, value in metrics.items()}
        if own[task.metric] is None:
            raise ValueError(f"{task.metric} of {task.name} is no number: {metrics[task.metric]!r}")
        answer = texts[repeat] if len(requests) == 1 and repeat < len(texts) else sample["filtered_resps"]
        yield {
            "doc_id": sample["doc_id"],
            "repeat": repeat,
            "grade": own[task.metric],
            **{name: number(record.get(name, own.get(name)), 0) for name in MEASURED},
            "metrics": {name: value for name, value in own.items() if name not in MEASURED and value is not None},
            "prompt": str(next(iter(requests[0].values()))),
            "target": str(sample["target"]),
            "response": str(record.get("text", answer if isinstance(answer, str) else json.dumps(answer))),
        }


def records_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The records among one request's arguments."""
    return [record for part in request.values() if isinstance(part, dict) for record in part.get(RECORD, [])]


def number(value: Any, repeat: int) -> float | None:
    """A metric's value for a repeat; None for what is no number."""
    if isinstance(value, list):
        value = value[repeat] if repeat < len(value) else None
    return float(value) if isinstance(value, bool | int | float) else None
