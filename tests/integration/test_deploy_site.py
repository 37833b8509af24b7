"""A site refuses or survives what a coordinator sends: hostile configs, tasks and apps, and faults of its own."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedpeft import config as configs
from fedpeft.clients.policy import BOUNDS
from fedpeft.data import source
from fedpeft.deploy import build, envelope, keys, settings
from fedpeft.deploy.coordinator import roster
from fedpeft.deploy.envelope import Envelope
from fedpeft.deploy.site import site, worker
from fedpeft.privacy.ledger import Ledger
from fedpeft.strategies.wire import PACKED, BadReply
from support import instructed
from support.deployed import LABELS, TRAIN, write_records

POLICY = {"unit": "sample", "max_delta": 0.01, "seeded_noise": True}


class Rig:
    """A site's resident worker in this process, and a coordinator's half of a run."""

    def __init__(self, root):
        write_records(root / "own.csv", 40, 0)
        self.folder = root / "site"
        site.init(self.folder, "clinic", "localhost:1", None, str(root / "own.csv"), "tiny-bert")
        self.policy(**POLICY)
        self.resident = worker.Resident(settings.site(self.folder))
        self.begin({})
        self.base = envelope.base_fingerprint(self.here.local.model.base, self.config)

    def begin(self, overrides):
        """Make a config the one of the runs that follow."""
        self.config = configs.load(TRAIN, {"run.engine": "sites", **overrides})
        self.here = build.bare(self.config, self.folder.parent / "server", LABELS)

    def policy(self, **values):
        values["unbounded"] = [key for key in BOUNDS if key not in values]
        (self.folder / "policy.yaml").write_text(yaml.safe_dump(values))

    @property
    def site(self):
        return self.resident.site

    def ask(self, overrides=(), number=1, kind="train", run="run-1", labels=LABELS, text=None, name="clinic", task=()):
        """The site's reply to a message of round `number` whose config has these dotted overrides."""
        tree = configs.to_tree(self.config)
        for key, value in dict(overrides).items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        server = self.here.strategy.before_round(replace(self.here.start, round=number - 1))
        sent = self.here.strategy.broadcast(server, "clinic")
        told = self.here.strategy.instructions(server).to_json()
        if kind == "query.sums":
            told = {"learn": told["learn"]}
        content = instructed.content(sent, {**told, "round": number, **dict(task)})
        message = Message(content, 7, kind)
        Envelope(run, text or yaml.safe_dump(tree), tuple(labels), self.base).put(message, name)
        context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
        self.sent = sent
        return self.resident.answer(message, context)


@pytest.fixture
def rig(tmp_path, monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Rig(tmp_path)


def reason(reply):
    assert reply.has_error(), "the site answered"
    return reply.error.reason


def test_a_good_request_is_answered_and_the_same_one_costs_nothing_more(rig):
    first = rig.ask()
    assert not first.has_error(), first.error.reason
    update, _ = PACKED.read(first, rig.sent, ("B", "head"), 1)
    assert update.distance(rig.sent) > 0
    ledger = Ledger(rig.folder / "ledger" / "clinic.jsonl")
    assert [entry.round for entry in ledger.entries()] == [1]
    rig.resident = worker.Resident(rig.site)  # the site was restarted
    again, _ = PACKED.read(rig.ask(), rig.sent, ("B", "head"), 1)
    assert again.distance(update) == 0 and len(ledger.entries()) == 1
    assert not rig.ask(number=2).has_error()
    assert [entry.round for entry in ledger.entries()] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"strategy.name": "os:system"}, "strategy.name"),
        ({"adapter.name": "subprocess:Popen"}, "adapter.name"),
        ({"strategy.wrap": ["builtins:eval"]}, "strategy.wrap"),
        ({"model.trust_remote_code": True}, "trust_remote_code"),
        ({"model.dtype": "auto"}, "model.dtype"),
        ({"model.auto_map": "evil.py"}, "auto_map"),
        ({"hooks": {"before": "evil"}}, "hooks"),
        ({"run.faults": {"clinic": "die"}}, "run.faults"),
        ({"client.optimizer": "evil"}, "client.optimizer"),
        ({"privacy.unit": "none"}, "does not protect records"),
        ({"privacy.release_metrics": True}, "privacy.release_metrics"),
    ],
)
def test_what_the_registry_or_the_policy_does_not_have_is_refused_before_data_or_model(
    rig, monkeypatch, overrides, words
):
    def never(*arguments, **named):
        raise AssertionError("read too early")

    monkeypatch.setattr(source, "whole", never)
    monkeypatch.setattr(worker, "bare", never)
    assert words in reason(rig.ask(overrides))
    assert not (rig.folder / "ledger").exists() and not (rig.folder / "state").exists()


def test_more_epsilon_or_rounds_than_the_policy_allows_is_refused(rig):
    rig.policy(**POLICY, max_epsilon=4, max_rounds=10)
    assert "privacy.epsilon=8 is over max_epsilon=4" in reason(rig.ask())
    assert "11 rounds are over max_rounds=10" in reason(rig.ask({"privacy.epsilon": 3.0}, number=11))
    assert not rig.ask({"privacy.epsilon": 3.0}).has_error()
    again = [rig.ask({"privacy.epsilon": 3.0, "run.rounds": 1}, run=f"run-{number}") for number in range(2, 5)]
    assert "all runs together" in reason(again[-1])
    assert Ledger(rig.folder / "ledger" / "clinic.jsonl").spent(1e-3) <= 4


TASKS = {
    "strategy.name": "ffa_lora",
    "run.rounds": 2,
    "privacy.epsilon": None,
    "privacy.noise_multiplier": 1.0,
    "continual.body": "sequential",
    "continual.tasks": 2,
    "continual.head": "lda",
    "continual.statistics_noise": 2.0,
}


def test_what_a_record_may_spend_in_all_runs_is_spent_by_its_task_in_another_run_too(rig):
    """A record of this run's second task may have been in another run's first."""
    rig.begin(TASKS)
    for number in (1, 2):  # a task each
        assert not rig.ask(number=number).has_error()
    folder = rig.folder / "ledger"
    assert {path.stem for path in folder.glob("*.jsonl")} == {"clinic+task-0", "clinic+task-1"}
    spent = Ledger(folder / "clinic+task-1.jsonl").spent(1e-3)
    rig.policy(**POLICY, max_epsilon=1.4 * spent)
    assert "all runs together" in reason(rig.ask(number=1, run="run-2"))
    rig.begin({"privacy.epsilon": None, "privacy.noise_multiplier": 1.0})
    assert "all runs together" in reason(rig.ask(run="run-3"))
    rig.begin({**TASKS, "run.seed": 5})  # the classes cut in another way, and called the same run
    assert "all runs together" in reason(rig.ask(number=1))
    rig.policy(**POLICY)
    assert not rig.ask(number=1).has_error()
    assert len(Ledger(folder / "clinic+task-0.jsonl").entries()) == 2


def test_the_sums_of_a_head_are_within_the_policy_s_bounds(rig):
    rig.begin({**TASKS, "continual.statistics_noise": 0.5})
    sums = {"kind": "query.sums", "task": {"sums": "head", "view": "online"}}
    rig.policy(**POLICY, min_noise_multiplier=0.8)
    assert "continual.statistics_noise=0.5 is under 0.8" in reason(rig.ask(**sums))
    rig.policy(**POLICY, records=40)
    assert "records=40 is of all records" in reason(rig.ask(**sums))
    assert not list(rig.folder.glob("ledger/*.jsonl"))
    rig.policy(**POLICY)
    assert not rig.ask(**sums).has_error()
    spent = Ledger(rig.folder / "ledger" / "clinic+task-0.jsonl").spent(1e-3)
    rig.policy(**POLICY, max_epsilon=1.1 * spent)
    assert "all runs together" in reason(rig.ask(**sums, run="run-2"))


def test_how_many_tasks_a_site_missed_is_a_metric_that_its_policy_names(rig):
    rig.begin({**TASKS, "privacy.release_metrics": True})
    four = ["train_loss", "loss", "accuracy", "num-examples"]
    rig.policy(**POLICY, metrics=four)
    assert "sends train_loss, loss, accuracy, num-examples, missed_tasks; allowed: train" in reason(rig.ask())
    rig.policy(**POLICY, metrics=[*four, "missed_tasks"])
    assert rig.ask().content["metrics"]["missed_tasks"] == 0.0


def test_the_server_does_not_say_which_task_a_round_is_of(rig):
    rig.begin(TASKS)
    other = dataclasses.asdict(rig.here.strategy.make_lesson(1))
    assert "is not that of this client's config" in reason(rig.ask(number=1, task={"learn": other}))


def test_data_model_policy_and_randomness_are_the_site_s_own(rig):
    rig.policy(**{**POLICY, "seeded_noise": False})
    tree = configs.to_tree(rig.config)
    tree["data"] |= {"source": "/etc/passwd", "text": "root", "split": "/etc/shadow", "test": "/etc/hosts", "limit": 1}
    tree["model"]["name"] = "../evil"
    tree["run"] |= {"device": "meta", "threads": 64, "trackers": ["of a newer fedpeft"]}
    tree["adapter"]["start"] = "/etc"
    tree["privacy"] |= {"policy": "/dev/null", "randomness": "seeded"}
    own = envelope.own_config(yaml.safe_dump(tree), rig.site, envelope.policies.load(rig.site.policy))
    assert own.data.source == str(rig.folder.parent / "own.csv")
    assert (own.data.text, own.data.split, own.data.test, own.data.limit) == (None, None, None, None)
    assert (own.model.name, own.run.device, own.run.threads) == ("tiny-bert", "auto", 1)
    assert own.run.trackers == []
    assert own.adapter.start is None
    assert (own.privacy.policy, own.privacy.randomness) == (str(rig.folder / "policy.yaml"), "os")


@pytest.mark.parametrize(
    "text", ["run: {seed: '${oc.env:HOME}'}", "!!python/object/apply:os.system ['true']", "- 1", ":"]
)
def test_text_that_is_no_plain_config_is_refused(rig, text):
    assert rig.ask(text=text).has_error()


def test_messages_of_others_are_refused(rig):
    assert "site.yaml says 'clinic'" in reason(rig.ask(name="other"))
    assert "run's name" in reason(rig.ask(run="../../etc"))
    assert "not the coordinator's" in reason(rig_with_base(rig, "0" * 16))
    assert rig.ask(task={"trains": ["everything"]}).has_error()


def rig_with_base(rig, base):
    rig.base, kept = base, rig.base
    reply = rig.ask(run="run-other")
    rig.base = kept
    return reply


def test_what_went_wrong_with_the_data_stays_at_the_site(rig, caplog):
    (rig.folder.parent / "own.csv").write_text("text,label\nsecret patient,maybe\n")
    said = reason(rig.ask())
    assert "secret" not in said and "maybe" not in said and "own.csv" not in said
    assert "maybe" in caplog.text


@pytest.mark.parametrize("where", ["ledger", "reply"])
def test_a_full_disk_costs_the_round_and_no_more(rig, monkeypatch, where):
    """Whatever cannot be written, ledger or kept reply, no update leaves; and nothing leaves uncounted."""

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "ledger":
            patch.setattr(Ledger, "_append", full)
        else:
            patch.setattr("fedpeft.clients.store.write_tensors", full)
        assert "No space" not in reason(rig.ask())
    ledger = Ledger(rig.folder / "ledger" / "clinic.jsonl")
    assert not (where == "ledger" and ledger.entries())
    assert not rig.ask().has_error()
    assert 1 <= len(ledger.entries()) <= 2


def test_an_update_with_nan_is_quarantined(rig):
    reply = rig.ask()
    values = reply.content.array_records["arrays"]["adapter"].numpy().copy()
    values[3] = float("nan")
    reply.content["arrays"] = ArrayRecord({"adapter": Array(values)})
    with pytest.raises(BadReply, match="NaN"):
        PACKED.read(reply, rig.sent, ("B", "head"), 1)


def test_the_node_imports_no_torch():
    code = "import sys; import fedpeft.deploy.site.site, fedpeft.deploy.site.node; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_private_files_are_their_owner_s_alone(tmp_path):
    from fedpeft.deploy.coordinator import server

    server.init(tmp_path / "server", "example.org", 9092, 9093, "127.0.0.1")
    site.init(tmp_path / "site", "clinic", "example.org:9092", tmp_path / "server" / "ca.crt", None, "tiny-bert")
    private = [tmp_path / "server" / name for name in ("ca.key", "server.key", "secret")]
    private += [tmp_path / "site" / "site.key"]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("server", "site")} == {0o700}


class FakeGrid:
    run = None

    """Nodes as Flower reports them; replies are what the test puts in."""

    def __init__(self):
        self.nodes, self.replies = [], []

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        return [f"message-{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, names):
        found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in names]
        self.replies = [reply for reply in self.replies if reply not in found]
        return found


def test_sites_join_from_round_to_round_and_late_replies_are_named_and_dropped(rig, tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "LATE_S", 0.0)
    lines = {name: keys.site_keys(tmp_path / name) for name in ("north", "south", "posing")}
    grid, events, said, waits = FakeGrid(), [], [], []
    sites = roster.SiteGrid(grid, Envelope("run-1", "", (), ""), 5.0, events.append, waits.append)
    known = {"north": lines["north"]}
    book = roster.Roster(sites, lambda: known, said.append)
    grid.nodes = [SimpleNamespace(node_id=1, name="north", public_key=keys.pem(lines["north"]))]
    assert book.roster(sites, 1) == {"north": 1}
    grid.nodes.append(SimpleNamespace(node_id=2, name="south", public_key=keys.pem(lines["south"])))
    grid.nodes.append(SimpleNamespace(node_id=3, name="north", public_key=keys.pem(lines["posing"])))
    assert book.roster(sites, 1) == {"north": 1}  # south is not let in yet; a name with another key never is
    known["south"] = lines["south"]
    assert book.roster(sites, 1) == {"north": 1, "south": 2}

    messages = [Message(RecordDict(), node, "train") for node in (1, 2)]
    names = list(sites.push_messages(messages))
    assert [message.content["fedpeft.run"]["site"] for message in messages] == ["north", "south"]
    assert all(message.metadata.ttl == 10.0 for message in messages)
    sites.cancel(names)
    for message, name in zip(messages, names, strict=True):
        message.metadata.__dict__["_message_id"] = name
    grid.replies = [
        Message(RecordDict(), reply_to=messages[1]),
        Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=messages[0]),
    ]
    assert list(sites.pull_messages(["another"])) == [] and not sites.late and waits == [["another"]]
    assert [(event["event"], event["client"]) for event in events] == [("late", "south")]


def test_what_a_stage_leaves_is_there_for_the_next_stage_of_its_run_and_for_no_other(rig):
    def message_of(run):
        return rig.resident.remembered(
            Context(run_id=run, node_id=7, node_config={}, state=RecordDict(), run_config={})
        )

    first = message_of(1)
    assert message_of(1) is first and message_of(2) is not first
    for run in range(3, 3 + worker.RUNS - 2):
        message_of(run)
    assert message_of(1) is first
    for run in range(10, 10 + worker.RUNS):
        message_of(run)
    assert message_of(1) is not first  # of an old run nothing is kept
