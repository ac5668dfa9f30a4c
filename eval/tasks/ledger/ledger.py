"""Problems and grading of the task `vkv_ledger`."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import datasets

from vkvtrain import ledger
from vkvtrain.evaluation.tasks import Grades, measure

AGES = range(1, 7)
"""Ages of a balance that are reported apart."""


def load(
    problems: int = 400, people: int = 4, events: int = 6, age: int | None = None, data_seed: int = 0, **_: Any
) -> dict[str, datasets.Dataset]:
    """The test split; the arguments come from the task's metadata, `people`, `events` and `age` are the dial."""
    dial = ledger.Dial(people=people, events=events, age=age, seed=data_seed)
    return {"test": datasets.Dataset.from_list([asdict(one) for one in ledger.problems("test", problems, dial)])}


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """The sample's grades, what its generations recorded, and its lines by the age of the balance that they need."""

    def grade(response: str) -> Grades:
        grades = ledger.grade(doc["prompt"], response, doc["response"])
        return None, {
            "exact_match": grades.answer,
            "trace_match": grades.trace,
            "lines_right": mean(line.right for line in grades.lines),
            "lines_that_follow": mean(line.follows for line in grades.lines),
        }

    lines = [line for text in results[0] for line in ledger.grade(doc["prompt"], text, doc["response"]).lines]
    by_age = {age: [line.follows for line in lines if line.age == age] for age in AGES}
    counts = {f"follow_at_age_{age}": {"lines": len(of), "follow": sum(of)} for age, of in by_age.items()}
    return {**measure(results[0], grade), **counts}


def share(samples: Sequence[dict[str, int]]) -> float:
    """Share of the lines of one age that follow, over all samples; 0 where there is no such line."""
    lines = sum(sample["lines"] for sample in samples)
    return sum(sample["follow"] for sample in samples) / lines if lines else 0.0
