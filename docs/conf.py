"""Sphinx, over the whole checkout: pages link each other by their paths there, on a code host and in the site alike."""

from __future__ import annotations

import fedpeft

project = "fedpeft"
author = "the fedpeft authors"
version = release = fedpeft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/*.rst", "examples/*/README.md"]
exclude_patterns = ["AGENTS.md"]
html_theme = "furo"
html_title = "fedpeft"
html_extra_path = ["site"]  # the first page of the site, which is not in its root
myst_heading_anchors = 4
autodoc_typehints = "none"  # docstrings say what a value is; the signature has its type
