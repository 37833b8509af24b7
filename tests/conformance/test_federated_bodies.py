"""A body has one name, one set of options and one default, whether one learner runs it or a federation."""

from __future__ import annotations

import pytest

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config import FEDERATION, LEARNER, ContinualConfig, default_of, options_of
from fedpeft.errors import InputError
from fedpeft.strategies.sequence.build import make_body
from support.classified import HALVES_OF_THEIR_OWN, ROBUST, STAY_CENTRAL
from support.continual_parts import learner

BODIES = registry.names("bodies")
FEDERATED = [name for name in BODIES if name not in STAY_CENTRAL]
OTHERS = [
    (name, key, item)
    for name in BODIES
    for key, item in options_of(registry.load("bodies", name)).items()
    if item.metadata["only"]
]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_federates_or_says_why_not(name):
    reason = registry.load("bodies", name).stays_central
    assert bool(reason) == (name in STAY_CENTRAL)
    if not reason:
        assert make_body(ContinualConfig(body=name)).central is registry.load("bodies", name)
        return
    assert 20 < len(reason) < 160 and not reason.endswith(".")
    with pytest.raises(InputError, match=rf"continual\.body={name}: a federation cannot run it, as it "):
        configs.load("continual", {"continual.body": name})


@pytest.mark.parametrize("name", FEDERATED)
def test_an_option_has_one_default_wherever_the_body_runs(name):
    central = registry.load("bodies", name)
    both = {key: default_of(item) for key, item in options_of(central).items() if not item.metadata["only"]}
    there = configs.build(ContinualConfig, {"body": name}, "continual").options
    alone = configs.read_options(central, {}, "body")
    assert {key: there[key] for key in both} == both == {key: alone[key] for key in both}
    assert make_body(ContinualConfig(body=name)).config == central.Config()


@pytest.mark.parametrize(("name", "key", "item"), OTHERS)
def test_an_option_of_the_other_kind_of_run_is_refused_with_its_meaning(name, key, item):
    assert item.metadata["only"] in item.metadata["help"]
    with pytest.raises(InputError, match=rf"{key}: .*only\)\. (In a federation|For one learner) \w+ has the options"):
        if item.metadata["only"] == LEARNER:
            configs.build(ContinualConfig, {"body": name, key: default_of(item)}, "continual")
        else:
            learner(name, options={key: default_of(item)})


def test_there_are_options_of_both_kinds():
    assert {item.metadata["only"] for _, _, item in OTHERS} == {LEARNER, FEDERATION}


def test_halves_have_names_of_their_own_and_no_options_of_their_own():
    halves = {name: registry.load("server_bodies", name) for name in registry.names("server_bodies")}
    assert set(halves) == set(HALVES_OF_THEIR_OWN)
    assert not any("Config" in vars(half) for half in halves.values())
    tables = ("bodies", "server_bodies", "heads", "strategies")
    names = [registry.load(table, name).__name__ for table in tables for name in registry.names(table)]
    assert sorted(names) == sorted(set(names))


def test_what_is_robust_says_so():
    declared = {name for name in registry.names("strategies") if registry.load("strategies", name).robust}
    assert declared == set(ROBUST)
