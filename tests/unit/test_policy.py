"""A site's policy holds whatever the server asks, before a record is read; and what leaves a private client."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedpeft.clients import inputs, policy, train
from fedpeft.clients import local as locals_
from fedpeft.clients.app import Local, client_app
from fedpeft.clients.guard import Guard
from fedpeft.clients.policy import Policy, Refused
from fedpeft.clients.store import Store
from fedpeft.config import ClientConfig, Config, PrivacyConfig, RunConfig, StrategyConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.privacy.accounting import compose_epsilon
from fedpeft.privacy.ledger import BudgetExhausted
from fedpeft.simulations.workers import handle_message
from fedpeft.strategies.wire import PACKED
from support import instructed
from support import small_models as small
from support.allowed import opened
from support.instructed import task

pytestmark = pytest.mark.usefixtures("flower_run")

CLIENT = ClientConfig(optimizer="sgd", local_steps=2, local_epochs=None, batch_size=4)
RECORDS = 12


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small.adapted(small.save("bert", tmp_path_factory.mktemp("models") / "bert"), "bert")


class Locked(dict):
    """Records that may not be touched, not even counted."""

    def touched(self, *arguments):
        raise AssertionError("a record was read")

    __getitem__ = __contains__ = __len__ = __iter__ = get = keys = values = items = touched


@pytest.fixture
def site(bert, tmp_path):
    """`site(policy text, config changes)`: a client "a" with twelve records; `locked` forbids to read them."""

    def make(text=None, locked=False, run="run", client=CLIENT, strategy=None, rounds=3, **privacy):
        settings = {"unit": "sample", "noise_multiplier": 1.0, "accountant": "rdp", "randomness": "os", **privacy}
        if settings.get("epsilon"):
            settings["noise_multiplier"] = None
        if text is not None:
            (tmp_path / "policy.yaml").write_text(opened(text))
            settings["policy"] = str(tmp_path / "policy.yaml")
        config = Config(
            client=client,
            privacy=PrivacyConfig(**settings),
            run=RunConfig(rounds=rounds),
            strategy=strategy or StrategyConfig(weighting="uniform"),
        )
        data = {"a": small.texts(RECORDS)}
        start = small.randomised(bert)
        return Local(
            config,
            bert,
            start,
            Locked() if locked else data,
            Locked() if locked else data,
            Store(tmp_path / run, 3),
            Guard(config, tmp_path / "ledger", run),
        )

    return make


def ask(local, number=1, **more):
    strategy, start = local.own.strategy, local.own.start
    told = instructed.changed(strategy.instructions(start), round=number, **more)
    return local.train("a", strategy.broadcast(start, "a"), told)


def message(local, kind="train", number=1):
    """What the server gets back for one message."""
    app = client_app(lambda: local, lambda context: "a")
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict({}), run_config={})
    return handle_message(app, Message(PACKED.content(local.initial, task(number)), 2, kind), context)[0]


# Bounds ---------------------------------------------------------------------------------------------------------------

MEDIAN = StrategyConfig(name="fedsvd", wrap=["median"])
BOUNDS = [
    ("", {"unit": "none"}, r"privacy\.unit=none.*must be sample"),
    ("", {"unit": "client"}, r"privacy\.unit=client.*must be sample"),
    ("max_epsilon: 3.0", {"epsilon": 3.1}, r"privacy\.epsilon=3\.1 is over max_epsilon=3"),
    ("", {"delta": 2e-5}, r"privacy\.delta=2e-05 is over max_delta=1e-05"),
    ("max_delta: 1.0e-6", {"delta": 1e-5}, r"privacy\.delta=1e-05 is over max_delta=1e-06"),
    ("min_noise_multiplier: 1.5", {}, r"privacy\.noise_multiplier=1 is under 1\.5"),
    ("max_rounds: 2", {}, "3 rounds are over max_rounds=2"),
    ("max_rounds: 4", {"number": 5}, "5 rounds are over max_rounds=4"),
    ("strategies: [ffa_lora]", {}, "strategy fedit is not among ffa_lora"),
    ("strategies: [fedsvd]", {"strategy": MEDIAN}, "fedsvd, median is not among fedsvd"),
    ("strategies: [median]", {"strategy": MEDIAN}, "fedsvd, median is not among median"),
    ("strategies: [fedsvd]", {"strategy": replace(MEDIAN, wrap=[{"name": "median"}])}, "median is not among fedsvd"),
    ("", {"release_metrics": True}, r"privacy\.release_metrics sends train_loss.*allowed: none"),
    ("metrics: [loss, accuracy, train_loss]", {"release_metrics": True}, "num-examples; allowed: loss, accuracy"),
    ("", {"randomness": "seeded"}, r"privacy\.randomness=seeded is reproducible; it must be os"),
    ("{min_noise_multiplier: 9.0, records: 50}", {"epsilon": 3.0}, "noise multiplier is under 9"),
]


@pytest.mark.parametrize(("text", "asked", "reason"), BOUNDS)
def test_a_bound_is_kept_before_a_record_is_read(text, asked, reason, site, tmp_path):
    asked = dict(asked)
    number = asked.pop("number", 1)
    local = site(text, locked=True, **asked)
    with pytest.raises(Refused, match=reason):
        ask(local, number)
    reply = message(local, number=number)
    assert reply.has_error() and "refused by the site's policy" in reply.error.reason
    assert not (tmp_path / "ledger").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "asked", "reason"), [bound for bound in BOUNDS if "number" not in bound[1]])
def test_evaluation_is_bound_in_the_same_way(text, asked, reason, site):
    with pytest.raises(Refused):
        site(text, locked=True, **asked).evaluate("a", site(text, **asked).initial, task())


def test_all_reasons_are_given_at_once(site):
    with pytest.raises(Refused) as caught:
        ask(
            site(
                "{max_epsilon: 1.0, max_rounds: 2, strategies: [fedsvd]}",
                locked=True,
                epsilon=2.0,
                delta=1e-4,
                randomness="seeded",
            )
        )
    for part in ("max_epsilon=1", "max_delta", "max_rounds=2", "fedit", "seeded"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (None, {"randomness": "seeded", "delta": 1e-3}),
        ("", {}),
        ("{max_epsilon: 3.0, max_delta: 1.0e-5, max_rounds: 3, strategies: [fedit]}", {"epsilon": 3.0}),
        ("min_noise_multiplier: 1.0", {}),
        ("strategies: [fedsvd, median]", {"strategy": MEDIAN}),
        ("metrics: [train_loss, loss, accuracy, num-examples]", {"release_metrics": True}),
        ("seeded_noise: true", {"randomness": "seeded"}),
        ("unit: none", {"unit": "none"}),
    ],
)
def test_what_is_within_the_bounds_is_trained(text, asked, site):
    local = site(text, **asked)
    assert ask(local)[0].distance(local.initial) > 0


def test_the_sites_own_number_of_records_sets_the_rate(site):
    local = site("records: 40", records=20)
    ask(local)
    assert local.guard.ledger("a").entries()[0].sample_rate == 4 / 40
    other = site(None, run="other", records=20)
    ask(other)
    assert other.guard.ledger("a").entries()[1].sample_rate == 4 / 20


def test_max_epsilon_bounds_all_runs_together(site):
    """Two servers, or one that asks again under another name, draw on the same records."""
    two = compose_epsilon(((4 / RECORDS, 1.0, 4),), 1e-5, "rdp")
    text = f"max_epsilon: {two}"
    ask(site(text, run="one"))
    second = site(text, run="two")
    ask(second)
    with pytest.raises(BudgetExhausted, match="all runs together"):
        ask(second, 2)
    with pytest.raises(BudgetExhausted, match="all runs together"):
        ask(site(text, run="three"))


def test_a_server_that_numbers_every_round_as_the_first_gets_no_more_of_them(site):
    local = site("max_rounds: 2", rounds=2, planned_rounds=50)
    for number in (1, 2):
        local.train("a", local.initial.map(lambda value, number=number: number * value), task(1))
    with pytest.raises(Refused, match="max_rounds=2"):
        local.train("a", local.initial.map(lambda value: 3 * value), task(1))


def test_a_site_that_lists_no_metrics_sends_none_without_privacy_either(site):
    _, metrics = ask(site("{unit: none, metrics: [num-examples]}", unit="none"))
    assert set(metrics) == {"num-examples"}


# The file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_epsilonn: 3", r"policy\.max_epsilonn.*Did you mean 'max_epsilon'"),
        ("max_epsilon: 0", r"policy\.max_epsilon: 0.* out of range; allowed: > 0"),
        ("max_epsilon: .nan", r"policy\.max_epsilon: nan"),
        ("max_epsilon: much", r"policy\.max_epsilon: 'much'"),
        ("max_delta: 0.6", r"policy\.max_delta: 0\.6"),
        ("min_noise_multiplier: -1", r"policy\.min_noise_multiplier: -1"),
        ("max_rounds: 0", r"policy\.max_rounds: 0"),
        ("records: 0", r"policy\.records: 0"),
        ("unit: client", r"policy\.unit: 'client'.*Allowed: sample, none"),
        ("metrics: [losses]", r"policy\.metrics: losses not known. Allowed: train_loss, loss"),
        ("strategies: fedit", r"policy\.strategies: 'fedit'"),
        ("[max_epsilon]", "expected a mapping"),
        ("{max_epsilon: 3", "not readable as YAML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(text, reason, tmp_path, site):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        policy.load(tmp_path / "policy.yaml")
    local = site("", locked=True)
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(Refused, match="policy is not valid now") as caught:  # and nothing is trained under it
        ask(local)
    assert str(tmp_path) not in str(caught.value)


def test_a_policy_that_is_not_there_protects_nobody_and_is_refused(tmp_path, site):
    with pytest.raises(InputError, match=r"no file .*none\.yaml"):
        policy.load(tmp_path / "none.yaml")
    with pytest.raises(Refused, match="not valid now"):
        ask(site(locked=True, policy=str(tmp_path / "none.yaml")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refused, match="not valid now"):
        ask(site(locked=True, policy=str(tmp_path / "folder")))
    (tmp_path / "folder" / "a.yaml").write_text("max_rounds: 1\nunbounded: [max_epsilon, records]")
    found = policy.of_client(str(tmp_path / "folder"), "a")
    assert found == Policy(max_rounds=1, unbounded=["max_epsilon", "records"])


def test_what_a_policy_does_not_say_is_the_careful_choice():
    assert Policy() == Policy(unit="sample", max_delta=1e-5, metrics=[], seeded_noise=False, records=None)


# What leaves ----------------------------------------------------------------------------------------------------------


def test_an_update_leaves_and_the_number_one(site):
    local = site()
    update, metrics = ask(local)
    assert metrics == {"num-examples": 1.0}
    reply = message(site(run="other"))
    assert set(reply.content) == {"arrays", "config", "metrics"}
    assert dict(reply.content["metrics"]) == {"num-examples": 1.0}
    assert set(reply.content["config"]) == {"manifest", "task"}
    assert json.loads(reply.content["config"]["task"]) == {"round": 1}
    answered, _ = PACKED.open(reply.content)
    update.require_same_form(answered, "reply")


def test_nothing_but_the_tensors_depends_on_the_records(site):
    few, many = site(run="few", records=10), site(run="many", records=10)
    few.train_data["a"] = small.texts(7, seed=5)
    replies = [message(local) for local in (few, many)]
    for part in ("config", "metrics"):
        assert dict(replies[0].content[part]) == dict(replies[1].content[part])
    arrays = [reply.content["arrays"]["adapter"] for reply in replies]
    assert arrays[0].shape == arrays[1].shape and arrays[0].dtype == arrays[1].dtype


def test_metrics_are_released_only_by_request(site):
    assert set(ask(site(run="without"))[1]) == {"num-examples"}
    _, metrics = ask(site(run="with", release_metrics=True))
    assert metrics["num-examples"] == RECORDS and 0 < metrics["train_loss"] < 10


def test_evaluation_is_refused(site):
    local = site()
    with pytest.raises(Refused, match=r"not covered by the guarantee; privacy\.release_metrics is false"):
        local.evaluate("a", local.initial, task())
    local = site(locked=True)
    reply = message(local, "evaluate")
    assert reply.has_error() and "not covered by the guarantee" in reply.error.reason
    scores = message(site(release_metrics=True), "evaluate").content["metrics"]
    assert set(scores) == {"accuracy", "loss", "num-examples"}


SECRET = "Alice Example, born 1970"


def failing(*arguments, **keywords):
    raise ValueError(f"cannot parse {SECRET!r}")


PLACES = {
    "train": locals_,
    "verify": inputs,
    "plan": Guard,
    "per_sample_loss": inputs,
    "per_sample_gradients": train,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_text_of_an_exception_stays_with_the_client(place, site, monkeypatch, caplog):
    monkeypatch.setattr(PLACES[place], place, failing)
    reply = message(site())
    assert reply.has_error()
    assert "the client failed; the reason stays with it" in reply.error.reason
    for word in ("Alice", "1970", "parse", "ValueError"):
        assert word not in reply.error.reason
    assert SECRET in caplog.text  # the site can see what went wrong


def test_without_privacy_the_text_is_told(site, monkeypatch):
    """The test above sees what it looks for."""
    monkeypatch.setattr(locals_, "train", failing)
    assert SECRET in message(site(unit="none")).error.reason


def test_records_that_cannot_be_used_are_not_described(site):
    """Too few for the plan are told as any failure; a label of no class is a record without influence."""
    few, broken = site(run="few"), site(run="broken")
    few.train_data["a"] = small.texts(3)
    reason = message(few).error.reason.split(" at ")[0]
    assert "the reason stays with it" in reason and "3" not in reason
    labels = broken.train_data["a"].labels.clone()
    labels[0] = 77
    broken.train_data["a"] = Encoded(broken.train_data["a"].inputs, labels)
    assert not message(broken).has_error()


def test_refusals_and_spent_budgets_are_told(site):
    local = site(rounds=1)
    ask(local)
    assert "budget exhausted" in message(local, number=2).error.reason
    assert "max_rounds=2" in message(site("max_rounds: 2", run="other")).error.reason


def test_the_tensors_of_a_reply_are_finite(site):
    update, _ = ask(site(clip=1e-3))
    assert all(torch.isfinite(value).all() for value in update.tensors.values())
