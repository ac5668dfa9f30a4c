"""Tables of a store's results, filtered by a condition, and their export."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vkvtrain.ablation.store import SETTINGS, Store

FORMATS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Status:
    """What became of a cell of the plan: `finished`, `not run`, or why it failed."""

    cell: str
    name: str
    state: str
    log: str | None = None


def statuses(store: Store) -> list[Status]:
    """The state of every cell of the plan, in its order."""
    finished, failures = store.finished(), store.failures()
    found = []
    for cell in store.plan()["cells"]:
        failure = failures.get(cell["cell"])
        if cell["cell"] in finished:
            found.append(Status(cell["cell"], cell["name"], "finished"))
        elif failure is None:
            found.append(Status(cell["cell"], cell["name"], "not run"))
        else:
            state = f"failed after {failure['attempts']} attempts: {failure['reason']}"
            found.append(Status(cell["cell"], cell["name"], state, failure["log"]))
    return found


def samples_table(store: Store, cells: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
    """Samples as an Arrow table.

    Args:
        store: the results.
        cells: ids of the cells to look at; all by default.
        where: an SQL condition on a sample's columns.

    Raises:
        ValueError: a condition that is not one.
    """
    return _query(store, cells, where, "SELECT * FROM chosen ORDER BY cell, doc_id, repeat")


def cells_table(store: Store, cells: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
    """A row for each cell with samples that meet the condition: its settings, and means over those samples."""
    settings = ", ".join(f'"{name}"' for name in SETTINGS.names)
    means = ", ".join(
        f"avg({name}) AS {name}"
        for name in ("grade", "tokens", "evictions", "peak_kv_bytes", "looping_or_cut_off", "answered", "looping")
    )
    query = (
        f"SELECT {settings}, count(DISTINCT doc_id) AS problems, count(*) AS samples, {means} FROM chosen "
        f"GROUP BY {settings} ORDER BY task, model, policy, budget DESC, seed"
    )
    return _query(store, cells, where, query)


def _query(store: Store, cells: Sequence[str] | None, where: str | None, query: str) -> pa.Table:
    with store.connect(cells) as connection:
        try:
            chosen = connection.sql("SELECT * FROM samples")
            if where is not None:
                chosen = chosen.filter(where)  # takes an expression, never a statement
            found: Any = chosen.query("chosen", query)
            return found.to_arrow_table()
        except duckdb.Error as error:
            if where is None:
                raise
            raise ValueError(f"--where {where!r} is no condition: {str(error).splitlines()[0]}") from None


def export(table: pa.Table, path: Path) -> None:
    """Write a table by the file's ending; raises ValueError for one that is not known."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--export {str(path)!r}: the file must end in {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    rows = [{**row, "metrics": dict(row["metrics"])} if "metrics" in row else row for row in table.to_pylist()]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    if "metrics" in table.column_names:
        place = table.column_names.index("metrics")
        table = table.set_column(place, "metrics", [[json.dumps(row["metrics"]) for row in rows]])
    pyarrow.csv.write_csv(table, path)
