"""A policy file bounds what it says, says what it leaves open, and is none where it is empty or cut off."""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from typer.testing import CliRunner

from fedpeft import config as configs
from fedpeft.cli.main import app
from fedpeft.clients import policy
from fedpeft.clients.guard import Guard
from fedpeft.clients.policy import BOUNDS
from fedpeft.deploy import envelope
from fedpeft.deploy.settings import site as settings_of
from fedpeft.deploy.site import site
from fedpeft.errors import InputError, RunError, Stopped
from support.allowed import opened

WHOLE = {"max_epsilon": 3.0, "max_rounds": 20, "records": 400}


@pytest.fixture
def file(tmp_path):
    """`file(text or mapping)`: a policy file."""

    def write(content):
        path = tmp_path / "policy.yaml"
        path.write_bytes(
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else yaml.safe_dump(content)).encode()
        )
        return path

    return write


@pytest.mark.parametrize("text", ["", "\n", "null", "~\n", "# max_epsilon: 3\n", "---\n", "{}", "---\n...\n"])
def test_a_file_that_says_nothing_is_no_policy(text, file):
    with pytest.raises(InputError, match=r"empty policy bounds nothing\. Set max_epsilon, max_rounds and records"):
        policy.load(file(text))


@pytest.mark.parametrize(
    "text",
    [
        "3\n",
        "[max_epsilon, 3]\n",
        "max_epsilon\n",
        "- max_epsilon: 3\n",
        b"\xff\xfe\n",
        b"max_epsilon: \x00\n",
        "max_epsilon: 3\nmax_epsilon: 300\n",
    ],
)
def test_what_is_no_mapping_is_no_policy(text, file):
    with pytest.raises(InputError):
        policy.load(file(text))


@pytest.mark.parametrize("key", BOUNDS)
def test_each_bound_is_set_or_left_open_by_name(key, file):
    others = {name: value for name, value in WHOLE.items() if name != key}
    for value in ({}, {key: None}):
        with pytest.raises(InputError, match=rf"policy\.{key} is not set.*or name what is left open on purpose"):
            policy.load(file({**others, **value}))
        assert getattr(policy.load(file({**others, **value, "unbounded": [key]})), key) is None
    with pytest.raises(InputError, match=rf"policy\.{key} is .*named in policy\.unbounded too"):
        policy.load(file({**WHOLE, "unbounded": [key]}))
    assert getattr(policy.load(file(WHOLE)), key) == WHOLE[key]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"unbounded": ["max_epsilonn"]},
            r"policy\.unbounded: max_epsilonn not known. Allowed: max_epsilon, max_rounds",
        ),
        ({"unbounded": ["strategies"]}, r"policy\.unbounded: strategies not known"),
        ({"unbounded": "records"}, r"policy\.unbounded: 'records'"),
        ({"unbound": ["records"]}, r"policy\.unbound.*Did you mean 'unbounded'"),
        ({"record": 3}, r"policy\.record.*Did you mean 'records'"),
        ({"privacy": {"max_epsilon": 3}}, r"policy\.privacy"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(more, reason, file):
    with pytest.raises(InputError, match=reason):
        policy.load(file({**WHOLE, **more}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [1]\nmetrics: *a\n", "it has an anchor or an alias"),
        ("bounds: &b {max_epsilon: 3}\n<<: *b\n", "it has an anchor or an alias"),
        ("max_epsilon: !!float 3\n", "it has a tag"),
        ("strategies: !!python/name:os.system\n", "it has a tag"),
        ("strategies: " + "[" * 40 + "]" * 40 + "\n", "nests deeper"),
        ("# " + "x" * 70_000 + "\nmax_epsilon: 3\n", "at most 65536 bytes are read"),
        ("max_epsilon: three\n", r"policy\.max_epsilon"),
        (
            "max_epsilon: 3\nmetrics: [everything]\n",
            r"policy\.metrics: everything not known.*missed_tasks, .*auroc, .*f1",
        ),
        (
            "max_epsilon: 3\nmetrics: [loss, f1]\n",
            r"policy\.metrics: f1: a site whose unit is sample sends no measure but",
        ),
    ],
)
def test_a_file_from_elsewhere_is_bounded_before_it_is_read_and_named(text, reason, file):
    path = file(text)
    with pytest.raises(InputError, match=reason) as raised:
        policy.load(path)
    assert str(raised.value).startswith(f"{path}: ") and str(raised.value).count(str(path)) == 1


def test_a_site_without_privacy_may_name_the_measures_of_any_objective(file):
    named = ["loss", "f1", "f1_micro", "rmse", "perplexity"]
    assert policy.load(file({**WHOLE, "unit": "none", "metrics": named})).metrics == named


def test_values_are_read_as_they_are_typed_not_as_yaml_takes_them(file):
    """YAML 1.1 has 010 for 8, and 1:30 for 90."""
    assert policy.load(file("max_rounds: 010\nunbounded: [max_epsilon, records]\n")).max_rounds == 10
    with pytest.raises(InputError, match=r"policy\.max_epsilon"):
        policy.load(file("max_epsilon: 1:30\nunbounded: [max_rounds, records]\n"))


def test_a_number_that_may_be_cut_in_the_middle_is_refused(file):
    """1.0e-1 is what is left of 1.0e-12, and 0. of 0.5."""
    text = yaml.safe_dump(WHOLE, sort_keys=False)
    for last in ("max_delta: 1.0e-1", "min_noise_multiplier: 0.", "max_delta: 0.01  "):
        with pytest.raises(InputError, match="its last line does not end, so the file may be cut off"):
            policy.load(file(text + last))
        assert policy.load(file(text + last + "\n")).max_rounds == 20
    assert policy.load(file("{max_epsilon: 1, unbounded: [max_rounds, records]}")).max_epsilon == 1


def test_what_is_left_of_the_shipped_file_is_no_laxer_wherever_it_is_cut(file):
    whole, cut = policy.load(file(site.POLICY)), 0
    for end in range(0, len(site.POLICY), 17):
        try:
            left = policy.load(file(site.POLICY[:end]))
        except InputError:
            cut += 1
            continue
        assert left == whole, site.POLICY[:end]
    assert cut > 60


def test_the_command_says_what_a_file_allows_and_leaves_open(file, tmp_path):
    path = file({"max_epsilon": 3, "min_noise_multiplier": 0.5, "unbounded": ["max_rounds", "records"]})
    shown = CliRunner().invoke(app, ["site", "policy", str(path)])
    assert shown.exit_code == 0
    for words in (
        "max_epsilon: 3 of one record",
        "ANY NUMBER of rounds",
        "min_noise_multiplier: 0.5",
        "left open: max_rounds, records, strategies",
    ):
        assert words in shown.output
    found = json.loads(CliRunner().invoke(app, ["site", "policy", str(path), "--json"]).output)["policies"][0]
    assert found["open"] == ["max_rounds", "records", "strategies"]
    assert (found["allows"]["max_epsilon"], found["allows"]["max_rounds"]) == (3.0, None)
    (tmp_path / "many").mkdir()
    for name in ("a", "b"):
        (tmp_path / "many" / f"{name}.yaml").write_text(opened(f"max_rounds: {len(name)}"))
    many = json.loads(CliRunner().invoke(app, ["site", "policy", str(tmp_path / "many"), "--json"]).output)
    assert len(many["policies"]) == 2
    (tmp_path / "many" / "b.yaml").write_text("max_rounds: 1\n")
    for place in ("many", "nothing.yaml"):
        bad = CliRunner().invoke(app, ["site", "policy", str(tmp_path / place)])
        assert isinstance(bad.exception, InputError) and not bad.output


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.csv").write_text("text,label\na,x\n")
    site.init(tmp_path / "site", "clinic", "localhost:1", None, str(tmp_path / "own.csv"), "tiny-bert")
    return tmp_path / "site"


def test_a_site_starts_under_no_file_that_is_no_policy_and_logs_the_one_in_force(folder, monkeypatch, caplog):
    def ended(child):
        raise Stopped(15)

    monkeypatch.setattr(site.Child, "start", ended)
    caplog.set_level(logging.INFO, "fedpeft")
    site.start(folder, insecure=True)
    said = next(record.message for record in caplog.records if "policy in force" in record.message)
    assert "max_epsilon: 3 of one record" in said and "left open: records, strategies" in said
    assert json.loads(CliRunner().invoke(app, ["site", "policy", str(folder), "--json"]).output)["policies"]
    for text in ("", "max_epsilon: 3\n"):
        (folder / "policy.yaml").write_text(text)
        with pytest.raises(InputError, match=r"policy\.yaml"):
            site.start(folder, insecure=True)
        with pytest.raises(InputError):
            site._check_policy(settings_of(folder))


@pytest.mark.parametrize("text", ["", "max_epsilon: 3\n", "max_epsilon: [", None])
def test_a_policy_that_is_none_any_more_refuses_with_one_sentence(text, folder, caplog):
    place = settings_of(folder)
    assert envelope.in_force(place).max_epsilon == 3
    (folder / "policy.yaml").unlink()
    if text is not None:
        (folder / "policy.yaml").write_text(text)
    with pytest.raises(RunError) as caught:
        envelope.in_force(place)
    assert str(caught.value) == policy.INVALID and "policy" in caplog.text


def test_a_simulation_asks_for_whole_policies_before_it_loads_anything(tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    for number in range(2):
        (folder / f"client-00{number}.yaml").write_text(opened("unit: none") if number else "")
    with pytest.raises(InputError, match=r"client-000\.yaml.*bounds nothing"):
        configs.load({}, {"privacy.policy": str(folder)})
    (folder / "client-000.yaml").unlink()
    guard = Guard(configs.load({}, {"privacy.policy": str(folder)}), tmp_path / "ledger", "run")
    guard.require({"client-001": 5})
    with pytest.raises(InputError, match=r"no file .*client-000\.yaml"):
        guard.require({"client-000": 5, "client-001": 5})
