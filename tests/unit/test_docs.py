"""What docs/ says of the code is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


def test_the_page_is_linked():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "docs/how_a_round_works.md" in (ROOT / page).read_text()
