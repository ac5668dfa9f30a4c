"""Families of reasoning-gym as lm-eval tasks: generated problems, graded by the family's own check."""

import json
from typing import Any

import datasets

from vkvtrain.evaluation.tasks import Grades, Problem, answer_text, measure


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("reasoning-gym is not installed: pip install 'vkvtrain[gym]'") from None
    return reasoning_gym


def load(
    family: str, problems: int = 100, data_seed: int = 0, difficulty: dict[str, Any] | None = None, **_: Any
) -> dict[str, datasets.Dataset]:
    """Problems of a family.

    Args:
        family: its name in reasoning-gym.
        problems: how many.
        data_seed: of all of them.
        difficulty: the family's own parameters.
    """
    library = _library()
    try:
        entries = library.create_dataset(family, size=problems, seed=data_seed, **(difficulty or {}))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym family {family!r} with {difficulty or {}}: {error}") from None
    check = library.get_score_answer_fn(family)
    rows = []
    for number, entry in enumerate(entries):
        as_graded = json.loads(json.dumps(entry))
        gold = entry["answer"]  # None in families whose check needs none
        if gold is not None and not _is_right(library, check, as_graded, f"<answer>{gold}</answer>"):
            raise ValueError(
                f"reasoning-gym family {family!r}, problem {number} of data_seed {data_seed}: the answer {gold!r} is "
                "not accepted by the check of the family itself"
            )
        rows.append({"question": entry["question"], "answer": gold, "family": family, "entry": json.dumps(entry)})
    return {"test": datasets.Dataset.from_list(rows)}


def grade(doc: Problem, results: list[Any]) -> dict[str, Any]:
    """Grades by the family's check of what stands between the last answer tags; a part of the credit is none."""
    library = _library()
    check, entry = library.get_score_answer_fn(doc["family"]), json.loads(doc["entry"])

    def grade_one(response: str) -> Grades:
        text = answer_text(response)
        return library.utils.extract_answer(text), {"exact_match": _is_right(library, check, entry, text)}

    return measure(results[0], grade_one)


def _is_right(library: Any, check: Any, entry: dict[str, Any], text: str) -> bool:
    answer = library.utils.extract_answer(text)
    try:
        return answer is not None and float(check(answer, entry)) >= 1
    except Exception:  # whatever a family's parser makes of a model's text, it is a wrong answer
        return False
