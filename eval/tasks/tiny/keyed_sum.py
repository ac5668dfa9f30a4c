"""Problems and grading of the task `tiny_keyed_sum`."""

from dataclasses import asdict
from typing import Any

import datasets

from vkvtrain.tiny import task

MEASURED = ("tokens", "final_length", "evictions", "peak_kv_bytes", "looping_or_cut_off")


def load(problems: int = 400, seed: int = 0, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The test split; `problems` and `seed` come from the task's metadata."""
    rows = [asdict(problem) for problem in task.problems("test", seed, problems)]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The sample's grades, and what its generation recorded (zero for a model that keeps no record)."""
    answer, passcode = task.grade(results[0], doc["answer"], doc["passcode"])
    record = getattr(results[0], "record", {})
    return {"exact_match": float(answer), "fact_match": float(passcode)} | {
        name: float(record.get(name, 0)) for name in MEASURED
    }
