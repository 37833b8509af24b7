"""How a config is read: overrides over the file, files that are none, and the resolved YAML that means the same."""

from __future__ import annotations

import copy

import pytest
from omegaconf import OmegaConf

from fedpeft import config as configs
from fedpeft.config import Config, load, to_tree, to_yaml
from fedpeft.errors import InputError
from support.refused_configs import refused

# Merging -------------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  rounds: 3\n  seed: 5\nstrategy:\n  name: fedsvd\n  every: 4\n")
    config = load(path, ["run.rounds=7", "strategy.transport=dense"])
    assert (config.run.rounds, config.run.seed) == (7, 5)
    assert config.strategy.options["every"] == 4 and config.strategy.options["transport"] == "dense"


@pytest.mark.parametrize(
    "overrides", [["strategy=ffa_lora"], ["strategy.name=ffa_lora"], {"strategy.name": "ffa_lora"}]
)
def test_another_name_drops_the_old_methods_options_only(overrides):
    tree = {"strategy": {"name": "fedsvd", "every": 4, "weighting": "uniform", "wrap": ["median"]}}
    strategy = load(tree, overrides).strategy
    assert strategy.name == "ffa_lora" and "every" not in strategy.options
    assert strategy.weighting == "uniform" and strategy.wrap == ["median"]


def test_an_option_beside_a_new_name_belongs_to_the_new_method_in_any_order():
    tree = {"strategy": {"name": "lora_fair", "lambda": 3.0}}
    for overrides in (["strategy.every=2", "strategy.name=fedsvd"], ["strategy=fedsvd", "strategy.every=2"]):
        assert load(tree, overrides).strategy.options["every"] == 2
    assert load(tree, ["strategy.name=lora_fair"]).strategy.options["lambda"] == 3.0  # the same name drops nothing
    assert load(
        {"data": {"partition": {"name": "dirichlet", "alpha": 9}}}, ["data.partition=shards"]
    ).data.partition.options == {"shards_per_client": 2}


@pytest.mark.parametrize(
    ("tree", "override"),
    [
        ({"data": None}, "data.partition=iid"),
        ({"data": {"partition": None}}, "data.partition=iid"),
        ({"strategy": None}, "strategy=fedit"),
        ({}, "data.partition=iid"),
    ],
)
def test_a_section_that_is_empty_in_the_file_takes_an_override_of_its_name(tree, override):
    config = load(tree, [override])
    assert override in (f"data.partition={config.data.partition.name}", f"strategy={config.strategy.name}")


@pytest.mark.parametrize(
    ("tree", "override", "where"),
    [
        ({"data": "mine.csv"}, "data.partition=iid", "data"),
        ({"data": {"partition": ["iid"]}}, "data.partition=shards", "data.partition"),
        ({"strategy": ["fedit"]}, "strategy=fedsvd", "strategy"),
    ],
)
def test_a_section_that_is_none_in_the_file_is_refused_where_an_override_goes_into_it(tree, override, where):
    refused(tree, [override], f": {where} is a value, not a section.")


def test_a_string_for_a_section_is_its_name():
    config = load({"strategy": "fedsvd", "adapter": "lora", "data": {"partition": "iid"}})
    assert (config.strategy.name, config.adapter.name, config.data.partition.name) == ("fedsvd", "lora", "iid")


@pytest.mark.parametrize("text", ["run.rounds", "=3", "rounds"])
def test_an_override_is_key_and_value(text):
    refused({}, [text], text)


@pytest.mark.parametrize("given", [5, None, "run.rounds=5", {5: 1}, [5]])
def test_what_is_neither_texts_nor_a_mapping_of_texts_is_refused(given):
    with pytest.raises(InputError, match=r"^overrides: "):
        load({}, given)


def test_an_override_below_a_value_is_refused():
    refused({"run": {"rounds": 3}}, ["run.rounds.more=3"], "run.rounds")


def test_values_of_overrides_are_read_as_yaml():
    config = load(
        {},
        [
            "client.lr=3e-2",
            "adapter.target_modules=[q_proj,v_proj]",
            "run.clients_per_round=null",
            "adapter.rslora=true",
            "data.text='null'",
        ],
    )
    assert config.client.lr == 0.03 and config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.run.clients_per_round is None and config.adapter.rslora is True


def test_the_caller_keeps_its_mapping():
    tree = {"strategy": "fedsvd", "data": {"partition": {"name": "dirichlet", "alpha": 1.0}}, "run": {"rounds": 2}}
    before = copy.deepcopy(tree)
    load(tree, ["data.partition.alpha=0.1", "run.rounds=9", "strategy.every=3"])
    assert tree == before


def test_defaults_are_not_shared_between_configs():
    load({}).strategy.wrap.append("median")
    assert load({}).strategy.wrap == [] and Config().strategy.wrap == []


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_missing_file_or_name(tmp_path):
    with pytest.raises(InputError, match=r"no file .*nothing\.yaml"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="CONFIG"):
        load("no-such-config")


@pytest.mark.parametrize("text", ["- a\n- b\n", "run: [1\n", "3", "run: {rounds: ${nothing.here}}"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load(path)


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load(path) == load({})


CASES = [
    {},
    {"strategy": {"name": "fedsvd", "every": 3, "init": "orthonormal"}},
    {"strategy": {"name": "lora_fair", "lambda": 0.5, "wrap": ["median", {"name": "norm_clip", "bound": 2.0}]}},
    {"strategy": "hetlora", "adapter": {"r": 8, "client_ranks": [2, 8]}, "data": {"partition": {"name": "shards"}}},
    {"strategy": "fed_sb", "adapter": {"name": "lora_sb"}, "run": {"faults": {"client-001": "nan"}}},
]


@pytest.mark.parametrize("tree", CASES)
def test_the_resolved_yaml_means_the_same_config(tree, tmp_path):
    config = load(tree)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == config
    assert to_yaml(load(path)) == to_yaml(config)


def test_the_resolved_yaml_holds_what_users_write():
    tree = OmegaConf.to_container(OmegaConf.create(to_yaml(load({"strategy": {"name": "lora_fair", "lambda": 0.5}}))))
    assert tree["strategy"]["lambda"] == 0.5 and "options" not in tree["strategy"]
    assert tree["strategy"]["solver"] == "closed"  # defaults are written out


@pytest.mark.parametrize("name", sorted(configs.shipped_configs()))
def test_shipped_configs_are_valid_and_round_trip(name):
    config = load(name)
    assert load(to_tree(config)) == config
