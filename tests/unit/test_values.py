"""Text becomes values by the field it is for: names stay as typed, paths find their home, overrides win everywhere."""

from __future__ import annotations

import logging

import pytest

from fedpeft.cli import main
from fedpeft.config import build, from_yaml, load, read_yaml, to_yaml, values
from fedpeft.config.values import Plain, to_annotation
from fedpeft.deploy.settings import SiteSettings
from fedpeft.errors import InputError

NAMES = [
    ("[off, On, y]", ["off", "On", "y"]),
    ("[007, 0x1F, 1_000]", ["007", "0x1F", "1_000"]),
    ("[2.50, .5, 3e8, nan]", ["2.50", ".5", "3e8", "nan"]),
    ("[2026-01-31, 9:05:07, null]", ["2026-01-31", "9:05:07", "null"]),
    ("['a, b', \"it's\", ~]", ["a, b", "it's", "~"]),
    ("[<<, =, ü]", ["<<", "=", "ü"]),
]


@pytest.mark.parametrize(("text", "names"), NAMES)
def test_class_names_stay_as_typed_on_the_command_line_in_a_file_and_after_a_round_trip(text, names, tmp_path):
    config = load({}, [f"data.labels={text}"])
    assert config.data.labels == names
    (tmp_path / "c.yaml").write_text(f"data: {{labels: {text}}}")
    assert load(tmp_path / "c.yaml") == config == from_yaml(to_yaml(config))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("01", "01"),
        ("1.10", "1.10"),
        ("12:30", "12:30"),
        ("null", None),
        ("~", None),
        ("'null'", "null"),
        ('"~"', "~"),
        ("a=b", "a=b"),
        ("a #b", "a #b"),
        ("[x]", "[x]"),
        ("'a' or 'b'", "'a' or 'b'"),
        ("''", ""),
    ],
)
def test_a_text_is_what_stands_there_and_null_only_where_the_field_can_be_none(text, value):
    assert load({}, [f"data.label={text}"]).data.label == value
    if value is None:
        assert to_annotation(Plain(text), "str", "x") == text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "010", 10),
        ("int", "-3", -3),
        ("int", "1_000", 1000),
        ("int", "'5'", 5),
        ("float", "1e-3", 1e-3),
        ("float", ".5", 0.5),
        ("float", "7", 7.0),
        ("bool", "Off", False),
        ("bool", "yes", True),
        ("bool", "1", True),
        ("list[int]", "[1, 02]", [1, 2]),
        ("list[int] | None", "null", None),
        ("list[str]", "[]", []),
        (
            "dict[str, Any]",
            "{a: 1, b: 01, c: null, d: x, e: true}",
            {"a": 1, "b": "01", "c": None, "d": "x", "e": True},
        ),
        ("dict[str, float]", "{a: 1}", {"a": 1.0}),
    ],
)
def test_numbers_and_truth_values_are_read_where_the_field_has_them(kind, text, value):
    found = to_annotation(Plain(text), kind, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("int", "1e3"),
        ("int", "0x10"),
        ("int", "12:30"),
        ("int", "2.0"),
        ("int", "true"),
        ("float", "1:30"),
        ("float", "fast"),
        ("bool", "2"),
        ("bool", "null"),
        ("list[str]", "a,b"),
        ("list[str]", "[a"),
        ("int", "null"),
        ("list[str]", "[a: b]"),
        ("list[int]", "[1, x]"),
        ("list[str]", "[[a]]"),
        ("dict[str, Any]", "[a]"),
    ],
)
def test_what_a_field_cannot_have_is_refused_with_key_and_value(kind, text):
    with pytest.raises(InputError) as error:
        to_annotation(Plain(text), kind, "some.key")
    assert "some.key" in str(error.value) and text in str(error.value)


def test_an_override_without_value_and_a_key_given_twice(caplog):
    with pytest.raises(InputError, match=r"data\.test=: there is no value.*data\.test=null"):
        load({}, ["data.test="])
    assert load({}, ["run.rounds=3", "run.rounds=5"]).run.rounds == 5
    assert "run.rounds is given twice: 5 counts, 3 does not" in caplog.text


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {rounds: 3}\nmodel: {name: tiny-vit}\nrun: {seed: 1}\n")
    with pytest.raises(InputError, match=r"c\.yaml.*'run' is given twice"):
        load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("x: &a {rounds: 3, seed: 1}\nrun: {<<: *a, seed: 2}\n")
    assert read_yaml(tmp_path / "c.yaml")["run"] == {"rounds": "3", "seed": "2"}


@pytest.mark.parametrize("labels", [["a", "b", "a"], ["01", "01"], []])
def test_a_class_has_one_name(labels):
    with pytest.raises(InputError, match=r"data\.labels"):
        load({}, {"data.labels": labels})


# Paths ----------------------------------------------------------------------------------------------------------------


def test_a_tilde_is_somebodys_home_wherever_a_path_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [
        "data.source=~/d.csv",
        "data.test=~/t.csv",
        "model.name=~/m",
        "privacy.policy=~/p.yaml",
        "data.split=~/s",
        "data.label=~/not-a-path",
    ]
    (tmp_path / "p.yaml").write_text("max_epsilon: 3\nunbounded: [max_rounds, records]\n")
    config = load({}, given)
    assert [config.data.source, config.data.test, config.model.name, config.privacy.policy, config.data.split] == [
        str(tmp_path / name) for name in ("d.csv", "t.csv", "m", "p.yaml", "s")
    ]
    assert config.data.label == "~/not-a-path"
    (tmp_path / "site.yaml").write_text("name: a\nmodel: ~/m\ndata: {source: ~/d.csv}\n")
    site = build(SiteSettings, read_yaml(tmp_path / "site.yaml"), "site")
    assert site.model == str(tmp_path / "m") and site.data.source == str(tmp_path / "d.csv")
    (tmp_path / "c.yaml").write_text("run: {rounds: 7}")
    assert load("~/c.yaml").run.rounds == 7
    home = [main._at_home(text) for text in ("--out=~/r", "~/a", "data.source=~/d", "--json", "x~")]
    assert home == [f"--out={tmp_path}/r", f"{tmp_path}/a", "data.source=~/d", "--json", "x~"]


# Interpolation --------------------------------------------------------------------------------------------------------


def test_an_interpolation_follows_overrides_and_defaults(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("adapter: {r: 4, alpha: '${adapter.r}'}\nclient: {batch_size: '${run.seed}2'}\n")
    config = load(path, ["adapter.r=16", "run.rounds=${adapter.r}"])
    assert (config.adapter.alpha, config.run.rounds, config.client.batch_size) == (16.0, 16, 2)
    assert load(path).adapter.alpha == 4.0
    monkeypatch.setenv("CLASSES", "[no,01]")
    assert load({}, ["data.labels=${oc.env:CLASSES}"]).data.labels == ["no", "01"]
    assert load(
        {"data": {"labels": ["x", "1.10"]}, "adapter": {"target_modules": "${data.labels}"}}
    ).adapter.target_modules == ["x", "1.10"]


@pytest.mark.parametrize("text", ["${adapter.rank}", "${oc.env:NOT_SET_ANYWHERE}", "${adapter.r", "${data.source}"])
def test_an_interpolation_that_names_nothing_is_refused_by_key(text, tmp_path):
    with pytest.raises(InputError, match=r"data\.source: .*cannot be resolved"):
        load({}, [f"data.source={text}"])
    (tmp_path / "c.yaml").write_text(f"data: {{source: '{text}'}}")
    with pytest.raises(InputError, match=r"c\.yaml.*data\.source"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["${a}", "x\\${b", "\\\\${c}"])
def test_the_characters_of_an_interpolation_survive_the_resolved_yaml(name):
    config = load({}, {"data.labels": values.escaped([name, "b"])})
    assert config.data.labels == [name, "b"] and from_yaml(to_yaml(config)) == config


def test_a_foreign_config_reads_nothing_of_this_machine(monkeypatch):
    monkeypatch.setenv("SECRET", "16")
    assert load({"adapter": {"r": "${oc.env:SECRET}"}}).adapter.r == 16
    for text in ("${oc.env:SECRET}", "${run.seed}", "a ${x"):
        with pytest.raises(InputError, match=r"adapter\.r: .*belongs to this machine"):
            load({"adapter": {"r": text}}, foreign=True)
    assert load({"adapter": {"r": 16}}, foreign=True).adapter.r == 16


# Other names, other options -------------------------------------------------------------------------------------------

HELD = {
    "continual": {"body": "factor_coso", "head": "ranpac", "head_options": {"features": 50}},
    "run": {"rounds": 10},
    "strategy": {"name": "fedsvd", "transport": "dense"},
}


def test_another_head_drops_the_options_of_the_one_it_replaces(caplog):
    caplog.set_level(logging.INFO, "fedpeft")
    for head in ("linear", "lda", "ncm"):
        assert load(HELD, [f"continual.head={head}"]).continual.head_options == {}
        assert f"continual.head={head}: the options of ranpac are dropped: head_options" in caplog.text
    caplog.clear()
    assert load(HELD, ["continual.head=ranpac"]).continual.head_options == {"features": 50} and not caplog.text
    new = load(HELD, ["continual.head_options.features=070", "continual.head=ranpac"]).continual
    assert new.head_options == {"features": 70}
    with pytest.raises(InputError, match=r"continual\.head_options\.features"):
        load(HELD, ["continual.head=linear", "continual.head_options.features=50"])


def test_another_body_base_or_rule_drops_options_too(caplog):
    caplog.set_level(logging.INFO, "fedpeft")
    assert (
        "side"
        not in load(
            {**HELD, "continual": {"body": "factor_coso", "side": "in"}}, ["continual.body=sequential"]
        ).continual.options
    )
    assert "continual.body=sequential: the options of factor_coso are dropped: side" in caplog.text
    restarted = {"data": {"holdout": 0.3}, "tta": {"method": "rdumb", "base_options": {"fisher_weight": 0.1}}}
    assert load(restarted).tta.options["base_options"] == {"fisher_weight": 0.1}
    assert load(restarted, ["tta.base=tent"]).tta.options["base_options"] == {}
    assert load({"data": {"holdout": 0.3}}, ["tta=rdumb", "tta.base=tent"]).tta.options["base_options"] == {}
    stock = {"strategy": {"name": "flower", "rule": "FedAdam", "rule_options": {"eta": 0.1}}}
    assert load(stock).strategy.options["rule_options"] == {"eta": 0.1}
    assert load(stock, ["strategy.rule=FedAvg"]).strategy.options["rule_options"] == {}


def test_wrappers_and_head_options_are_typed_by_their_own_fields():
    wrap = load({}, ["strategy.wrap=[median,{name: norm_clip, bound: 2}]"]).strategy.wrap
    assert wrap == ["median", {"name": "norm_clip", "bound": 2.0}] and type(wrap[1]["bound"]) is float
    with pytest.raises(InputError, match=r"strategy\.wrap\.norm_clip\.bound: 'far'"):
        load({}, ["strategy.wrap=[{name: norm_clip, bound: far}]"])
    with pytest.raises(InputError, match=r"continual\.head_options\.features"):
        load(HELD, ["continual.head_options.features=many"])


@pytest.mark.parametrize(("clients", "options"), [(3, "byzantine: 1"), (5, "byzantine: 3"), (6, "keep: 7")])
def test_too_few_clients_for_krum_are_refused_before_the_first_round(clients, options):
    given = [f"strategy.wrap=[{{name: krum, {options}}}, norm_clip]", f"run.clients_per_round={clients}"]
    with pytest.raises(InputError, match=rf"krum .* needs at least \d+ updates .* got {clients}"):
        load({}, given)
    assert load({}, [given[0], "run.clients_per_round=8"]).run.clients_per_round == 8


@pytest.mark.parametrize(("clients", "fraction", "least"), [(4, 0.2, 5), (3, 0.25, 4), (2, 0.4, 3), (99, 0.01, 100)])
def test_too_few_clients_for_a_trimmed_mean_are_refused_before_the_first_round(clients, fraction, least):
    given = [f"strategy.wrap=[norm_clip, {{name: trimmed_mean, fraction: {fraction}}}]", "data.clients=200"]
    with pytest.raises(InputError, match=rf"trimmed_mean .*{fraction} trims nothing of {clients} .* at least {least}"):
        load({}, [*given, f"run.clients_per_round={clients}"])
    assert load({}, [*given, f"run.clients_per_round={least}"]).run.clients_per_round == least
    given[0] = "strategy.wrap=[{name: trimmed_mean, fraction: 0}]"
    assert load({}, [*given, f"run.clients_per_round={clients}"]).run.clients_per_round == clients


def test_a_section_in_one_line_replaces_the_files():
    config = load({"strategy": {"name": "lora_fair", "lambda": 3.0}}, ["strategy={name: fedsvd, every: 02}"])
    assert config.strategy.name == "fedsvd" and config.strategy.options["every"] == 2


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("run.rounds", "1_"),
        ("run.rounds", "1__0"),
        ("run.rounds", "9" * 5000),
        ("client.lr", "1_.5"),
        ("client.lr", 10**400),
    ],
    ids=["an underscore", "two underscores", "5,000 digits", "a fraction", "400 digits"],
)
def test_what_looks_like_a_number_and_is_none_for_python_is_refused_by_its_key(key, given):
    with pytest.raises(InputError, match=f"^{key}: .* is not a valid (int|float)"):
        load({}, {key: Plain(given) if isinstance(given, str) else given})
    assert load({}, ["data.format={delimiter: 1_}"]).data.format == {"delimiter": "1_"}  # no field has its type


def test_the_home_folder_of_nobody_stays_a_name_and_is_refused_where_a_file_is_looked_for():
    assert load({}, ["data.source=~nobody-of-this-name/a.csv"]).data.source == "~nobody-of-this-name/a.csv"
    with pytest.raises(InputError, match=r"CONFIG: no file ~nobody-of-this-name/a\.yaml"):
        load("~nobody-of-this-name/a.yaml")
