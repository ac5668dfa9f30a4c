"""The tables of README and docs: policies from the registry, references of the policies from `references.py`, families
from the outcomes of `test_families.py` (`make tables`), versions from pyproject.toml (`make bounds`)."""

import inspect
import tomllib
from collections.abc import Mapping
from pathlib import Path

from families import FAMILIES
from packaging.requirements import Requirement
from references import REFERENCES

from vkvtrain.policies import POLICIES

README = Path(__file__).parents[1] / "README.md"
POLICIES_PAGE = README.parent / "docs" / "policies.md"
COLUMNS = {
    "parity": "training = decoding",
    "backends": "backends agree",
    "stock": "full = stock",
    "rows": "rows independent",
    "generate": "generate",
    "peft": "LoRA",
    "checkpointing": "checkpointing",
}
"""Tests of `test_families.py` and their headings."""
VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "lm-eval")
"""Libraries whose versions the README names."""


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def policy_table() -> str:
    """A row for each registered policy: the first sentence of its docstring, and what an event reads."""
    reads = {
        "needs_mass": "all queries", "needs_queries": "window queries", "needs_keys": "keys", "needs_values": "values"
    }  # fmt: skip
    lines = [row(["policy", "what it does", "reads"]), row(["---"] * 3)]
    for name, policy in POLICIES.items():
        sentence = " ".join(inspect.cleandoc(policy.__doc__ or "").split("\n\n")[0].split())
        needs = [word for flag, word in reads.items() if getattr(policy, flag)]
        if (policy.protected_fraction or policy.measures) and "values" not in needs:
            needs.append("values")
        lines.append(row([f"`{name}`", sentence, ", ".join(needs) or "nothing"]))
    return "\n".join(lines)


def family_table(outcomes: Mapping[tuple[str, str], list[bool]]) -> str:
    """A row for each family.

    Args:
        outcomes: by test and family, whether each of its cases passed.
    """
    lines = [row(["family", *COLUMNS.values(), "particular"]), row(["---"] * (len(COLUMNS) + 2))]
    for name, family in FAMILIES.items():
        cells = []
        for test in COLUMNS:
            passed = outcomes.get((test, name), [])
            many = f" ({len(passed)} policies)" if test == "parity" else ""
            cells.append("not run" if not passed else f"yes{many}" if all(passed) else "FAILS")
        lines.append(row([name, *cells, family.note]))
    return "\n".join(lines)


def reference_table() -> str:
    """A row for each piece of published code, with the setting that keeps what it kept."""
    lines = [row(["setting of ours", "code", "what was run"]), row(["---"] * 3)]
    for reference in REFERENCES.values():
        policy, *rest = reference.setting.items()
        setting = ", ".join([f"`{policy[1]}`", *(f"`{name}: {value}`" for name, value in rest)])
        code = f"[{reference.repository}](https://github.com/{reference.repository}) {reference.commit[:7]}"
        lines.append(row([setting, code, f"`{reference.function}`"]))
    return "\n".join(lines)


def version_table() -> str:
    """A row for each library whose minor releases matter here: the versions that pyproject.toml admits."""
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    lines = [row(["", "from", "to before"]), row(["---"] * 3)]
    lines.append(row(["Python", project["requires-python"].removeprefix(">="), "-"]))
    for text in (*project["dependencies"], *project["optional-dependencies"]["eval"]):
        requirement = Requirement(text)
        if requirement.name in VERSIONS:
            bounds = {one.operator: one.version for one in requirement.specifier}
            lines.append(row([requirement.name, bounds[">="], bounds["<"]]))
    return "\n".join(lines)


def between(text: str, name: str) -> tuple[int, int]:
    """Where a table lies in a text: after `<!-- name -->`, before `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    return text.index(start) + len(start), text.index(end)


def write(name: str, table: str, file: Path = README) -> None:
    """Replace a table in a file."""
    text = file.read_text()
    start, end = between(text, name)
    file.write_text(text[:start] + table + text[end:])


def current(name: str, file: Path = README) -> str:
    """A table as a file has it."""
    text = file.read_text()
    start, end = between(text, name)
    return text[start:end]
