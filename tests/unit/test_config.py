"""The config: what is refused, and how the message helps."""

from __future__ import annotations

import time

import pytest

from fedpeft.config import load
from fedpeft.errors import InputError
from support.refused_configs import refused

# Unknown keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"runn": {}},
            ("runn", "Did you mean 'run'?", "Allowed: model, adapter, data, strategy, client, privacy, secagg, run"),
        ),
        ({"run": {"round": 3}}, ("run.round", "Did you mean 'rounds'?", "clients_per_round")),
        ({"client": {"learning": 1}}, ("client.learning", "local_steps", "batch_size")),
        (
            {"strategy": {"name": "fedsvd", "evry": 2}},
            ("strategy.evry", "Did you mean 'every'?", "transport", "FedSVD"),
        ),
        ({"strategy": {"name": "fedit", "every": 2}}, ("strategy.every", "weighting", "FedIT has the options none")),
        ({"data": {"partition": {"name": "dirichlet", "alfa": 1}}}, ("data.partition.alfa", "Did you mean 'alpha'?")),
        ({"adapter": {"rank": 4}}, ("adapter.rank", "Allowed: name, r, alpha")),
        ({"strategy": {"options": {"every": 2}}}, ("strategy.options",)),
        (
            {"strategy": {"name": "fedit", "wrap": [{"name": "norm_clip", "bond": 1}]}},
            ("bond", "Did you mean 'bound'?"),
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_allowed(tree, words):
    refused(tree, (), *words)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"strategy": "fedsdv"}, ("strategy.name", "'fedsdv'", "Did you mean 'fedsvd'?", "fedit")),
        ({"adapter": "lorra"}, ("adapter.name", "Did you mean 'lora'?", "lora_sb")),
        ({"data": {"partition": "dirichelt"}}, ("data.partition.name", "Did you mean 'dirichlet'?", "iid")),
        ({"strategy": {"wrap": ["medain"]}}, ("strategy.wrap", "Did you mean 'median'?")),
    ],
)
def test_an_unknown_method_is_named_with_the_nearest_and_the_allowed(tree, words):
    refused(tree, (), *words)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.rounds", "many"),
        ("run.rounds", 2.5),
        ("run.rounds", [3]),
        ("run.rounds", True),
        ("client.lr", "fast"),
        ("client.lr", False),
        ("run.clients_per_round", True),
        ("run.deadline_s", True),
        ("adapter.client_ranks", 4),
        ("adapter.client_ranks", ["a"]),
        ("adapter.rslora", "maybe"),
        ("client.lr", {"value": 1}),
        ("run.rounds", None),
        ("strategy.weighting", None),
        ("data.source", ["a"]),
        ("run.seed", "x"),
    ],
)
def test_a_wrong_type_names_key_and_value(key, value):
    refused({}, {key: value}, key, repr(value))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fedsvd", "strategy.every", True),
        ("fedsvd", "strategy.every", 1.5),
        ("lora_fair", "strategy.lambda", "big"),
        ("lora_fair", "strategy.lambda", True),
    ],
)
def test_a_wrong_type_of_a_methods_option(name, key, value):
    refused({"strategy": name}, {key: value}, key, repr(value))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("run.rounds", 0, ">= 1"),
        ("run.seed", -1, ">= 0"),
        ("client.lr", 0.0, "> 0"),
        ("client.lr", -1e-3, "> 0"),
        ("client.momentum", 1.5, "<= 0.9999"),
        ("run.quorum", 1.5, "<= 1"),
        ("run.quorum", 0, "> 0"),
        ("adapter.r", 0, ">= 1"),
        ("adapter.dropout", 1.0, "<= 0.99"),
        ("data.test_fraction", 0.0, "> 0"),
        ("client.lr", float("nan"), "> 0"),
        ("client.batch_size", -4, ">= 1"),
    ],
)
def test_a_value_out_of_range_names_its_bounds(key, value, allowed):
    refused({}, {key: value}, key, "out of range", allowed)


def test_bounds_of_a_methods_option():
    refused({"strategy": "fedsvd"}, {"strategy.every": 0}, "strategy.every", "0")
    refused({"strategy": "lora_fair"}, {"strategy.lambda": -1.0}, "strategy.lambda", "-1")
    refused({"data": {"partition": "dirichlet"}}, {"data.partition.alpha": 0}, "data.partition.alpha", "> 0")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run.engine", "rya", ("Did you mean 'ray'?", "cohort, ray")),
        ("client.optimizer", "sdg", ("Did you mean 'sgd'?", "adamw, sgd")),
        ("strategy.weighting", "equal", ("examples, uniform",)),
        ("model.task", "image", ("image-classification",)),
    ],
)
def test_a_choice_is_named_with_the_allowed(key, value, words):
    refused({}, {key: value}, key, *words)


def test_a_section_must_be_a_mapping():
    refused({"run": 3}, (), "run", "rounds", "3")
    refused({"client": "sgd"}, (), "client", "local_steps")


# Combinations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"client.local_steps": 5, "client.local_epochs": 2},
        {"client.local_steps": None, "client.local_epochs": None},
        {"client.local_steps": 5},  # the default of local_epochs is 1
    ],
)
def test_give_steps_or_epochs(overrides):
    refused({}, overrides, "client.local_steps", "client.local_epochs", "exactly one")


@pytest.mark.parametrize(
    ("name", "task"), [("tiny-vit", "image-classification"), ("tiny-llama", "causal-lm"), ("x", "token-classification")]
)
def test_a_mean_pooled_head_is_for_texts_as_a_whole(name, task):
    refused({"model": {"name": name, "task": task}}, {"model.pooling": "mean"}, "model.pooling=mean", task)
    assert load({"model": {"name": name, "task": task}}, {"model.pooling": "model"}).model.pooling == "model"


def test_steps_alone_are_fine():
    assert load({}, {"client.local_steps": 5, "client.local_epochs": None}).client.local_steps == 5


def test_more_clients_a_round_than_there_are():
    refused({}, {"run.clients_per_round": 11}, "run.clients_per_round=11", "data.clients=10")
    assert load({}, {"run.clients_per_round": 10}).run.clients_per_round == 10


def test_a_deadline_needs_a_process_to_stop():
    refused({}, {"run.deadline_s": 5}, "run.deadline_s", "run.workers")
    assert load({}, {"run.deadline_s": 5, "run.workers": 1}).run.deadline_s == 5


@pytest.mark.parametrize("ranks", [[4, 5], [0, 1]])
def test_client_ranks_are_between_1_and_r(ranks):
    refused(
        {"strategy": "hetlora"}, {"adapter.r": 4, "adapter.client_ranks": ranks}, "adapter.client_ranks", "adapter.r=4"
    )


def test_client_ranks_need_a_strategy_that_takes_them():
    for name in ("fedit", "fedsvd", "lora_fair", "fedex"):
        message = refused({"strategy": name}, {"adapter.client_ranks": [2, 4]}, name, "equal ranks")
        for able in ("flora", "flexlora", "hetlora"):
            assert able in message
    for name in ("flora", "flexlora", "hetlora"):
        assert load({"strategy": name}, {"adapter.client_ranks": [2, 4]}).adapter.client_ranks == [2, 4]


def test_strategy_and_adapter_must_belong_together():
    refused({"strategy": "fed_sb"}, (), "strategy.name=fed_sb", "adapter.name=lora_sb")
    refused({"strategy": "fedit", "adapter": "lora_sb"}, (), "strategy.name=fedit", "lora_sb")
    assert load({"strategy": "fed_sb", "adapter": "lora_sb"}).adapter.name == "lora_sb"


def test_a_personalised_strategy_needs_records_to_evaluate_on():
    refused({"strategy": "fedsa"}, (), "fedsa", "data.holdout")
    assert load({"strategy": "fedsa"}, {"data.holdout": 0.2}).strategy.name == "fedsa"


def test_auto_dtype_is_left_to_the_run():
    assert load({}, {"model.dtype": "auto", "strategy.name": "fedex"}).model.dtype == "auto"
    assert load({}).model.dtype == "float32"


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_a_rounded_base_cannot_be_moved(name):
    refused({"strategy": name}, {"model.dtype": "bfloat16"}, name, "model.dtype")


# Wrappers ------------------------------------------------------------------------------------------------------------


def test_wrappers_by_name_or_with_options():
    from fedpeft.strategies.build import build

    config = load({"strategy": {"name": "ffa_lora", "wrap": ["median", {"name": "norm_clip", "bound": 2.0}]}})
    strategy = build(config)
    assert type(strategy).__name__ == "NormClip" and strategy.config.bound == 2.0
    assert type(strategy.inner).__name__ == "Median" and type(strategy.inner.inner).__name__ == "FFALoRA"


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (["fedsvd"], ("strategy.wrap", "'fedsvd'", "norm_clip")),
        ([3], ("strategy.wrap", "3", "median")),
        ([{"bound": 1}], ("strategy.wrap", "name")),
        ([{"name": "norm_clip", "bound": "x"}], ("bound", "'x'")),
        ([{"name": "trimmed_mean", "fraction": 0.7}], ("fraction", "0.7")),
    ],
)
def test_a_bad_wrapper_is_refused(wrap, words):
    refused({"strategy": {"wrap": wrap}}, (), *words)


@pytest.mark.parametrize("wrapper", ["scaffold", "fedadam"])
def test_a_wrapper_with_state_by_coordinate_is_refused_on_a_moving_basis(wrapper):
    refused({"strategy": {"name": "fedsvd", "wrap": [wrapper]}}, (), wrapper, "fedsvd")


def test_unequal_ranks_are_refused_under_a_wrapper_too():
    refused({"strategy": {"name": "fedit", "wrap": ["fedprox"]}}, {"adapter.client_ranks": [1, 2]}, "equal ranks")


@pytest.mark.parametrize("change", [{}, {"client.momentum": 0.9}, {"client.max_grad_norm": 1.0}])
@pytest.mark.parametrize("wrap", [["scaffold"], ["scaffold", "median"]])
def test_scaffold_takes_plain_sgd_only(wrap, change):
    plain = {"strategy.wrap": wrap, "client.optimizer": "sgd"}
    assert load({}, plain).client.optimizer == "sgd"
    bad = {**plain, **change} if change else {"strategy.wrap": wrap}
    with pytest.raises(InputError, match=r"client\.optimizer=(adamw|sgd).*Set client\.optimizer=sgd"):
        load({}, bad)


def test_a_list_of_ranks_without_a_rank_is_refused():
    refused({"strategy": "flora"}, {"adapter.client_ranks": []}, "adapter.client_ranks=[]", "null")


def test_ten_thousand_class_names_are_looked_through_once():
    """Counting each among all took a minute of CPU time for so many."""
    names = [f"class-{number}" for number in range(50_000)]
    began = time.process_time()
    load({}, {"data.labels": names})
    assert time.process_time() - began < 10
    refused({}, {"data.labels": [*names, "class-7"]}, "class-7 stands there twice")


@pytest.mark.parametrize("left_out", [[0, 1, 2, 3, 4], [0, 0, 7], [-1]])
def test_a_sequence_learns_at_least_one_task_and_leaves_out_only_its_own(left_out):
    changes = {"continual.body": "sequential", "continual.leave_out": left_out}
    refused({}, changes, f"continual.leave_out={left_out}", "one at least is learned")
