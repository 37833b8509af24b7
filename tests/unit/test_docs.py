"""What docs/ says of the code is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = ("strategies", "clients", "simulations")
PAGE = (ROOT / "docs" / "how_a_round_works.md").read_text()
HOPS = re.findall(r"^\| \d+ \| `([\w/.]+)` `([\w.]+)` \|", PAGE, flags=re.M)


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("file", "name"), HOPS)
def test_every_hop_of_the_walk_is_where_the_page_says(file, name):
    assert name in defined(ROOT / file)


def test_the_walk_is_short():
    assert 20 < len(HOPS) <= 30 and len({file for file, _ in HOPS}) <= 18


def test_the_pages_are_linked():
    readme, contributing = ((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
    assert all(f"docs/{page}.md" in readme for page in ("how_a_round_works", "architecture"))
    assert "docs/how_a_round_works.md" in contributing


def test_every_folder_of_the_architecture_is_there_and_every_folder_is_in_it():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    package = {path.name for path in (ROOT / "fedpeft").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert package <= set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    for folder in MAPPED:
        inner = {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").exists()}
        assert all(f"{name}/" in tree for name in inner)
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        found = [path for top in ("fedpeft", *MAPPED) for path in (ROOT / top).rglob(name)]
        assert found, name
