"""Bodies that the package does not know: registered here, a federation runs and resumes them like its own."""

from __future__ import annotations

import sys

import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.cli import catalogue
from fedpeft.continual.parts.forms import FormBody
from fedpeft.errors import InputError
from fedpeft.simulations import run as runs
from support.sequences import SMALL, ended


class EveryOther(FormBody):
    """Trains in every second task, and counts them."""

    stays_central = ""

    @classmethod
    def moves_in(cls, task):
        return task % 2 == 0

    def end_task(self, statistics):
        self.memory["numbers"]["tasks"] = self.memory["numbers"].get("tasks", 0) + 1
        self.memory["adapters"] = {f"seen/{key}": value.detach().clone() for key, value in self.parameters.items()}


class Pulled(EveryOther):
    """The same with a term of the loss, which a federation's clients would leave out."""

    def penalty(self, inputs, labels, features, classifier):
        return features.square().mean()


class Averaged(EveryOther):
    """The same with two views, of which a federation would show one."""

    def views(self):
        return {"online": self.change(), "other": {}}


class Dense(EveryOther):
    """It trains what no client has."""

    def begin_task(self):
        for layer in self.model.layers:
            self.parameters[f"{layer}/W"] = torch.zeros(*self.model.base.shape(layer))


class Unsaid(FormBody):
    """It says nothing of federations."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "another_package", sys.modules[__name__])
    for name, cls in {
        "every_other": EveryOther,
        "pulled": Pulled,
        "averaged": Averaged,
        "dense": Dense,
        "unsaid": Unsaid,
    }.items():
        monkeypatch.setitem(registry.TABLES["bodies"], name, f"another_package:{cls.__name__}")
    registry.table.cache_clear()
    yield
    registry.table.cache_clear()


RUN = {
    **SMALL,
    "continual.body": "every_other",
    "continual.head": "linear",
    "continual.tasks": 3,
    "run.rounds": 6,
    "strategy": "fedit",
}


def test_a_body_from_elsewhere_runs_and_resumes(tmp_path):
    states = {}

    def stop(event):
        if event["event"] == "round":
            states[event["round"]] = ended(tmp_path / "cut") if event["round"] > 1 else None
        if event["event"] == "round" and event["round"] == 5:
            raise KeyboardInterrupt

    runs.simulate("continual", RUN, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runs.simulate("continual", RUN, tmp_path / "cut", on_event=stop)
    runs.resume(tmp_path / "cut")
    whole, cut = (ended(tmp_path / name) for name in ("whole", "cut"))
    assert whole.adapter.sha256() == cut.adapter.sha256() and whole.numbers == cut.numbers
    assert whole.numbers["continual:numbers"] == {"tasks": 3}
    assert whole.memory.keys() == cut.memory.keys() and any("seen/" in key for key in whole.memory)
    assert all(torch.equal(value, cut.memory[key]) for key, value in whole.memory.items())
    pairs = [key for key in whole.adapter.tensors if whole.adapter.role(key) in ("A", "B")]
    assert pairs and all(torch.equal(states[3].adapter[key], states[5].adapter[key]) for key in pairs)
    assert not all(torch.equal(whole.adapter[key], states[5].adapter[key]) for key in pairs)
    assert catalogue.describe("every_other")["federates"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pulled", r"Pulled says that a server can run it, but .* no place for its penalty\. Set `stays_central`"),
        ("averaged", r"no place for its views"),
        ("unsaid", r"continual\.body=unsaid: a federation cannot run it, as it does not say.*Bodies that it can run"),
    ],
)
def test_a_body_that_clients_would_run_otherwise_is_refused(body, message):
    with pytest.raises(InputError, match=message):
        configs.load("continual", {**RUN, "continual.body": body})


def test_parameters_that_no_client_has_are_refused_before_the_first_round(tmp_path):
    with pytest.raises(InputError, match=r"Dense trains .*/W, and clients train the adapter's B and A"):
        runs.simulate("continual", {**RUN, "continual.body": "dense"}, tmp_path / "run")
