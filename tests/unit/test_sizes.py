"""No file passes 400 lines, and no function 60 lines of code: docstrings, comments and blank lines are none."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("fedpeft", "strategies", "clients", "simulations") for path in (ROOT / folder).rglob("*.py")
)
FILE, FUNCTION = 400, 60
BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(text):
    """Numbers of the lines that have code; those of docstrings have none."""
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in BLANK
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return found


def functions_over(text, most):
    code = lines_of_code(text)
    return {
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and sum(node.lineno <= line <= (node.end_lineno or 0) for line in code) > most
    }


def test_no_file_is_too_long():
    assert not {str(path.relative_to(ROOT)) for path in FILES if path.read_text().count("\n") > FILE}


def test_no_function_is_too_long():
    assert not {
        str(path.relative_to(ROOT)): long for path in FILES if (long := functions_over(path.read_text(), FUNCTION))
    }


def test_docstrings_comments_and_blank_lines_do_not_count():
    text = 'def f():\n    """Of\n    three\n    lines."""\n\n    # why\n    a = (\n        1\n    )\n    return a\n'
    assert functions_over(text, 4) == {"f"} and not functions_over(text, 5)
