"""The results of a sweep: a Parquet file for each finished cell, a row for each problem and repeat; DuckDB reads them.

A file appears by being renamed, complete, so any number of writers cannot corrupt anything. The directory:

    plan.json        the sweep as it was last run: its settings, versions and cells
    cells/ID.parquet finished cells, those of earlier settings too
    work/ID/         a cell's eviction setting, log, and lm-eval's own output; failure.json if it failed
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from vkvtrain.locking import locked

ABOUT = b"vkvtrain"
"""Key of a file's own description (settings, versions, machine, seconds) in its Parquet metadata, JSON."""
SETTINGS = pa.schema(
    [
        pa.field("cell", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("budget", pa.int64()),
        pa.field("window", pa.int64()),
        pa.field("sinks", pa.int64()),
        pa.field("protect_prompt", pa.bool_()),
        pa.field("control", pa.bool_(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("limit", pa.int64()),
        pa.field("seed", pa.int64()),
    ]
)
MEASURES = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("repeat", pa.int64(), nullable=False),
        pa.field("grade", pa.float64()),
        pa.field("tokens", pa.float64()),
        pa.field("final_length", pa.float64()),
        pa.field("evictions", pa.float64()),
        pa.field("peak_kv_bytes", pa.float64()),
        pa.field("looping_or_cut_off", pa.float64()),
        pa.field("answered", pa.float64()),
        pa.field("looping", pa.float64()),
        pa.field("metrics", pa.map_(pa.string(), pa.float64())),
        pa.field("prompt", pa.string()),
        pa.field("target", pa.string()),
        pa.field("response", pa.string()),
    ]
)
SCHEMA = pa.schema([*SETTINGS, *MEASURES])


class Store:
    """A directory of results.

    Args:
        directory: the sweep's output.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cells = directory / "cells"
        self.work = directory / "work"

    @classmethod
    def existing(cls, directory: Path) -> "Store":
        """The store of a directory that holds one; raises ValueError if it does not."""
        if not (directory / "plan.json").is_file():
            raise ValueError(f"{str(directory)!r} holds no sweep: give the output of `vkvtrain ablate`")
        return cls(directory)

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Keep other sweeps out of the directory; the descriptor, given to cells, holds while one of them lives.

        Raises:
            ValueError: another sweep runs there.
        """
        held_by = "another sweep, or by a cell that a killed one left behind: wait for it, or end it"
        with locked(self.directory, held_by) as descriptor:
            yield descriptor

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write `plan.json`."""
        _replace(self.directory / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())

    def plan(self) -> dict[str, Any]:
        """The plan of the last run."""
        return json.loads((self.directory / "plan.json").read_bytes())

    def write(self, rows: Sequence[dict[str, Any]], settings: dict[str, Any], about: dict[str, Any]) -> Path:
        """Write a finished cell.

        Args:
            rows: what `MEASURES` names, of every problem and repeat.
            settings: what `SETTINGS` names.
            about: what else is known of the cell, JSON.
        """
        columns: dict[str, Any] = {name: [settings[name]] * len(rows) for name in SETTINGS.names}
        columns |= {name: [row[name] for row in rows] for name in MEASURES.names}
        columns["metrics"] = [list(row["metrics"].items()) for row in rows]
        schema = SCHEMA.with_metadata({ABOUT: json.dumps(about).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
        return _replace(self.cells / f"{settings['cell']}.parquet", sink.getvalue().to_pybytes())

    def finished(self) -> dict[str, Path]:
        """Files of finished cells by id.

        Raises:
            ValueError: a file that is no Parquet, which only something else than a sweep can have left.
        """
        found = {path.stem: path for path in sorted(self.cells.glob("*.parquet"))}
        for path in found.values():
            try:
                pq.read_metadata(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it, and the cell runs again") from None
        return found

    def about(self, cell: str) -> dict[str, Any]:
        """What a finished cell's file says of itself."""
        metadata = pq.read_schema(self.cells / f"{cell}.parquet").metadata
        return json.loads(metadata[ABOUT])

    def failures(self) -> dict[str, dict[str, Any]]:
        """What is known of the cells whose last attempt failed, by id."""
        found = {path.parent.name: path for path in self.work.glob("*/failure.json")}
        return {cell: json.loads(path.read_bytes()) for cell, path in sorted(found.items())}

    def connect(self, cells: Sequence[str] | None = None) -> duckdb.DuckDBPyConnection:
        """An in-memory database with the view `samples` of the finished cells, or of some of them.

        It can read the result files and nothing else, and its configuration is locked, so that a condition given by a
        user can look at the samples and no further.
        """
        finished = self.finished()
        files = [str(path) for cell, path in finished.items() if cells is None or cell in cells]
        connection = duckdb.connect(":memory:")
        directory = str(self.cells.resolve())
        connection.execute(f"SET allowed_directories = ['{_quoted(directory)}']")
        connection.execute("SET enable_external_access = false")
        if files:
            listed = ", ".join(f"'{_quoted(str(Path(file).resolve()))}'" for file in files)
            connection.execute(f"CREATE VIEW samples AS SELECT * FROM read_parquet([{listed}])")
        else:
            connection.register("nothing", SCHEMA.empty_table())
            connection.execute("CREATE TABLE samples AS SELECT * FROM nothing")
        connection.execute("SET lock_configuration = true")
        return connection


def _quoted(text: str) -> str:
    """Text inside an SQL string."""
    return text.replace("'", "''")


def _replace(path: Path, content: bytes) -> Path:
    """Write a file that appears at once and complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path
