"""The README's tables are what the code says, and its links lead somewhere."""

import re

from families import FAMILIES
from readme_tables import POLICIES_PAGE, README, current, policy_table, reference_table, version_table


def test_the_table_of_policies_is_current():
    assert current("policies") == policy_table(), "run `make tables`"


def test_the_table_of_versions_is_what_pyproject_admits():
    assert current("versions") == version_table(), "run `make bounds`"


def test_the_table_of_references_is_current():
    assert current("references", POLICIES_PAGE) == reference_table(), "run `make tables`"


def test_the_table_of_families_names_every_family_and_no_failure():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in current("families").splitlines()[2:]]
    assert rows == list(FAMILIES), "run `make tables`"
    assert "FAILS" not in current("families")
    assert "not run" not in current("families")


def test_files_that_the_readme_names_exist():
    text = README.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    commands = re.findall(
        r"(?:recipes|accelerate_configs|vkvtrain|benchmarks|docs|eval|tests)/[\w/]+\.(?:py|yaml|md|png)", text
    )
    assert commands
    for path in [*links, *commands]:
        assert (README.parent / path).exists(), path
