"""The reasoning benchmarks as lm-eval tasks: where problems come from, how often each is asked, what is measured.

The YAML files in `eval/tasks` name this module. Three keys of a task's metadata can be set on lm-eval's command line,
`--metadata '{"data": "problems.jsonl", "repeats": 4, "shuffle_seed": 1}'`; model arguments are metadata too, so none of
the keys is named like a model argument.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from jinja2 import Environment, meta
from lm_eval.api.task import ConfigurableTask

from vkvtrain.evaluation import grading
from vkvtrain.evaluation.thinking import final_answer

PREFIX = "vkv_"
"""Of the names of our tasks: lm-eval has an `aime25` and others of its own, graded otherwise."""
MEASURED = (
    "tokens",
    "final_length",
    "evictions",
    "peak_kv_bytes",
    "answered",
    "looping",
    "looping_or_cut_off",
)  # fmt: skip
"""What a task reports of a response beside its grade, from the response's record."""

GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))

Problem = dict[str, Any]
Grades = tuple[str | None, dict[str, float]]
"""The answer found in a response, and its grades by metric, each from 0 to 1."""
_TASK: Any = ConfigurableTask


class Problems(_TASK):
    """A task whose problems come from the Hub or, with `data` in its metadata, from a JSONL file.

    `data` is a file with the columns of the Hub's data set, or a directory that holds one for each task, `aime25.jsonl`
    for `vkv_aime25`. `repeats` asks each problem that many times, and all of its responses are graded.

    Raises:
        ValueError: problems that cannot be loaded, or without the columns that the task's texts need.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.metadata = config.get("metadata") or {}
        repeats = self.metadata.get("repeats", config.get("repeats", 1))
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"{config['task']}: repeats must be a positive whole number, got {repeats!r}")
        # lm-eval's own default keeps the first repeat only
        keep_all = [{"name": "none", "filter": [{"function": "take_first_k", "k": repeats}]}]
        given = {name: value for name, value in config.items() if name != "class"}
        super().__init__(config={**given, "repeats": repeats, "filter_list": keep_all})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Load the problems and check their columns; generated ones are made by the task's `custom_dataset`."""
        config: Any = self.config
        if config.custom_dataset is not None:
            super().download(dataset_kwargs)
            return
        split, data = config.test_split, self.metadata.get("data")
        if data is None:
            rows = from_hub(config, dataset_kwargs)
            places = [f"{config.dataset_path}, row {number}" for number in range(1, len(rows) + 1)]
        else:
            rows, places = from_file(local_file(str(data), config.task))
        self.dataset = {split: self.prepared(rows, places)}
        known = set(self.dataset[split].column_names)
        for template in (config.doc_to_text, config.doc_to_target):
            for column in meta.find_undeclared_variables(Environment().parse(template)) - known:
                where = config.dataset_path if data is None else data
                raise ValueError(f"{config.task}: {where} has no column {column!r} (it has {', '.join(sorted(known))})")
        if (gold := GOLDS.get(config.process_results)) is not None:
            for place, answer in zip(places, self.dataset[split]["answer"], strict=True):
                read_gold(gold, answer, place)

    def prepared(self, rows: datasets.Dataset, places: Sequence[str]) -> datasets.Dataset:
        """The problems as the task's texts expect them; `places` names each row for an error."""
        return rows


class MultipleChoice(Problems):
    """GPQA: four options in an order drawn from (`shuffle_seed`, the question); the answer is a letter."""

    def prepared(self, rows: datasets.Dataset, places: Sequence[str]) -> datasets.Dataset:
        seed = self.metadata.get("shuffle_seed", 0)
        problems: list[Problem] = rows.to_list()
        for row, place in zip(problems, places, strict=True):
            for column in GPQA_COLUMNS:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(f"{place}: {column!r} must be text, got {row.get(column)!r}")
        return datasets.Dataset.from_list([shuffled(row, seed) for row in problems])


class FinalNumber(Problems):
    """GSM8K: the answer is the integer that follows `####` in the worked solution."""

    def prepared(self, rows: datasets.Dataset, places: Sequence[str]) -> datasets.Dataset:
        if "answer" not in rows.column_names:
            return rows
        golds = [
            read_gold(grading.integer_gold, str(answer).rpartition("####")[2].strip(), place)
            for place, answer in zip(places, rows["answer"], strict=True)
        ]
        return rows.remove_columns("answer").add_column("answer", golds)


def read_gold(read: Callable[[Any], str], gold: Any, place: str) -> str:
    """A problem's answer as a reader of `grading` has it.

    Raises:
        ValueError: one that cannot be read, with the place of its row.
    """
    try:
        return read(gold)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def shuffled(row: Problem, seed: int) -> Problem:
    """A row of GPQA with its options in a random order that depends on the seed and the question alone."""
    right = row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    order = random.Random(f"{seed}/{row['Question']}").sample(range(4), 4)
    return {
        "question": row["Question"].strip(),
        "options": "\n".join(f"{letter}) {options[place]}" for letter, place in zip("ABCD", order, strict=True)),
        "answer": "ABCD"[order.index(0)],
    }


def from_hub(config: Any, dataset_kwargs: dict[str, Any] | None) -> datasets.Dataset:
    """The task's split from the Hub, or from the Hub's cache."""
    try:
        loaded: Any = datasets.load_dataset(
            config.dataset_path, config.dataset_name, split=config.test_split, **(dataset_kwargs or {})
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{config.task}: {config.dataset_path} could not be loaded from the Hub ({' '.join(str(error).split())}); "
            f"""for a local file use --metadata '{{"data": "{config.task.removeprefix(PREFIX)}.jsonl"}}'"""
        ) from None
    return loaded


def local_file(data: str, task: str) -> Path:
    """The file that `data` names for a task."""
    path = Path(data).expanduser()
    if path.is_dir():
        path /= f"{task.removeprefix(PREFIX)}.jsonl"
    if not path.is_file():
        raise ValueError(f"{task}: data={data}: there is no file {path}")
    return path


def from_file(path: Path) -> tuple[datasets.Dataset, list[str]]:
    """The rows of a JSONL file, and the place of each: file and line."""
    rows, places = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be an object, got {type(row).__name__}")
            places.append(f"{path}, line {number}")
            if "answer" in row:
                row["answer"] = read_gold(written, row["answer"], places[-1])
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no problems")
    try:
        return datasets.Dataset.from_list(rows), places
    except (ValueError, TypeError) as error:  # pyarrow's errors among them
        raise ValueError(f"{path}: every column must hold one type ({error})") from None


def written(answer: Any) -> str:
    """An answer of a JSONL file as text: in one column, some are numbers and others are not."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise ValueError(f"'answer' must be text or a number, got {json.dumps(answer)}")
    if isinstance(answer, float) and not abs(answer) < 2**53:
        raise ValueError(f"'answer' is too large for a floating-point number ({answer}): write it as text")
    return str(answer)


def answer_text(response: str) -> str:
    """A response after its thinking: as its record has it, which knows the prompt, or by its tags."""
    return getattr(response, "record", {}).get("answer", final_answer(response))


def measure(responses: Sequence[str], grade: Callable[[str], Grades]) -> dict[str, Any]:
    """A sample's metrics: means over its repeats, and `responses` with the values of each of them.

    Args:
        responses: one for each repeat; a model that keeps no record is graded and not measured.
        grade: from a response to the answer found in it, and its grades by name.
    """
    rows: list[dict[str, Any]] = []
    for response in responses:
        answer, grades = grade(response)
        record = getattr(response, "record", {})
        measured = {metric: record[metric] for metric in MEASURED if metric in record}
        rows.append({"answer": answer} | {name: float(value) for name, value in {**grades, **measured}.items()})
    means = {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0] if metric != "answer"}
    return {**means, "responses": rows}


def count_responses(samples: Sequence[Sequence[Any]]) -> int:
    """Aggregate of `responses`: how many were graded."""
    return sum(len(responses) for responses in samples)


def grade_integer(doc: Problem, results: list[Any]) -> dict[str, Any]:
    """Grades of AIME and AMC: the boxed integer, exactly."""
    return measure(results[0], _by_box(grading.same_integer, grading.integer_gold(doc["answer"])))


def grade_expression(doc: Problem, results: list[Any]) -> dict[str, Any]:
    """Grades of MATH-500 and HMMT: the boxed answer, as mathematics."""
    return measure(results[0], _by_box(grading.same_expression, doc["answer"]))


def grade_letter(doc: Problem, results: list[Any]) -> dict[str, Any]:
    """Grades of GPQA: the boxed letter."""
    return measure(results[0], _by_box(grading.same_letter, doc["answer"]))


def grade_text(doc: Problem, results: list[Any]) -> dict[str, Any]:
    """Grades of the passcode probe: the boxed text, character by character."""
    return measure(results[0], _by_box(grading.same_text, doc["answer"]))


GOLDS: dict[Any, Callable[[Any], str]] = {
    grade_integer: grading.integer_gold,
    grade_expression: grading.expression_gold,
    grade_letter: grading.letter_gold,
    grade_text: grading.text_gold,
}
"""What reads the answers of a task's problems when they are loaded, by what grades its responses."""


def _by_box(same: Callable[[str | None, str], bool], gold: str) -> Callable[[str], Grades]:
    def grade(response: str) -> Grades:
        answer = grading.last_boxed(answer_text(response))
        return answer, {"exact_match": same(answer, gold)}

    return grade
