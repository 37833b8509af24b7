"""The wheel holds fedpeft and nothing else, and what it holds works without the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("fedpeft", "strategies", "clients", "simulations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline from a copy, so that the checkout gets no build folders."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    for name in (*CODE, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*build, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def source_files(folder: str) -> set[str]:
    """Where the files of a folder belong in the wheel."""
    base = "" if folder == "fedpeft" else "fedpeft/"
    return {
        base + path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_one_name_only(names):
    tops = {name.split("/")[0] for name in names}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tops == {"fedpeft", f"fedpeft-{version}.dist-info"}
    assert not any("test" in Path(name).parts for name in names)
    assert not any("tests" in Path(name).parts for name in names)


@pytest.mark.parametrize("folder", CODE)
def test_every_file_is_there(names, folder):
    """Modules, shipped configs, the embedded model: a new sub-package that is not declared is missing here."""
    wanted = source_files(folder)
    assert any(name.endswith(".py") for name in wanted)
    assert wanted <= names


def test_nothing_else_is_there(names):
    allowed = set().union(*map(source_files, CODE))
    assert {name for name in names if name.startswith("fedpeft/")} <= allowed


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Name"] == "fedpeft" and metadata["Version"] == declared["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    plain = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert len(plain) == len(declared["dependencies"])
    assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "fedpeft = fedpeft.cli.main:main" in scripts


def test_the_version_is_that_of_the_module(wheel):
    import fedpeft

    assert wheel.name.split("-")[1] == fedpeft.__version__
    assert f"version: {fedpeft.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_importing_the_wheel_warns_of_nothing(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import fedpeft; print(fedpeft.__file__)"
    asked = [sys.executable, "-I", "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(str(tmp_path))


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fedpeft, fedpeft.strategies.rules.fedsvd, fedpeft.clients.store, fedpeft.simulations.grid
from fedpeft import config, registry
from fedpeft.record import drawing
from fedpeft.simulations import run
drawing.png = lambda figure: b""
few = {"run.rounds": 1, "data.clients": 2, "data.limit": 60, "run.clients_per_round": 2, "run.baselines": False,
       "client.local_epochs": None, "client.local_steps": 1}
summary = run.simulate("quickstart", few, sys.argv[2])
print(json.dumps([fedpeft.__file__, fedpeft.strategies.__file__, len(config.shipped_configs()), summary["rounds"]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    module, strategies, configs, rounds = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith(str(tmp_path)) and strategies.startswith(str(tmp_path))
    assert configs == len(list((ROOT / "simulations" / "configs").glob("*.yaml"))) and rounds == 1
