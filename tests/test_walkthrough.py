"""The walk-through's commands, as the document has them, run in order with smaller numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/walkthrough.md"
SMALL = {"ROWS": 40, "STEPS": 4, "LIMIT": 4, "BUDGETS": '"[64]"'}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the document's code blocks."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def smaller(settings: str) -> str:
    """The first block, with the numbers of `SMALL`."""
    for name, value in SMALL.items():
        settings, found = re.subn(rf'^{name}=(\d+|".*?")', f"{name}={value}", settings, flags=re.MULTILINE)
        assert found == 1, f"the walk-through has lost {name}"
    return settings


def script() -> str:
    """All blocks as one shell script that stops at the first command that fails."""
    (language, settings), *rest = blocks()
    assert language == "bash"
    parts = [smaller(settings)]
    parts += [
        text if language == "bash" else f"python - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\n" for language, text in rest
    ]
    return "set -eu\n" + "\n".join(parts)


def test_the_document_names_every_step():
    text = script()
    for step in (
        "data generate",
        "data preview",
        "vkvtrain train",
        "ablate",
        "results",
        "report",
        "publish",
        "load(",
        "chat",
    ):
        assert step in text, step


@pytest.mark.slow
def test_the_walkthrough_runs(tmp_path):
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    out = tmp_path / "runs/walkthrough"
    assert len((out / "traces.jsonl").read_text().splitlines()) == SMALL["ROWS"]
    card = ModelCard.load(out / "published/README.md")
    assert "Not evaluated" not in card.text
    assert "Controls that were not measured" not in card.text
    assert "This model less its controls" in card.text
    caches = {result.metric_args["cache"] for result in card.data.eval_results}
    assert caches == {"full", "evicted"}
    assert (out / "sweep/report/report.html").is_file()
    assert done.stdout.count("<think>a:") >= 3  # load, custom_generate, chat
    assert "evictions so far" in done.stdout
