"""What all tests share: threads, examples of hypothesis, fixtures, the order, the README's tables."""

import importlib.util
import json
import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import readme_tables
import torch
from accelerate.state import AcceleratorState, GradientState
from families import FAMILIES
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so in a background job of a script, and its children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile(
    "vkvtrain", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vkvtrain")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state in singletons, which fixtures of a module that train leave as well."""
    reset_accelerator()
    yield
    reset_accelerator()


def reset_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def finetune():
    """The `main` of recipes/finetune.py."""
    path = Path(__file__).parents[1] / "recipes" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """A file of rows of noise, which no model knows, with responses of very different lengths."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "noise.jsonl"
    lengths = [(rng.randint(3, 20), rng.choice([1, 4, 15, 60])) for _ in range(48)]
    rows = [
        {"prompt": "".join(rng.choices("abcdef", k=prompt)), "completion": "".join(rng.choices("0123456789", k=more))}
        for prompt, more in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # first, so that no worker waits for them


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write the README's tables from these outcomes")


_outcomes: dict[tuple[str, str], list[bool]] = {}
"""By test and family of `test_families.py`, whether each case passed."""


def pytest_runtest_logreport(report):
    path, _, test = report.nodeid.partition("::test_")
    if report.when == "call" and path.endswith("test_families.py"):
        name, _, case = test.partition("[")
        family = max((known for known in FAMILIES if case.startswith(known)), key=len)
        _outcomes.setdefault((name, family), []).append(report.passed)


def pytest_sessionfinish(session):
    if session.config.getoption("--write-tables"):
        readme_tables.write("policies", readme_tables.policy_table())
        readme_tables.write("references", readme_tables.reference_table(), readme_tables.POLICIES_PAGE)
        readme_tables.write("families", readme_tables.family_table(_outcomes))
