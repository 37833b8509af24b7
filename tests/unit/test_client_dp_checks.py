"""Client-level privacy refuses before anything is loaded; each message names the key and a way out."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.state import Needs
from fedpeft.strategies.build import build
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.wrappers.client_dp import ClientDP

GOOD: dict[str, Any] = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 1.0,
    "privacy.accountant": "rdp",
    "strategy.weighting": "uniform",
}


def load(**changes: Any) -> configs.Config:
    return configs.load({}, {**GOOD, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_the_config_puts_privacy_around_everything() -> None:
    config = load(strategy__wrap=["fedprox", "fedadam"], run__clients_per_round=4, data__clients=12)
    strategy = build(config)
    assert isinstance(strategy, ClientDP)
    assert [type(layer).__name__ for layer in (strategy.inner, strategy.inner.inner)] == ["FedAdam", "FedProx"]
    assert (strategy.cohort, strategy.context.population, strategy.context.weighting) == (4, 12, "uniform")
    assert strategy.privacy is config.privacy and strategy.needs is Needs.INDIVIDUAL
    assert not isinstance(build(configs.load({})), ClientDP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__noise_multiplier": None}, "privacy.epsilon=None and privacy.noise_multiplier=None: give exactly"),
        ({"privacy__epsilon": 2.0}, "privacy.epsilon=2.0 and privacy.noise_multiplier=1.0: give exactly one"),
        ({"privacy__delta": 0.1}, "privacy.delta=0.1 must be below 1 / data.clients = 0.1"),
        ({"strategy__weighting": "examples"}, "strategy.weighting=examples.*Set strategy.weighting=uniform"),
        ({"data__holdout": 0.2}, "data.holdout=0.2.*privacy.release_metrics=true"),
        ({"privacy__adaptive_clip": True}, r"privacy.clip_count_noise=0.5 is too small .* 1: it must be above 0.5"),
        ({"strategy__wrap": ["scaffold"], "client__optimizer": "sgd"}, "strategy.wrap: scaffold .*control variates"),
        ({"strategy__wrap": ["fedprox", "scaffold"], "client__optimizer": "sgd"}, "strategy.wrap: scaffold .*variates"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__delta": 0.099},
        {"data__holdout": 0.2, "privacy__release_metrics": True},
        {"privacy__adaptive_clip": True, "privacy__clip_count_noise": 0.51},
        {"privacy__clip_count_noise": 0.01},
        {"privacy__noise_multiplier": None, "privacy__epsilon": 3.0},
        {"strategy__wrap": ["fedprox", "fedyogi"]},
        {"privacy__adaptive_clip": True, "data__clients": 30},
    ],
)
def test_near_misses_are_taken(changes: dict[str, Any]) -> None:
    load(**changes)


def individual() -> list[str]:
    return [
        name for name in registry.names("strategies") if registry.load("strategies", name).needs is Needs.INDIVIDUAL
    ]


@pytest.mark.parametrize("name", individual())
def test_rules_that_look_at_single_updates_are_refused_by_name(name: str) -> None:
    wraps = registry.load("strategies", name).wraps
    for wrap in ([name], [name, "fedprox"]) if wraps else ([],):
        with pytest.raises(InputError, match=f"strategy.(name|wrap): {name} looks at single updates") as caught:
            load(**({"strategy__wrap": wrap} if wraps else {"strategy": name}))
        allowed = str(caught.value).partition("Allowed: ")[2].rstrip(".").split(", ")
        assert not set(allowed) & {*individual(), "scaffold"}
        assert ("fedadam" if wraps else "fedsvd") in allowed


def test_a_changed_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedIT, "changes_base", True)
    with pytest.raises(InputError, match=r"strategy.name: fedit changes the base weights.*Allowed: ffa_lora"):
        load(strategy="fedit")


def test_the_population_has_to_be_set() -> None:
    config = load()
    with pytest.raises(InputError, match="population"):
        ClientDP(FedIT(), config.privacy, config.run).cohort  # noqa: B018
