"""Sample-level DP in a sequence of tasks: an account for each, with its sums, and what a policy or a server may ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft import config as configs
from fedpeft.clients import sequence
from fedpeft.clients.local import Local
from fedpeft.errors import InputError, RunError
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import BudgetExhausted, Ledger
from fedpeft.run.world import load_world
from support.classified import NOT_ON_NOISED_SUMS, ON_NOISED_SUMS
from support.sequences import DP_LDA, SMALL, ended


@pytest.fixture
def private(go, tmp_path, monkeypatch):
    """A finished private run with an LDA head: its world, and the requests for sums (client, received, task)."""
    asked, sums = [], Local.sums
    monkeypatch.setattr(Local, "sums", lambda self, *request: (asked.append(request), sums(self, *request))[1])
    summary = go("run", "continual_dp", DP_LDA)
    run = tmp_path / "run"
    return summary, load_world(configs.load(run / "resolved.yaml"), run), asked


def test_every_task_has_an_account_with_its_training_and_its_sums(private, tmp_path):
    summary, here, asked = private
    table, folder = {}, tmp_path / "run" / "ledger"
    assert sorted(path.stem for path in folder.glob("*")) == [
        f"client-{client:03d}+task-{task}" for client in range(3) for task in range(2)
    ]
    for path in folder.glob("*.jsonl"):
        entries, task = Ledger(path).entries(), int(path.stem[-1])
        client = path.stem.partition("+")[0]
        assert [(entry.round, entry.noise_multiplier, entry.steps) for entry in entries] == [
            (2 * task + 1, 1.0, 2),
            (2 * task + 2, 1.0, 2),
            (2 * task + 2, 2.0, 1),
        ]
        data = here.local.train_data[client]
        mine = int(torch.isin(data.labels, torch.tensor(here.strategy.curriculum.groups[task])).sum())
        assert [entry.sample_rate for entry in entries] == [8 / mine, 8 / mine, 1.0]
        cost = compose_epsilon(((8 / mine, 1.0, 4), (1.0, 2.0, 1)), 1e-3, "rdp")
        table[client] = max(cost, table.get(client, 0.0))
    for client, epsilon in table.items():
        assert summary["privacy"]["clients"][client]["epsilon"] == pytest.approx(epsilon, abs=1e-9)
        assert summary["privacy"]["clients"][client]["steps"] == 8
    assert len(asked) == 6


def test_sums_are_in_the_ledger_before_they_leave_and_cost_once(private, tmp_path, monkeypatch):
    _, here, asked = private
    client, received, task = asked[-1]
    path = tmp_path / "run" / "ledger" / f"{client}+task-1.jsonl"
    before = path.read_bytes()
    one, two = here.local.sums(client, received, task), here.local.sums(client, received, task)
    assert one[0].sha256() == two[0].sha256() and one[1] == {"num-examples": 1.0} and path.read_bytes() == before
    with pytest.raises(BudgetExhausted):  # one view of the head is planned, and it is spent
        here.local.sums(client, received, replace(task, view="another"))

    def fail(*arguments):
        raise ValueError("record 17 is odd")

    monkeypatch.setattr(sequence, "private_head_sums", fail)
    monkeypatch.setattr(here.local.store, "reply", lambda *request: None)
    path.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))  # as before the sums were asked for
    with pytest.raises(RunError, match="the reason stays with it"):
        here.local.sums(client, received, task)
    last = Ledger(path).entries()[-1]
    assert (last.round, last.noise_multiplier, last.steps) == (4, 2.0, 1), "what may have left is counted"


def test_a_policy_bounds_what_a_record_may_spend_in_its_task(go, tmp_path):
    """The tasks of a run do not add up: a policy that pays for one task pays for all, and for no more than that."""
    task = compose_epsilon(((8 / 60, 1.0, 4), (1.0, 2.0, 1)), 1e-3, "rdp")
    for name, epsilon in (("enough", 2 * task), ("little", 0.2 * task)):
        (tmp_path / f"{name}-policies").mkdir()
        for client in range(3):
            (tmp_path / f"{name}-policies" / f"client-{client:03d}.yaml").write_text(
                f"max_epsilon: {epsilon}\nmax_delta: 0.01\nseeded_noise: true\nunbounded: [max_rounds, records]\n"
            )
    summary = go("run", "continual_dp", {**DP_LDA, "privacy.policy": str(tmp_path / "enough-policies")})
    assert len(summary["continual"]["right"]) == 2 and not summary["quarantined"]
    with pytest.raises(RunError, match=r"budget exhausted: .* for all runs together"):
        go("stopped", "continual_dp", {**DP_LDA, "privacy.policy": str(tmp_path / "little-policies")})


def test_a_server_cannot_open_a_new_account_for_the_same_records(private):
    """The guarantee is against the server too: which task its records belong to, a client knows by itself."""
    _, here, asked = private
    client, received, task = asked[-1]
    for wrong in (7, 0):
        spent = here.local.guard.spending([client])[client]["epsilon"]
        with pytest.raises((RunError, InputError)):
            here.local.sums(client, received, replace(task, learn=replace(task.learn, task=wrong)))
        assert here.local.guard.spending([client])[client]["epsilon"] == spent
    train = replace(here.strategy.instructions(ended(here.local.guard.folder.parent)), round=9, learn=None)
    with pytest.raises((RunError, InputError)):
        here.local.train(client, received, train)


def test_a_run_that_is_asked_for_an_epsilon_claims_no_more_with_its_heads_sums(go):
    summary = go("run", "continual_dp", {**DP_LDA, "privacy.noise_multiplier": None, "privacy.epsilon": 3.0})
    claims = [client["epsilon"] for client in summary["privacy"]["clients"].values()]
    assert len(claims) == 3 and 2.9 < max(claims) <= 3.0 and not summary["quarantined"]


@pytest.mark.parametrize("name", ON_NOISED_SUMS)
def test_a_head_that_can_is_fitted_on_noised_sums(name, go):
    """Noised counts may be negative and a noised Gram matrix has negative eigenvalues: no reason to lose a run."""
    summary = go("run", "continual_dp", {"continual.head": name, "continual.statistics_noise": 1.0})
    assert len(summary["continual"]["right"]) == 2


@pytest.mark.parametrize("name", NOT_ON_NOISED_SUMS)
def test_a_head_that_cannot_is_refused_beforehand(name):
    more = {"continual.head": name, "continual.head_options": NOT_ON_NOISED_SUMS[name]}
    with pytest.raises(InputError, match=f"continual.head={name}"):
        configs.load("continual_dp", {**SMALL, **more, "continual.statistics_noise": 1.0})
