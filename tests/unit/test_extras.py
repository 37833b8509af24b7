"""What the core installation lacks is asked for by name, and nothing else needs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedpeft import extras
from fedpeft.config import load
from fedpeft.errors import InputError
from fedpeft.privacy import accounting
from fedpeft.record.trackers.base import require_packages
from fedpeft.simulations.benchmarks import speed

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


@pytest.fixture
def lacking(monkeypatch):
    """None of the packages of extras is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in extras.EXTRAS else find(name))


def test_each_extra_has_its_packages_and_the_core_has_none():
    for package, extra in extras.EXTRAS.items():
        there = " ".join(OPTIONAL[extra]).replace("flwr[simulation]", "ray")
        assert package in there, package
        assert not any(package in entry for entry in PROJECT["dependencies"])
    assert OPTIONAL["ray"] == ["flwr[simulation]" + next(e for e in PROJECT["dependencies"] if "flwr" in e)[4:]]
    assert f"fedpeft[{','.join(dict.fromkeys(extras.EXTRAS.values()))},docs]" in OPTIONAL["dev"]


def test_who_asks_for_it_is_told_what_to_install(lacking, tiny):
    with pytest.raises(InputError, match=r'^run\.engine=ray needs the package ray.*pip install "fedpeft\[ray\]"'):
        tiny("run", {"run.engine": "ray", "run.workers": 1})
    with pytest.raises(InputError, match=r'accountant prv needs .*"fedpeft\[opacus\]"'):
        accounting.epsilon(0.011, 1.0, 77, 1e-5, "prv")
    with pytest.raises(InputError, match=r'run\.trackers: mlflow needs .*"fedpeft\[trackers\]"'):
        require_packages(["mlflow"])
    with pytest.raises(InputError, match=r'--engines: flower needs .*"fedpeft\[ray\]"'):
        speed.run(Path("never"), engines=("flower",))
    assert "flower" not in speed.usable_engines(speed.torch.device("cpu"))
    assert load("quickstart", {"run.engine": "ray", "run.workers": 1}).run.engine == "ray"  # a config is read without


def test_a_run_needs_none_of_them(tmp_path):
    """In a process in which importing one fails, as where it is not installed."""
    tree = {
        "data": {"limit": 80, "clients": 2, "partition": {"name": "iid"}},
        "run": {"rounds": 1},
        "client": {"local_steps": 1, "local_epochs": None},
        "privacy": {"unit": "sample", "noise_multiplier": 1.0},
        "strategy": {"weighting": "uniform"},
    }
    code = f"""
import sys
sys.modules.update(dict.fromkeys({list(extras.EXTRAS)}))
import fedpeft
assert fedpeft.simulate({tree}, out={str(tmp_path / "run")!r})["rounds"] == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_whose_accountant_is_lacking_is_refused_before_anything_is_made(lacking, tiny, tmp_path):
    private = {"privacy.unit": "sample", "privacy.noise_multiplier": 1.0, "strategy.weighting": "uniform"}
    few_bits = {"model.quantization": "nf4"}
    for more in ({**private, "privacy.accountant": "prv"}, {"run.engine": "ray", "run.workers": 1}, few_bits):
        with pytest.raises(InputError, match=r'=(prv|ray|nf4) needs the package .*pip install "fedpeft'):
            tiny("run", more)
        assert not (tmp_path / "run").exists()
