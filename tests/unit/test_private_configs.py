"""What a config of a private run may not ask: refused at once, or before the first round."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft import config as configs
from fedpeft.errors import InputError

PRIVATE = {
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "strategy.weighting": "uniform",
    "client.local_steps": 2,
    "client.local_epochs": None,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"privacy.noise_multiplier": None}, "give exactly one"),
        ({"privacy.epsilon": 1.0}, "give exactly one"),
        ({"strategy.weighting": "examples"}, r"Set strategy\.weighting=uniform"),
        ({"data.holdout": 0.2}, r"Set data\.holdout=0"),
        ({"client.local_steps": None, "client.local_epochs": 1}, r"client\.local_steps=null"),
        ({"client.max_grad_norm": 1.0}, r"client\.max_grad_norm=1"),
        ({"strategy": "hetlora", "adapter.client_ranks": [2, 4]}, r"Set adapter\.client_ranks=null"),
        ({"privacy.policy": "no/such/place"}, r"privacy\.policy: no file or folder no/such/place"),
        ({"privacy.clip": float("inf")}, r"privacy\.clip: inf"),
        ({"privacy.noise_multiplier": float("inf")}, r"privacy\.noise_multiplier: inf"),
        ({"privacy.noise_multiplier": None, "privacy.epsilon": float("inf")}, r"privacy\.epsilon: inf"),
        ({"privacy.noise_multiplier": 0.0}, r"privacy\.noise_multiplier: 0"),
        ({"privacy.delta": 0.0}, r"privacy\.delta: 0"),
        ({"privacy.clip": 0.0}, r"privacy\.clip: 0"),
    ],
)
def test_a_config_that_cannot_be_private_is_refused_at_once(change, named):
    configs.load({}, PRIVATE)
    with pytest.raises(InputError, match=named):
        configs.load({}, {**PRIVATE, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"client.batch_size": 500}, r"client\.batch_size=500.*client-00"),
        ({"privacy.delta": 0.1}, r"privacy\.delta=0\.1 is not below 1 / "),
    ],
)
def test_clients_too_small_for_the_plan_are_named_before_round_1(change, named, tiny, tmp_path):
    with pytest.raises(InputError, match=named):
        tiny("run", {**PRIVATE, **change})
    assert not Path(tmp_path / "run").exists()


def test_a_public_number_of_records_does_not_hide_a_delta_that_is_too_large(tiny):
    """Ten is a lie: a delta of 0.05 publishes one of every twenty of a client's records."""
    with pytest.raises(InputError, match=r"privacy\.delta"):
        tiny("run", {**PRIVATE, "client.batch_size": 4, "privacy.delta": 0.05, "privacy.records": 10})
