"""Tiny models built from configurations, and the two passes that the parity tests compare."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import readme_tables
import torch
from families import FAMILIES
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so in a background job of a script, and its children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile(
    "vkvtrain", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vkvtrain")


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
        readme_tables.write("families", readme_tables.family_table(_outcomes))
