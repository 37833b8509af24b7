"""First paragraphs of the docstrings of installed libraries: real English with natural groups, and nothing to fetch.

The texts depend on the installed versions: an input for demonstrations and tests of the text path, no benchmark. The
packages are found and parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpeft import seeds
from fedpeft.data.records import Records
from fedpeft.errors import InputError

LIBRARIES = ("numpy", "sklearn", "torch", "transformers")
PER_LIBRARY = 400
PER_MODULE = 40
SHORTEST = 40
TEST_SHARE = 4


class Docstrings:
    """Which library is this docstring from? At most 400 per library; column `module` is the sub-package.

    One docstring in four is for test, chosen by a hash of its text, so that a copy is on the same side as its original.
    """

    labelled = "class"
    summary = "docstrings of numpy, scikit-learn, torch and transformers, label is the library, natural column module"
    kind = "text"
    license = "BSD-3-Clause and Apache-2.0 (texts of the installed packages)"

    def load(self) -> tuple[Records, Records]:
        rows = [(*row, label) for label, library in enumerate(LIBRARIES) for row in paragraphs(library)]
        texts, modules, labels = zip(*rows, strict=True)
        columns = {"module": np.array(modules)}
        records = Records(list(texts), np.array(labels, dtype=np.int64), list(LIBRARIES), columns, "text")
        held_out = np.array([seeds.derive(0, "docstrings", text) % TEST_SHARE == 0 for text in texts])
        return records.take(np.flatnonzero(~held_out)), records.take(np.flatnonzero(held_out))


class DocstringCapitals:
    """How many of this docstring's words begin with a capital letter? The share in units of 10 %, as a number."""

    labelled = "numbers"
    summary = "the same docstrings, the label is a number: the share of words with a capital, in units of 10 %"
    kind = "text"
    license = Docstrings.license

    def load(self) -> tuple[Records, Records]:
        train, test = Docstrings().load()
        return _with_capitals(train), _with_capitals(test)


def _with_capitals(records: Records) -> Records:
    shares = [[10 * np.mean([word[0].isupper() for word in str(text).split()])] for text in records.inputs]
    targets = np.array(shares, dtype=np.float32)
    return replace(records, labels=np.zeros_like(records.labels), label_names=["capitals"], targets=targets)


def paragraphs(library: str) -> list[tuple[str, str]]:
    """(first paragraph, sub-package) of up to `PER_LIBRARY` docstrings, distinct, in the order of the library's files.

    Each sub-package gives at most `PER_MODULE`, so that the first few do not fill the quota.
    """
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise InputError(f"data.source=docstrings: the library {library} is not installed.")
    root = Path(spec.origin).parent
    found: dict[str, str] = {}
    for folder in sorted(path.parent for path in root.glob("*/__init__.py")):
        if folder.name.startswith(("_", "test")):
            continue
        taken = 0
        for path in sorted(folder.rglob("*.py")):
            if taken == PER_MODULE or len(found) == PER_LIBRARY:
                break
            if "tests" in path.parts:
                continue
            for text in _read_file_docstrings(path):
                if taken < PER_MODULE and len(found) < PER_LIBRARY and text not in found:
                    found[text] = f"{library}.{folder.name}"
                    taken += 1
    return list(found.items())


def _read_file_docstrings(path: Path) -> Iterator[str]:
    """First paragraphs, joined to one line, of the public definitions in a file."""
    try:
        # As bytes, since a file says its own encoding.
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # template files of code generators
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                first = inspect.cleandoc(textwrap.dedent(docstring)).split("\n\n")[0]
                text = " ".join(first.split())
                if len(text) >= SHORTEST:
                    yield text
