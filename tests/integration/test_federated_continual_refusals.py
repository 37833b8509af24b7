"""Federated continual learning: what cannot work is refused before anything is loaded, with the key and a way out."""

from __future__ import annotations

import pytest

from fedpeft import config as configs
from fedpeft.clients.guard import Guard
from fedpeft.errors import InputError
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import BudgetExhausted
from fedpeft.simulations.run import simulate

DP_LDA = {"continual.head": "lda", "continual.statistics_noise": 2.0}
SAMPLE = {
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-3,
    "strategy.weighting": "uniform",
}
CLIENT = {**SAMPLE, "privacy.unit": "client", "privacy.delta": 0.1}
SECAGG = {"secagg.enabled": True, "strategy.weighting": "uniform"}
COSO_LINEAR = ("continual_coso", {"continual.head": "linear"})
REFUSED = {
    "rounds": ("continual", {"run.rounds": 16}, r"continual\.tasks=5: run\.rounds=16 is not a multiple"),
    "causal": (
        "causal_lm",
        {"continual.body": "sequential", "run.rounds": 5},
        r"continual\.body.*model\.task=causal-lm has none",
    ),
    "head": ("continual", {"adapter.train_head": False}, r"adapter\.train_head=false.*Set adapter\.train_head=true"),
    "client-lda": ("continual", CLIENT, r"privacy\.unit=client: .*continual\.head=ranpac.*Set continual\.head=linear"),
    "client-coso": (
        COSO_LINEAR[0],
        {**COSO_LINEAR[1], **CLIENT},
        r"privacy\.unit=client: .*continual\.body=coso.*continual\.basis=random",
    ),
    "secagg-lda": ("continual", SECAGG, r"secagg\.enabled=true.*ranpac.*Set continual\.head=linear"),
    "secagg-coso": (
        COSO_LINEAR[0],
        {**COSO_LINEAR[1], **SECAGG},
        r"secagg\.enabled=true.*coso.*continual\.basis=random",
    ),
    "noise": (
        "continual",
        {"continual.statistics_noise": 1.5},
        r"statistics_noise=1\.5: .*privacy\.unit=none.*Set it to null",
    ),
    "replay": ("continual_conpet", SAMPLE, r"privacy\.unit=sample: continual\.body=conpet_static.*without replay"),
    "sketch": (
        COSO_LINEAR[0],
        {**COSO_LINEAR[1], **SAMPLE},
        r"privacy\.unit=sample.*coso.*Set continual\.basis=random",
    ),
    "fitted": ("continual_dp", {"continual.head": "lda"}, r"continual\.head=lda.*Set continual\.statistics_noise"),
    "epsilon": (
        "continual_dp",
        {**DP_LDA, "privacy.epsilon": 1.0, "privacy.noise_multiplier": None},
        r"privacy\.epsilon=1: the sums for continual\.head=lda cost 1\.[0-9]+ of it.*nothing is left",
    ),
    "epsilon-views": (
        "continual_dp",
        {
            **DP_LDA,
            "privacy.epsilon": 1.6,
            "privacy.noise_multiplier": None,
            "continual.body": "lae",
            "strategy.name": "ffa_lora",
        },
        r"privacy\.epsilon=1\.6: the sums .* cost [12]\.[0-9]+ of it.*statistics_noise=2\.",
    ),
    "lacking": (
        "continual_coso",
        {"continual.side": "out", "strategy": "ffa_lora", "strategy.transport": "dense"},
        r"body=coso: it needs clients that train A.* ffa_lora trains B, head\. Set continual\.side=in",
    ),
    "rule": (
        "continual_coso",
        {"strategy": "lora_fair"},
        r"continual\.body=coso: .*lora_fair cannot do\. Strategies that can: fedit, ffa_lora, fedsvd",
    ),
    "olora": (
        "continual",
        {"continual.body": "olora"},
        r"continual\.body=olora: a federation cannot run it, as it penalises .*Bodies that it can run: frozen",
    ),
    "er": ("continual", {"continual.body": "er"}, r"as it keeps one reservoir of raw records.*conpet_static"),
    "learners": (
        "continual_coso",
        {"continual.r1": 3},
        r"continual\.r1: directions that a step moves in \(for one learner only\)\. In a federation CoSO has",
    ),
    "learners-rank": ("continual", {"continual.body": "merging", "continual.r": 3}, r"continual\.r: .*else adapter\.r"),
    "moved-base": (
        "continual",
        {"continual.body": "merging", "strategy": "flora"},
        r"body=merging: what a task trains must stay in the factors, but strategy flora .*do not: fedit",
    ),
    "rests": ("continual", {"continual.body": "fsa", "strategy": "fedex"}, r"continual\.body=fsa: .*fedex"),
    "new-factors": (
        "continual_coso",
        {"strategy.wrap": ["scaffold"], "client.optimizer": "sgd"},
        r"body=coso: every task has new factors, .* control.*Take scaffold out of strategy\.wrap",
    ),
    "surveys": ("continual_dp", {"continual.body": "inflora"}, r"privacy\.unit=sample.*inflora.*without sketches"),
    "fixed-A": (
        "continual",
        {"continual.body": "merging", "continual.start": "orthogonal", "strategy": "lora_fair"},
        r"body=merging: one factor stays.*lora_fair",
    ),
    "merger-option": (
        "continual",
        {"continual.body": "merging", "continual.method_options": {"alhpa": 1.0}},
        r"continual\.method_options.*alhpa",
    ),
    "keeps": (
        "continual_lae",
        {"strategy": "fedsa", "data.holdout": 0.2},
        r"continual\.body=lae: strategy fedsa leaves B, head with each client",
    ),
    "core": (
        "continual",
        {"continual.side": "in", "strategy.transport": "core"},
        r"strategy\.transport=core: continual\.body=factor_coso.*Set strategy\.transport=dense",
    ),
    "seed": (
        "continual",
        {"continual.side": "in", "strategy": "ffa_lora"},
        r"strategy\.transport=seed: .*Set strategy\.transport=dense",
    ),
    "body": ("continual", {"continual.body": "cosso"}, r"continual\.body: 'cosso' is not known.*coso"),
    "option": ("continual", {"continual.side": "left"}, r"continual\.side.*left.*in.*out.*both"),
    "headname": ("continual", {"continual.head": "lad"}, r"continual\.head: 'lad' is not known.*lda"),
    "headoption": ("continual", {"continual.head_options": {"rigde": 1.0}}, r"continual\.head_options.*rigde"),
    "dtype": ("continual", {"model.dtype": "bfloat16"}, r"model\.dtype=bfloat16.*Set model\.dtype=float32"),
    "moving-A": ("continual", {"strategy": "fedex"}, r"continual\.body=factor_coso.*fedex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_is_refused_with_key_and_way_out(case):
    config, overrides, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        configs.load(config, overrides)


def test_more_tasks_than_classes_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"continual\.tasks=12: 10 classes make 1 to 10 tasks"):
        simulate("continual", {"continual.tasks": 12, "run.rounds": 12, "run.baselines": False}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_budget_is_that_of_training_alone_where_no_head_is_fitted(tmp_path):
    """`statistics_noise` beside a head that asks for no sums must not buy more training."""
    private = {
        "client.batch_size": 8,
        "client.local_steps": 2,
        "privacy.accountant": "rdp",
        "privacy.noise_multiplier": None,
        "privacy.epsilon": 3.0,
        "continual.statistics_noise": 1.0,
    }
    for more in ({}, {"continual.body": None}):
        try:
            config = configs.load("continual_dp", {**private, **more})
        except InputError as error:
            assert "statistics_noise" in str(error)
            continue
        plan = Guard(config, tmp_path, "run").plan("client-000", lambda: 60)
        assert plan.budget.epsilon == 3.0


@pytest.mark.parametrize(("body", "views"), [("sequential", 1), ("lae", 2)])
def test_a_task_pays_for_its_rounds_and_the_sums_of_its_bodys_views_and_no_more(tmp_path, body, views):
    config = configs.load(
        "continual_dp",
        {
            **DP_LDA,
            "continual.body": body,
            "strategy.name": "ffa_lora",
            "privacy.accountant": "rdp",
            "client.batch_size": 8,
            "client.local_steps": 2,
        },
    )
    guard = Guard(config, tmp_path, "run")
    plan = guard.plan("client-000", lambda: 60)
    for number in range(1, guard.rounds + 1):
        guard.spend("client-000", number, f"round {number}", plan)
    for view in range(views):
        guard.spend("client-000", guard.rounds, f"view {view}", plan, 2.0)
    with pytest.raises(BudgetExhausted):
        guard.spend("client-000", guard.rounds, "one more", plan, 2.0)
    with pytest.raises(BudgetExhausted):
        guard.spend("client-000", guard.rounds + 1, "one more", plan)


@pytest.mark.parametrize(("body", "views", "noise", "epsilon"), [("sequential", 1, 2.0, 3.0), ("lae", 2, 1.2, 5.0)])
def test_epsilon_pays_for_the_rounds_of_a_task_and_its_sums_together(tmp_path, body, views, noise, epsilon):
    """The noise is the least with which both stay within the epsilon that was asked for."""
    config = configs.load(
        "continual_dp",
        {
            **DP_LDA,
            "continual.statistics_noise": noise,
            "continual.body": body,
            "strategy.name": "ffa_lora",
            "privacy.accountant": "rdp",
            "privacy.noise_multiplier": None,
            "privacy.epsilon": epsilon,
            "client.batch_size": 8,
            "client.local_steps": 2,
        },
    )
    guard = Guard(config, tmp_path, "run")
    plan = guard.plan("client-000", lambda: 60)
    assert plan.budget.epsilon == epsilon
    for number in range(1, guard.rounds + 1):
        guard.spend("client-000", number, f"round {number}", plan)
    for view in range(views):
        guard.spend("client-000", guard.rounds, f"view {view}", plan, noise)
    assert 0.995 * epsilon < guard.ledger("client-000").spent(1e-3, "rdp") <= epsilon
    rate, sigma, steps = plan.release
    less = compose_epsilon(((rate, 0.998 * sigma, steps), (1.0, noise, views)), 1e-3, "rdp")
    assert less > epsilon, "with less noise it would not do"
    with pytest.raises(BudgetExhausted):
        guard.spend("client-000", guard.rounds, "one more", plan, noise)
