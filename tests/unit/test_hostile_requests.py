"""Messages made to break a site: each is refused in a sentence, before its model or its records are touched."""

from __future__ import annotations

import time
import tracemalloc
from types import SimpleNamespace

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft import config as configs
from fedpeft.clients import app, secagg
from fedpeft.clients.app import client_app
from fedpeft.clients.policy import Policy, Refused
from fedpeft.deploy import envelope, settings
from fedpeft.errors import InputError, RunError
from fedpeft.foreign import TEXT_BYTES, YAML_BYTES
from fedpeft.state import AdaptedLayer, AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.wire import PACKED
from support.malformed import ARRAYS, MANIFESTS, MB, RECORDS, message
from support.scripted import START

pytestmark = pytest.mark.usefixtures("flower_run")
REQUESTS = {
    **{f"array: {kind}": (lambda make=make: message(make(), {})) for kind, make in ARRAYS.items()},
    **{
        f"manifest: {kind}": (lambda make=make: message(metrics={}, manifest=make()))
        for kind, make in MANIFESTS.items()
        if kind not in ("an entry too many", "an entry too few")
    },  # no client knows
    **{f"records: {kind}": make for kind, make in RECORDS.items()},
    "a larger state": lambda: PACKED.content(START.replace({"q/C": START["q/A"].new_zeros(2 * MB)}), Instructions(1)),
    "a name of a tensor that is a page": lambda: PACKED.content(
        START.replace({"q/" + "C" * 999: START["q/A"]}), Instructions(1)
    ),
    "a name of a tensor that rings": lambda: PACKED.content(START.replace({"q/C\a": START["q/A"]}), Instructions(1)),
    "another site": lambda: PACKED.content(
        AdapterState(START.tensors, {"k": AdaptedLayer("lora", (3, 4), 2.0)}), Instructions(1)
    ),
    "a site as head": lambda: PACKED.content(
        AdapterState(START.tensors, {"q": AdaptedLayer("head", (3, 4))}), Instructions(1)
    ),
    "a task that is no mapping": lambda: message(metrics={}, task="[]"),
    "a task without a round": lambda: message(metrics={}, task="{}"),
    "a task of 64 MB": lambda: message(metrics={}, task=" " * 64 * MB),
    "a deep task": lambda: message(metrics={}, task="[" * 90_000),
}
SAMPLE = (
    "array: a header of 10^13 elements",
    "array: a pickle",
    "array: compressed",
    "array: a second array of 64 MB",
    "manifest: 100000 brackets",
    "manifest: spaces around it",
    "manifest: sizes that overflow",
    "manifest: a name with escapes",
    "a name of a tensor that is a page",
    "records: a field too many",
    "records: no record",
    "a larger state",
    "a site as head",
    "a deep task",
)


def refused(content: RecordDict, kind: str) -> None:
    def never(*arguments):
        raise AssertionError("the request came through")

    local = SimpleNamespace(initial=START, config=configs.Config(), train=never, evaluate=never, sums=never)
    app = client_app(lambda: local, lambda context: "a")
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    sent = Message(content, 7, kind)
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as error:
            app(sent, context)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * MB, f"{peak / MB:.0f} MB"
    assert len(str(error.value).encode()) <= TEXT_BYTES + 100 and str(error.value).isprintable()


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_hostile_request_is_refused_in_a_sentence(kind):
    refused(REQUESTS[kind](), "train")


@pytest.mark.attack
@pytest.mark.parametrize("asked", ["train", "evaluate", "query.sums"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_every_hostile_request_is_refused_in_a_sentence(kind, asked):
    refused(REQUESTS[kind](), asked)


def test_the_message_that_they_are_made_from_is_opened_whatever_a_strategy_sends_beside_the_adapter():
    received, task = app.open_request(message(metrics={}), START)
    assert received.sha256() == START.sha256() and task == Instructions(1)
    beside = START.beside({f"control:{key}": value for key, value in START.tensors.items()})
    beside = beside.replace({"q/residual_B": START["q/A"].new_ones(3, 3), "q/residual_A": START["q/A"].new_ones(3, 4)})
    assert app.open_request(PACKED.content(beside, Instructions(1)), START)[0].sha256() == beside.sha256()


@pytest.mark.parametrize(
    ("stage", "asked"),
    [
        (1, {"names": ["b"] * 5, "masks": [bytes(32)] * 5, "boxes": [bytes(32)] * 5}),
        (1, {"names": ["b\x1b[2J"], "masks": [bytes(32)], "boxes": [bytes(32)]}),
        (2, {"names": ["x" * 10**6], "sealed": [b""]}),
        (2, {"names": [""], "sealed": [b""]}),
        (3, {"uploaded": ["../b"], "silent": []}),
        (3, {"uploaded": ["a"], "silent": ["b"] * 10**5}),
    ],
)
def test_stages_of_secure_aggregation_name_clients_of_the_round(stage, asked):
    good = {
        "names": ["b"],
        "masks": [bytes(32)],
        "boxes": [bytes(32)],
        "sealed": [b""],
        "uploaded": ["a"],
        "silent": [],
    }
    kept = {key: good[key] for key in secagg.FORMS[stage]}
    assert secagg.require_form(stage, ConfigRecord({"round": 1, **kept}), 4) == {"round": 1, **kept}
    with pytest.raises(RunError, match=r"no name of a client|a round has at most 4 clients") as error:
        secagg.require_form(stage, ConfigRecord({"round": 1, **asked}), 4)
    assert str(error.value).isprintable() and len(str(error.value)) < 200


# The run's record ----------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))
TREE = yaml.safe_dump(configs.to_tree(configs.Config()))


@pytest.fixture
def site(tmp_path):
    return settings.Site(tmp_path, settings.SiteSettings(name="clinic", data=settings.SiteData(source="digits")))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "run: !!python/object/apply:os.system ['true']",
        "run: !!map {rounds: 3}",
        TREE + "x: " + "y" * MB,
        TREE + "#" * YAML_BYTES,
        "[" * 60_000,
        "run: " + "{a: " * 10_000,
        "run: {rounds: 0x" + "f" * 50_000 + "}",
        "- 1",
        "run: 3",
        "1: 2",
        "run: {rounds: 1}\nrun: {rounds: 2}",
        "model: {name: '${oc.env:HOME}'}",
    ],
)
def test_a_hostile_config_is_refused_within_a_second(text, site):
    began = time.monotonic()
    with pytest.raises(Refused) as error:
        envelope.own_config(text, site, Policy())
    assert time.monotonic() - began < 1.0
    assert len(str(error.value).encode()) <= TEXT_BYTES + 100


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "(([a-z_.])+.)+[A-Z]([a-z])+"},  # peft would search with it, for ever
        {"exclude_modules": "(a+)+$"},
        {"target_modules": ["query", "(.*)*x"]},
        {"rank_pattern": {"(.*)*query": 4}},
        {"layers_pattern": "(l|l)*", "layers_to_transform": [0]},
    ],
)
def test_a_coordinators_pattern_is_not_searched_for(options, site):
    site.policy.write_text("unit: none\nunbounded: [max_epsilon, max_rounds, records]\n")
    tree = {"adapter": {"name": "peft", "type": "LORA", "options": options}}
    with pytest.raises(Refused, match=r"is a pattern"):
        envelope.own_config(yaml.safe_dump(tree), site, Policy())
    named = {"target_modules": ["layer.0.query"], "exclude_modules": ["layer.1"], "rank_pattern": {"query": 2}}
    tree["adapter"]["options"] = named
    assert envelope.own_config(yaml.safe_dump(tree), site, Policy()).adapter.options["options"]["rank_pattern"]


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "../../etc"},
        {"run": "x" * 64},
        {"run": 3},
        {"config": "x" * (YAML_BYTES + 1)},
        {"config": b"{}"},
        {"labels": ["x" * 300]},
        {"labels": ["x"] * 40_000},
        {"labels": [1, 2]},
        {"labels": "no yes"},
        {"base": "x" * MB},
        {"site": "other\x1b[2J" * MB},
        {"site": 3.0},
        {"run": None},
        {"labels": None},
    ],
)
def test_a_malformed_record_of_the_run_is_refused(changed, site):
    record = {"run": "run-1", "config": TREE, "labels": ["no", "yes"], "base": "0" * 16, "site": "clinic"}
    assert envelope.opened(RecordDict({envelope.RECORD: ConfigRecord(record)}), site).labels == ("no", "yes")
    found = {key: value for key, value in {**record, **changed}.items() if value is not None}
    with pytest.raises(Refused) as error:
        envelope.opened(RecordDict({envelope.RECORD: ConfigRecord(found)}), site)
    assert len(str(error.value).encode()) <= TEXT_BYTES and str(error.value).isprintable()


def test_a_coordinator_does_not_start_what_no_site_would_read():
    for cover in (
        envelope.Envelope("run-1", "x" * (YAML_BYTES + 1), (), ""),
        envelope.Envelope("run-1", "", ("x" * 300,), ""),
    ):
        with pytest.raises(InputError, match="are read"):
            cover.require()
