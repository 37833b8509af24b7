"""The notebook of the quick start runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import fedpeft

NOTEBOOK = Path(fedpeft.__file__).parents[1] / "examples" / "quickstart.ipynb"


def shown(code, names):
    """Run a cell in these names; the value of its last line, which a notebook shows."""
    tree = ast.parse(code)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr), "each cell shows something"
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEFT_ROUNDS", "2")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are made, not committed"
    names = {}
    result, rounds, distances, own, files = (
        shown("".join(cell["source"]), names) for cell in cells if cell["cell_type"] == "code"
    )
    assert "FedSVD" in result._repr_html_() or result["strategy"] == "fedsvd"
    assert list(rounds.columns) == ["accuracy", "loss", "bytes_up", "seconds"] and len(rounds) == 1 + result["rounds"]
    assert len(distances) == 5 and (distances > 0).all()
    assert "%" in own and names["own"]["clients"] == 3 and "adapter_config.json" in files
