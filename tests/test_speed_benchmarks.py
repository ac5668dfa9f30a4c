"""The speed benchmarks run at a small size and write what they say; their numbers are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, output, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert {"device", "torch", "date", "commit"} <= results["machine"].keys()
    return results, done.stdout


@pytest.mark.slow
def test_training_attention(tmp_path):
    shape = ["--tokens", "1024", "768", "--budgets", "256", "128", "--window", "64", "--head-dim", "32"]
    results, printed = run("training_attention.py", tmp_path / "attention.json", *shape)
    assert [case["shape"]["tokens"] for case in results["cases"]] == [1024, 768]
    for case in results["cases"]:
        assert case["times"].keys() == {"dense", "evicted", "walk", "attention"}
        assert case["ratio"] == case["times"]["dense"]["seconds"] / case["times"]["evicted"]["seconds"]
        assert min(case["peak_bytes"].values()) > 0
        assert f"{case['ratio']:.2f}" in printed
    # an event whenever the entries are a multiple of the window above the budget
    assert results["cases"][0]["events"] == (1024 - 256) // 64


@pytest.mark.slow
def test_training_step(tmp_path):
    results, printed = run("training_step.py", tmp_path / "step.json", "--tokens", "320", "--budget", "128")
    assert results["times"].keys() == {"dense", "evicted"}
    assert min(results["peak_bytes"].values()) > 0
    assert f"{results['ratio']:.2f}" in printed


def test_lengths_and_budgets_go_together(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_attention

    with pytest.raises(ValueError, match="tokens has 1 entries, budgets 3"):
        training_attention.Settings(tokens=[512]).shapes()
