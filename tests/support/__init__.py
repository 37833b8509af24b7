"""Tests share this. `tests` is on the path of every test (pyproject.toml), so that this is `support` everywhere."""
