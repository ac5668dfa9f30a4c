"""What `docs/how-it-works.md` names by file and name exists, so that the page cannot go stale."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-it-works.md"
NAMES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE.read_text())))


def defined(module: Path) -> set[str]:
    """Functions and classes of a module, and the methods of its classes as `Class.method`."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_the_page_names_the_code():
    assert len(NAMES) > 40
    assert {"cache/layer.py", "lifetimes.py", "selection.py"} <= {file for file, _ in NAMES}


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_what_the_page_names_exists(file, name):
    module = ROOT / file if file.startswith("tests/") else ROOT / "vkvtrain" / file
    assert name in defined(module)


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"])
def test_links_and_pictures_of_the_repository_exist(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert any("contract.png" in link for link in links)
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing
