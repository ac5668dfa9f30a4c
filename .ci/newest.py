"""The heart of the tests with the newest release of everything, in an environment of its own (`make test-newest`).

    python .ci/newest.py TEST...          # newest releases that pyproject.toml admits: a failure ends with status 1
    python .ci/newest.py --raise TEST...  # newest releases there are: where they pass, pyproject.toml admits them

A failure is followed by the search for its cause: one direct dependency after another is put back to the version of
constraints.txt, and the one without which the failed tests pass is named. Releases beyond the upper bounds are tried as
well, and only reported: users do not get them before a bound was raised.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
TESTED_PARTS = {"torch": 2, "transformers": 2, "peft": 2, "accelerate": 2, "lm-eval": 3}
"""Parts of a version behind which a package may change what this one relies on; of the others the first."""


def requirements() -> list[Requirement]:
    """Direct dependencies, those of the extra `eval` included."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["eval"])]


def unbounded(requirement: Requirement) -> str:
    """The requirement with its lower bound alone."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{','.join(str(one) for one in requirement.specifier if one.operator == '>=')}"


def install(*arguments: str) -> None:
    """Install into this environment; the newest releases that `arguments` admit."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([*command, *arguments], check=True)


def installed() -> dict[str, str]:
    return {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}


def passes(*arguments: str) -> bool:
    """Whether the tests pass."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def culprits(tests: list[str]) -> list[str]:
    """The direct dependencies each of which alone, put back to constraints.txt, mends what failed last."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    newest, named = installed(), []
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name not in pinned or newest.get(name) == pinned[name]:
            continue
        print(f"newest: the failed tests again with {name} {pinned[name]} instead of {newest[name]}", flush=True)
        install(f"{name}=={pinned[name]}")
        if passes("--last-failed", "--last-failed-no-failures", "none", *tests):
            named.append(f"{name} {newest[name]} (they pass with {pinned[name]})")
        install(*(f"{other}=={version}" for other, version in newest.items() if other != "vkvtrain"))
    return named


def explained(tests: list[str]) -> str:
    """Why tests failed, in one sentence."""
    named = culprits(tests)
    return "tests fail with " + " and with ".join(named) if named else "tests fail, and no single package is the cause"


def next_release(name: str, version: str) -> str:
    """The first release that a tested `version` says nothing about."""
    *stays, last = Version(version).release[: TESTED_PARTS.get(name, 1)]
    return ".".join(map(str, [*stays, last + 1]))


def raise_bounds() -> list[str]:
    """Write upper bounds behind the installed versions into pyproject.toml; what changed."""
    text, now, changed = PROJECT.read_text(), installed(), []
    for requirement in requirements():
        bounded = (
            f"{unbounded(requirement)},<{next_release(requirement.name, now[canonicalize_name(requirement.name)])}"
        )
        before = re.search(rf'"({re.escape(unbounded(requirement))}(?:,<[^"]*)?)"', text)
        if before is None:
            sys.exit(f"newest: {PROJECT.name} writes {requirement} in another form than name>=version,<version")
        if before[1] != bounded:
            text = text.replace(before[0], f'"{bounded}"')
            changed.append(f"{before[1]} -> {bounded}")
    PROJECT.write_text(text)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+", help="files of tests")
    parser.add_argument("--raise", dest="raising", action="store_true", help="admit the newest releases if they pass")
    arguments = parser.parse_args()
    tests: list[str] = arguments.tests
    if arguments.raising:
        install("--upgrade", *map(unbounded, requirements()))
        if not passes(*tests):
            sys.exit(f"newest: the bounds stay as they are: {explained(tests)}")
        print("\n".join(raise_bounds()) or "newest: the bounds stay as they are, nothing newer was released")
        return
    install("--upgrade", *map(str, requirements()))
    if not passes(*tests):
        sys.exit(f"newest: {explained(tests)}")
    admitted = installed()
    install("--upgrade", *map(unbounded, requirements()))
    if installed() == admitted:
        return
    if passes(*tests):
        print("newest: releases beyond the upper bounds pass: `make bounds` admits them")
    else:
        print(f"newest: of releases beyond the upper bounds, {explained(tests)}")


if __name__ == "__main__":
    main()
