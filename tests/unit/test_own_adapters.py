"""What is said of averages of our adapters: measured, shown, warned of, and in a run's summary."""

from __future__ import annotations

import json
import logging

import pytest

from fedpeft import config as configs
from fedpeft.adapters import averages
from fedpeft.adapters.peft_types import EXACT
from fedpeft.cli import adapter_facts
from fedpeft.cli.catalogue import describe
from fedpeft.simulations.benchmarks import own_adapters as measuring
from support import small_models as small
from support.own_adapters import is_linear
from support.sample import few

CASES = measuring.cases()


def test_every_adapter_of_ours_has_been_measured():
    assert [(row["name"], row["options"]) for row in averages.read_own()] == CASES


@pytest.mark.parametrize(
    ("name", "options"),
    few(CASES, [("lora", {}), ("lora_sb", {}), ("paca", {}), ("bd_lora", {}), ("nola", {"train": "beta"})]),
)
def test_what_is_said_is_what_is_measured(name, options):
    said = next(row for row in averages.read_own() if (row["name"], row["options"]) == (name, options))
    got = measuring.measure(name, options)
    assert (got["average"] < EXACT) == (said["average"] < EXACT) == (name == "lora_sb" or is_linear(name, options))
    if said["average"] > EXACT:
        assert got["average"] == pytest.approx(said["average"], rel=0.2)
    assert {**got, "average": 0, "start": 0} == {**said, "average": 0, "start": 0} and got["start"] < 1e-5


@pytest.mark.parametrize(
    ("adapter", "wanted"),
    [
        ({"name": "paca"}, 0.0),
        ({"name": "nlora"}, 0.35),
        ({"name": "nlora", "train": "core", "init": "block"}, 0.0),
        ({"name": "lora"}, 0.23),
        ({"name": "peft", "type": "IA3"}, 0.0),
        ({"name": "peft", "type": "VERA"}, 0.8),
    ],
)
def test_the_error_of_a_configured_adapter(adapter, wanted):
    assert averages.find_error(configs.load({"adapter": adapter}).adapter) == pytest.approx(wanted, abs=0.02)


def test_show_says_what_was_measured():
    rows = describe("adapters/nola")["measured"]
    cells = [adapter_facts.write_cells(row) for row in rows]
    assert [(row["options"], row["average"]) for row in cells] == [("", "76% off"), ('train="beta"', "exact")]


def test_a_biased_one_warns_with_its_number_and_an_exact_one_does_not(tmp_path, caplog):
    path = small.save("bert", tmp_path)
    with caplog.at_level(logging.WARNING, "fedpeft"):
        small.adapted(path, "bert", method="svfit")
        assert not caplog.records
        small.adapted(path, "bert", method="sorsa")
    assert "adapter.name=sorsa: an average of these adapters is 16% off" in caplog.text


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"adapter": "paca"}, 0.0),
        ({"adapter": "lora"}, 0.23),
        ({"strategy": "flora", "adapter": "lora"}, None),
    ],
)
def test_the_summary_of_a_run_has_it(config, wanted, tiny, tmp_path):
    tiny("run", {**config, "run.rounds": 1})
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["average_error"]
    assert found == (None if wanted is None else pytest.approx(wanted, abs=0.02))
