"""What a wheel holds: every package, config and asset, and who it says it is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fedpeft
from support.guides import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]


def find_packages() -> dict[str, Path]:
    """Import name -> folder of everything with an `__init__.py`."""
    roots = {"fedpeft": ROOT / "fedpeft", **{name: ROOT / folder for name, folder in MAPPED.items()}}
    return {
        ".".join([name, *file.parent.relative_to(root).parts]): file.parent
        for name, root in roots.items()
        for file in root.rglob("__init__.py")
    }


def test_every_package_is_in_the_wheel():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(find_packages())


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> list[str]:
    """Files of a wheel that is built from what git would clone."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    assert wheel.name.startswith(f"fedpeft-{fedpeft.__version__}-")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_has_code_configs_assets_types_and_licence(names):
    code = {
        f"{name.replace('.', '/')}/{file.name}"
        for name, folder in find_packages().items()
        for file in folder.glob("*.py")
    }
    configs = {f"fedpeft/simulations/configs/{file.name}" for file in (ROOT / "simulations" / "configs").glob("*.yaml")}
    assets = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "fedpeft" / "assets").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert code | configs | assets | {"fedpeft/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in Path(name).parts]


def test_one_version():
    assert PROJECT["project"]["version"] == fedpeft.__version__
    assert f"version: {fedpeft.__version__}\n" in (ROOT / "CITATION.cff").read_text()
