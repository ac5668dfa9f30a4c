"""Results of sweeps: from logged samples to rows, the store, its tables and exports."""

import json
import threading

import pyarrow.parquet as pq
import pytest
from sweeps import TASK, logged, record, rows, settings

from vkvtrain.ablation.export import cells_table, export, samples_table
from vkvtrain.ablation.samples import read_rows, rows_of
from vkvtrain.ablation.store import Store
from vkvtrain.ablation.tasks import TaskInfo


def test_a_row_for_each_problem_and_repeat():
    graded = [{"answer": "7", "exact_match": 1.0}, {"answer": None, "exact_match": 0.0}]
    records = [record("seven", answered=True, looping=False), record("loop", answered=False, looping=True, tokens=8)]
    rows = list(rows_of(logged(4, records, graded, exact_match=0.5, fact=0.25), TASK))
    assert [(row["doc_id"], row["repeat"], row["grade"]) for row in rows] == [(4, 0, 1.0), (4, 1, 0.0)]
    assert [row["response"] for row in rows] == ["seven", "loop"]
    assert [(row["answered"], row["looping"], row["tokens"]) for row in rows] == [(1, 0, 5), (0, 1, 8)]
    assert rows[0]["looping_or_cut_off"] is None
    assert rows[0]["metrics"] == {"exact_match": 1.0, "fact": 0.25}
    assert rows[0]["prompt"] == "prompt 4"
    plain = list(rows_of(logged(4, records, exact_match=0.5), TASK))  # a task that knows no repeats
    assert [row["grade"] for row in plain] == [0.5, 0.5]
    listed = list(rows_of(logged(4, records, exact_match=[0.0, 1.0]), TASK))
    assert [row["grade"] for row in listed] == [0.0, 1.0]
    more = list(rows_of(logged(4, [*records, record("padding")], exact_match=1.0), TASK))
    assert len(more) == 2  # a lagging rank's extra response is no repeat
    with pytest.raises(ValueError, match="no metric 'exact_match'"):
        list(rows_of(logged(4, records, other=1.0), TASK))
    with pytest.raises(ValueError, match="no grade from 0 to 1"):
        list(rows_of(logged(4, records, exact_match=3.5), TASK))


def test_choices_are_one_response(tmp_path):
    arguments = {
        f"gen_args_{choice}": {
            "arg_0": "question",
            "arg_1": "ab"[choice],
            "arg_2": {"vkvtrain": [{"evictions": choice}]},
        }
        for choice in range(2)
    }
    sample = {
        "doc_id": 0, "target": "1", "filter": "none", "resps": [[[-1.0, False]], [[-2.0, False]]],
        "filtered_resps": [[-1.0, False], [-2.0, False]], "metrics": ["acc"], "acc": 1.0, "arguments": arguments,
    }  # fmt: skip
    (row,) = rows_of(sample, TaskInfo("t", "acc", "none", 1, False, {}, ""))
    assert (row["grade"], row["evictions"], row["tokens"]) == (1.0, 1.0, None)
    assert json.loads(row["response"]) == [[-1.0, False], [-2.0, False]]
    with pytest.raises(ValueError, match="no samples of t"):
        read_rows(tmp_path, TASK)


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path)
    store.write(rows([1, 0, 1]), settings("a"), {"seconds": 3})
    store.write(rows([0, 0, 1]), settings("b", budget=80, seed=None), {"seconds": 4})
    assert set(store.finished()) == {"a", "b"}
    assert store.about("b") == {"seconds": 4}
    table = samples_table(store)
    assert table.num_rows == 6
    first = table.to_pylist()[0]
    assert {**first, "metrics": dict(first["metrics"])} == {**settings("a"), **rows([1, 0, 1])[0]}
    listed = cells_table(store, where="budget = 64 AND grade > 0").to_pylist()
    assert [(row["cell"], row["problems"], row["grade"]) for row in listed] == [("a", 2, 1.0)]
    assert [row["cell"] for row in cells_table(store, ["b"]).to_pylist()] == ["b"]
    assert cells_table(store, where="metrics['exact_match'] = 0 AND seed IS NULL").to_pylist()[0]["problems"] == 2


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("budgt = 64", "budgt"),
        ("1 = 1; DROP VIEW samples", "no condition"),
        ("true) OR (true", "no condition"),
        ("true UNION SELECT 1", "no condition"),
        ("doc_id IN (SELECT 1 FROM read_csv('/etc/passwd'))", "file system operations are disabled"),
        ("doc_id IN (SELECT 1 FROM read_text('OUTSIDE'))", "file system operations are disabled"),
        ("", "no condition"),
    ],
)
def test_a_condition_looks_at_samples_and_no_further(tmp_path, where, says):
    store = Store(tmp_path / "store")
    store.write(rows([1]), settings("a"), {})
    (tmp_path / "outside").write_text("secret")
    with pytest.raises(ValueError, match="--where") as error:
        samples_table(store, where=where.replace("OUTSIDE", str(tmp_path / "outside")))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_store_has_an_empty_table(tmp_path):
    assert samples_table(Store(tmp_path)).num_rows == 0


def test_many_writers_and_a_reader_never_meet_half_a_file(tmp_path):
    store, wrong = Store(tmp_path), []

    def write(worker):
        for turn in range(8):
            store.write(rows([turn % 2] * 50), settings(f"{worker}-{turn % 3}"), {})

    def read():
        while any(writer.is_alive() for writer in writers):
            if cells_table(store).num_rows and {row["samples"] for row in cells_table(store).to_pylist()} != {50}:
                wrong.append("half a cell")

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in (*writers, reader):
        thread.join()
    assert not wrong
    assert len(store.finished()) == 9
    assert not [path for path in store.cells.iterdir() if path.name.startswith(".")]


def test_a_damaged_file_is_named(tmp_path):
    store = Store(tmp_path)
    path = store.write(rows([1]), settings("a"), {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged .* delete it"):
        store.finished()


def test_one_sweep_at_a_time_in_a_directory(tmp_path):
    store = Store(tmp_path)
    with store.lock(), pytest.raises(ValueError, match="in use by another sweep"), Store(tmp_path).lock():
        pass
    with store.lock():
        pass


def test_exports(tmp_path):
    store = Store(tmp_path)
    store.write(rows([1, 0]), settings("a"), {})
    table = samples_table(store)
    for ending in ("csv", "json", "parquet"):
        export(table, tmp_path / f"out.{ending}")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2
    assert json.loads((tmp_path / "out.json").read_text())[1]["metrics"] == {"exact_match": 0.0}
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0].startswith('"cell","model"')
    assert '{""exact_match"": 1.0}' in lines[1]
    with pytest.raises(ValueError, match="must end in"):
        export(table, tmp_path / "out.xlsx")
