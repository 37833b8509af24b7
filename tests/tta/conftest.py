"""Lets the tests of this folder import parts.py, and the small models of the unit tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    import small_models

    return small_models.save("vit", tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    import small_models

    return small_models.save("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory):
    import small_models

    root = tmp_path_factory.mktemp("models")
    return {name: small_models.save(name, root / name) for name in ("llama", "gpt2")}
