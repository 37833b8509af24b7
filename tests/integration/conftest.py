"""Commands called in this process, and finished runs to call them on."""

from __future__ import annotations

import json

import pytest

from fedpeft.cli import console, main
from fedpeft.record import report
from fedpeft.simulations.run import simulate
from support.sequences import SMALL

FEW = [
    "data.limit=80",
    "data.clients=3",
    "data.partition=iid",
    "client.local_steps=2",
    "client.local_epochs=null",
    "client.batch_size=8",
    "client.lr=0.01",
    "run.rounds=2",
]
TINY = [*FEW, "run.clients_per_round=null", "run.baselines=false"]


class Result:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def no_paint(unpainted):
    """Only the finished runs, which are made once, have real images."""


@pytest.fixture
def fedpeft(capsys, monkeypatch):
    """`fedpeft("list", "--json")` calls the command line; runs of white space in what it says on stderr become one."""
    for stream in (console.out, console.err):  # made with the width that the test runner has
        monkeypatch.setattr(stream, "width", 250)

    def call(*arguments) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(caught.value.code or 0, captured.out, " ".join(captured.err.split()))

    return call


def simulated(path, *arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["simulate", *arguments, "--out", str(path), "--json"])
    assert not caught.value.code
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Finished runs: FedIT; FedEx, with a residual; texts with a mean-pooled head; a language model."""
    root = tmp_path_factory.mktemp("runs")
    texts = root / "texts.csv"
    lines = [f"{word} {index} {word[::-1]},{word}" for index in range(30) for word in ("apple", "stone", "river")]
    texts.write_text("\n".join(["text,label", *lines]) + "\n")
    return {
        "fedit": simulated(root / "fedit", "quickstart", "strategy=fedit", *FEW, "run.clients_per_round=2"),
        "fedex": simulated(root / "fedex", "fedex", "adapter.target_modules=[all-linear]", *TINY),
        "text": simulated(root / "text", "text", f"data.source={texts}", *TINY, "client.lr=0.05"),
        "causal": simulated(root / "causal", "causal_lm", f"data.source={texts}", *TINY, "run.rounds=1"),
    }


@pytest.fixture
def tiny_options():
    """Overrides that make a run of any shipped config take a second."""
    return TINY


@pytest.fixture
def go(tmp_path, monkeypatch):
    """`go(name, config, more)` runs a shipped continual config tiny into tmp_path/name, without plots."""
    monkeypatch.setattr(report, "write", lambda run: [])

    def run(name, config, more=None, **arguments):
        return simulate(config, {**SMALL, **(more or {})}, tmp_path / name, **arguments)

    return run
