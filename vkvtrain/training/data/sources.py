"""Where rows come from: JSONL and Parquet files, data sets on the Hub, tasks whose problems are generated.

A source is read twice where its rows must be counted, and never held in memory as a whole. Knows nothing of formats.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from vkvtrain import ledger
from vkvtrain.config import nearest
from vkvtrain.tiny import task
from vkvtrain.training.data.rows import Record
from vkvtrain.training.settings import DataSettings

KEYED_SUM = "tiny:keyed_sum"
GENERATED = (KEYED_SUM, ledger.SOURCE)
"""Sources that are generated instead of read; `ledger:` is followed by its dial, `ledger:people=4,events=6`."""
FILES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_records(settings: DataSettings) -> tuple[Iterator[Record], Iterator[Record]]:
    """(training, held-out) records of a source, as iterators.

    Raises:
        ValueError: a source that is missing or too small; on the way, a malformed row with its number.
    """
    source = settings.source
    if is_generated(source):
        if settings.rows is None:
            raise ValueError(f"data.rows is required for {source}: say how many problems to generate")
        return generate(source, "train", settings.rows), generate(source, "validation", settings.held_out)
    if source.startswith("tiny:"):
        raise ValueError(f"data.source: there is no {source!r}{nearest(source, list(GENERATED))}")
    path = Path(source)
    if is_file(source):
        return _parts(settings, *(_parquet(path) if path.suffix == ".parquet" else _jsonl(path)))
    if path.is_dir() or _HUB_NAME.fullmatch(source):
        return _parts(settings, *_data_set(settings))
    raise ValueError(
        f"data.source: {source!r} is no file ({', '.join(FILES)}), no data set on the Hub (org/name), no directory and "
        f"not generated ({', '.join(GENERATED)})"
    )


def is_file(source: str) -> bool:
    """Whether a source is a JSONL or Parquet file."""
    return Path(source).suffix in FILES or Path(source).is_file()


def is_generated(source: str) -> bool:
    """Whether a source is generated instead of read."""
    return source == KEYED_SUM or source.startswith(ledger.SOURCE)


def generate(source: str, split: task.Split, count: int) -> Iterator[Record]:
    """The first problems of a split of a generated source; the embedded task has seed 0, as everywhere.

    Raises:
        ValueError: a ledger's dial that does not hold, at once.
    """
    if source == KEYED_SUM:
        problems = task.problems(split, 0, count)
    else:
        problems = ledger.problems(split, count, ledger.Dial.parse(source))
    return (
        Record(asdict(problem) | {"completion": problem.response}, f"{source}, {split} problem {number + 1}", number)
        for number, problem in enumerate(problems)
    )


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records of a JSONL file, which are told by their line.

    Raises:
        ValueError: a missing file, or a row that is no JSON object, with its number.
    """
    _check_file(path)
    with path.open("rb") as lines:
        filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for index, (number, line) in enumerate(filled):
            where = f"{path}, row {number}"
            try:
                values = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where} must be an object with named columns, got {type(values).__name__}")
            yield Record(values, where, index)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"data.source: there is no file {str(path)!r} (generated data: {', '.join(GENERATED)}); give a JSONL or "
            "Parquet file"
        )


def _jsonl(path: Path) -> tuple[int, Iterable[Record]]:
    _check_file(path)
    with path.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    return count, read_jsonl(path)


def _parquet(path: Path) -> tuple[int, Iterable[Record]]:
    import pyarrow
    from pyarrow import parquet

    _check_file(path)
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.source: {str(path)!r} is not a Parquet file: {error}") from None

    def records() -> Iterator[Record]:
        rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
        for number, values in enumerate(rows):
            yield Record(values, f"{path}, row {number + 1}", number)

    return file.metadata.num_rows, records()


def _data_set(settings: DataSettings) -> tuple[int, Iterable[Record]]:
    """A split of a data set on the Hub, or of a directory that `datasets` loads."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found: Any = datasets.load_dataset(
            settings.source, settings.config, split=settings.split, revision=settings.revision
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a data set that is a script
        raise ValueError(
            f"data.source {settings.source!r} (config {settings.config}, split {settings.split!r}) cannot be loaded: "
            f"{' '.join(str(error).split())}"
        ) from None
    where = f"{settings.source}, split {settings.split}"
    return len(found), (Record(dict(row), f"{where}, row {i + 1}", i) for i, row in enumerate(found))


def _parts(settings: DataSettings, count: int, records: Iterable[Record]) -> tuple[Iterator[Record], Iterator[Record]]:
    """The first rows for training and the last ones held out; what is between is skipped."""
    wanted = count - settings.held_out if settings.rows is None else settings.rows
    if wanted < 1 or wanted + settings.held_out > count:
        raise ValueError(
            f"{settings.source} has {count} rows, too few for data.rows ({settings.rows or 'at least 1'}) and "
            f"data.held_out ({settings.held_out}): lower one of them"
        )
    rest = iter(records)
    return islice(rest, wanted), islice(rest, count - wanted - settings.held_out, None)
