"""Problems and grading of the task `tiny_keyed_sum`."""

from dataclasses import asdict
from typing import Any

import datasets

from vkvtrain.evaluation.tasks import Grades, measure
from vkvtrain.tiny import task


def load(problems: int = 400, data_seed: int = 0, **_: Any) -> dict[str, datasets.Dataset]:
    """The test split; `problems` and `data_seed` come from the task's metadata."""
    rows = [asdict(problem) for problem in task.problems("test", data_seed, problems)]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """The sample's grades, and what its generations recorded."""

    def grade(response: str) -> Grades:
        answer, passcode = task.grade(response, doc["answer"], doc["passcode"])
        return None, {"exact_match": answer, "fact_match": passcode}

    return measure(results[0], grade)
