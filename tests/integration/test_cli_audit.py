"""`fedpeft audit` on a shipped config."""

from __future__ import annotations

import pytest
import torch

from fedpeft.privacy.plan import Plan
from fedpeft.run.audit import audit, rounds_seen
from fedpeft.run.audit.neighbours import neighbours

PRIVATE = ["privacy.unit=sample", "privacy.noise_multiplier=1", "strategy=fedit", "strategy.weighting=uniform"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(audit, "EMPTY", 40)
    monkeypatch.setattr(rounds_seen, "VALUES", 1)
    monkeypatch.setattr(rounds_seen, "ROWS", 16)
    monkeypatch.setattr(audit, "neighbours", lambda *given: list(neighbours(*given))[:2])


def test_it_passes(fedpeft, tiny_options, vit_folder):
    done = fedpeft("audit", "quickstart", *tiny_options, *PRIVATE, f"model.name={vit_folder}", "--json")
    assert done.code == 0, done.out
    result = done.json
    assert result["passed"] and result["config"]["privacy"]["unit"] == "sample"
    assert result["claim"]["steps"] == 4 and 0 < result["measured_epsilon"] < result["claim"]["epsilon"]
    assert {
        "sensitivity",
        "noise size",
        "batch size",
        "empty batches",
        "frozen tensors rest",
        "ledger",
        "claim",
        "streams of noise",
        "canaries",
    } < {check["name"] for check in result["checks"]}
    assert result["claim"]["asked"] is None and result["false_alarm"] == 1e-6 and result["limits"]
    assert result["seen"]["engines"] == ["alone", "cohort"] and result["seen"]["of"] == len(result["seen"]["clients"])
    assert all(set(check) == {"name", "measured", "allowed", "passed", "what"} for check in result["checks"])


def test_a_penalty_is_no_part_of_what_is_clipped_and_noised(fedpeft, tiny_options, vit_folder, monkeypatch):
    for part in ("sensitivity", "public_seed", "empty", "streams"):  # which take long, and have no optimizer steps
        monkeypatch.setattr(audit.Audit, part, lambda subject: [])
    pulled = ["adapter.penalty=sorsa", "adapter.penalty_options.gamma=5"]
    done = fedpeft("audit", "quickstart", *tiny_options, *PRIVATE, f"model.name={vit_folder}", *pulled, "--json")
    assert done.code == 0 and done.json["passed"], [one for one in done.json["checks"] if not one["passed"]]
    # Not known to the audit, the same pull would be a sum that is not clipped.
    monkeypatch.setattr("fedpeft.adapters.penalties.base.Penalised.gradients", shift_all)
    done = fedpeft("audit", "quickstart", *tiny_options, *PRIVATE, f"model.name={vit_folder}", *pulled, "--json")
    assert done.code == 1


def shift_all(penalised, trained, others):
    """Another pull each time that it is asked for: what training has and what the audit takes off differ."""
    return {key: torch.randn_like(value) for key, value in trained.items()}


def test_a_failure_is_shown_and_ends_with_code_1(fedpeft, tiny_options, vit_folder, monkeypatch):
    """Noise of twice the size is more private than claimed, and not what is accounted."""
    real = Plan.noised_mean
    monkeypatch.setattr(Plan, "noised_mean", lambda plan, total, source: real(plan, 0.5 * total, source) * 2)
    for part in ("sensitivity", "public_seed", "empty", "streams"):  # which take long, and see nothing of it
        monkeypatch.setattr(audit.Audit, part, lambda subject: [])
    done = fedpeft("audit", "quickstart", *tiny_options, *PRIVATE, f"model.name={vit_folder}")
    assert done.code == 1
    failed = done.out.rpartition("failed: ")[2]
    assert "noise size" in failed and "ledger" not in failed and "ok" in done.out and "FAILED" in done.out
    text = " ".join(done.out.split())
    assert "claimed epsilon" in text and "none is asked for" in text and "Seen: 3 of 3 clients" in text
    assert "a factor 2 in the sensitivity" in text


def test_it_refuses_other_units(fedpeft):
    done = fedpeft("audit", "quickstart")
    assert done.code == 2 and "privacy.unit=none" in done.err and "Set privacy.unit=sample" in done.err
