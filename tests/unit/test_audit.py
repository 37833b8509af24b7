"""The audit passes on the real code and catches each seeded fault, by the check that is there for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft import config as configs
from fedpeft.clients import train
from fedpeft.clients.cohort import chunk
from fedpeft.clients.guard import Guard
from fedpeft.errors import InputError
from fedpeft.run.audit import audit, rounds_seen
from fedpeft.run.world import load_world
from support import faults_around, faults_of_noise, faults_of_steps  # noqa: F401  # each adds its own to FAULTS
from support import small_models as small
from support.audit_faults import FAULTS

SETTING = {
    "model.task": "image-classification",
    "adapter.r": 2,
    "data.limit": 96,
    "data.clients": 4,
    "data.partition": "iid",
    "strategy.name": "fedit",
    "strategy.weighting": "uniform",
    "client.local_steps": 2,
    "client.local_epochs": None,
    "client.batch_size": 6,
    "client.lr": 0.01,
    "run.rounds": 2,
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
}
# A fixed sample of the faults: at least one for each part of the audit.
SAMPLE = {
    "half_the_planned_noise",
    "half_with_records",
    "again_after_two",
    "one_value_bare",
    "entered_after_the_reply",
    "twice_the_rate_at_the_client",
    "one_stream_of_each_process",
    "head_escapes_the_clip",
    "nothing_clipped_in_a_cohort",
    "half_of_the_steps_counted",
    "no_budget",
    "empty_batches_drawn_again",
}
# Checks of which a fault is looked for in `make attack` only.
ATTACK_ONLY = {
    ("claims", "plan"),
    ("exact_rounds", "batch size spread"),
    ("exact_rounds", "noise is fresh"),
    ("exact_rounds", "noise of each part"),
    ("rounds", "batch size"),
    ("rounds", "batches are independent"),
    ("rounds", "coordinates are apart"),
    ("rounds", "frozen tensors rest"),
    ("rounds", "ledger"),
    ("rounds", "ledger entries"),
    ("rounds", "masks are fresh"),
    ("rounds", "noise is fresh"),
    ("rounds", "noise is not reordered"),
    ("rounds", "noise shape"),
    ("rounds", "noise size"),
    ("rounds", "noise tails"),
    ("rounds", "nothing in common"),
    ("rounds", "once in a batch"),
    ("rounds", "rate of each part"),
    ("rounds", "replies are kept"),
    ("rounds", "rounds"),
    ("rounds", "update"),
    ("rounds", "what leaves"),
    ("sensitivity", "sensitivity in a cohort"),
    ("streams", "streams of masks"),
    ("streams", "streams of samples"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A small ViT and four clients of 24 records, so q = 1/4."""
    root = tmp_path_factory.mktemp("audit")
    config = configs.load({}, {**SETTING, "model.name": str(small.save("vit", root / "vit"))})
    return load_world(config, root / "run")


def other(here, privacy=None, client=None):
    """The same world under another config."""
    config = replace(
        here.config,
        privacy=replace(here.config.privacy, **(privacy or {})),
        client=replace(here.config.client, **(client or {})),
    )
    local = replace(here.local, config=config, guard=Guard(config, here.local.guard.folder, "audit"), ready={})
    return replace(here, config=config, local=local)


@pytest.fixture
def failing(here, tmp_path, monkeypatch):
    """`failing("rounds")` names the checks of a part of the audit that fail, as the code now is."""
    settings = {
        "rounds": here,
        "exact_rounds": here,
        "long_rounds": other(here, client={"local_steps": 4}),
        "asked": other(here, privacy={"epsilon": 3.0, "noise_multiplier": None}),
    }

    def run(part: str, values: int = 12_000) -> set[str]:
        monkeypatch.setattr(rounds_seen, "VALUES", values)
        monkeypatch.setattr(rounds_seen, "ROWS", 32)
        subject = audit.Audit(settings.get(part, here), tmp_path)
        name = {"exact_rounds": "rounds", "long_rounds": "rounds", "asked": "claims"}.get(part, part)
        return {check.name for check in subject.part(name) if not check.passed}

    return run


def test_the_real_code_passes(here, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds_seen, "VALUES", 20_000)
    result = audit.report(audit.Audit(here, tmp_path))
    assert [check["name"] for check in result["checks"] if not check["passed"]] == [] and result["passed"]
    measured = {check["name"]: check["measured"] for check in result["checks"]}
    for name in ("sensitivity", "sensitivity in a cohort", "sensitivity of clipping"):
        assert measured[name] == pytest.approx(1.0, abs=1e-4)  # it is reached, so a larger one would be seen
    assert result["claim"]["epsilon"] > result["measured_epsilon"] > 0
    assert result["seen"]["engines"] == ["alone", "cohort"] and len(result["seen"]["clients"]) == 4


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("fedit", "schedule_free"), ("ffa_lora", "lora_fa")], ids=["average", "fixed factor"]
)
def test_an_update_follows_the_steps_of_an_optimizer_that_sends_an_average_or_reads_what_stays(
    tmp_path, monkeypatch, strategy, optimizer
):
    monkeypatch.setattr(rounds_seen, "VALUES", 4_000)
    monkeypatch.setattr(rounds_seen, "ROWS", 32)
    model = str(small.save("vit", tmp_path / "vit"))
    tree = {**SETTING, "model.name": model, "client.optimizer": optimizer, "strategy.name": strategy}
    checks = audit.Audit(load_world(configs.load({}, tree), tmp_path / "run"), tmp_path / "audit").part("rounds")
    [update] = [check for check in checks if check.name == "update"]
    assert update.passed and update.measured < 1e-4, update


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_it_catches(name, failing, monkeypatch):
    part, check, seed = FAULTS[name]
    seed(monkeypatch.setattr)
    assert check in failing(part)


def test_each_check_with_a_fault_is_in_the_sample_or_said_to_be_left_out():
    sampled = {FAULTS[name][:2] for name in SAMPLE}
    assert {fault[:2] for fault in FAULTS.values()} - sampled == ATTACK_ONLY
    assert {part for part, _ in ATTACK_ONLY} - {"exact_rounds"} <= {part for part, _ in sampled}


@pytest.mark.attack
@pytest.mark.parametrize("name", sorted(FAULTS.keys() - SAMPLE))
def test_it_catches_too(name, failing, monkeypatch):
    part, check, seed = FAULTS[name]
    seed(monkeypatch.setattr)
    assert check in failing(part, values=60_000 if part == "exact_rounds" else 20_000)


def test_dropout_follows_the_public_seed(failing, monkeypatch):
    """Masks that an adversary knows change with the place in the batch, so one record would move all others."""
    real = train.per_sample_loss

    def with_dropout(model, inputs, labels):
        losses = real(model, inputs, labels)
        kept = torch.rand(losses.shape) < 0.5 if model.base.backbone.training else torch.ones(losses.shape)
        return losses * kept

    for place in (train, chunk):
        monkeypatch.setattr(place, "per_sample_loss", with_dropout)
    assert failing("public_seed") == set()
    secret = train.train

    def public(model, data, trains, config, seed, **options):
        monkeypatch.setattr(train.Private, "secret_seed", lambda self: seed)
        return secret(model, data, trains, config, seed, **options)

    monkeypatch.setattr(train, "train", public)
    assert failing("public_seed") == {"public seed"}


def test_it_refuses_what_is_not_private():
    for unit in ("none", "client"):
        with pytest.raises(InputError, match=rf"privacy.unit={unit}.*privacy.unit=sample"):
            audit.run(
                {},
                {}
                if unit == "none"
                else {"privacy.unit": "client", "privacy.noise_multiplier": 1.0, "strategy.weighting": "uniform"},
            )
