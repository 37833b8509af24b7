"""Real processes on loopback: TLS, authentication, three sites with their own files, and faults.

Every run ends as its simulation does, also with what strategies do beyond averaging.

One coordinator and three sites serve all tests of this file, in their order.
"""

from __future__ import annotations

import json
import signal
import socket
import ssl
import time

import grpc
import pytest
import torch
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from safetensors.torch import load_file

from fedpeft.adapters import folder
from fedpeft.deploy import flower, settings
from fedpeft.deploy.site import probe
from fedpeft.objectives.measures import CLASSES
from fedpeft.privacy.ledger import Ledger
from fedpeft.record.metrics import read
from support.deployed import NAMES, TRAIN, Deployment, children, listening, simulated, three_sites, until, write_records
from support.deployed import POLICY as SAMPLE_LEVEL

WORDS = {"no": ["bad", "sad", "mad"], "yes": ["fun", "joy", "win"], "up": ["hill", "sky"], "down": ["well", "pit"]}
TREE = {**TRAIN, "data": {"labels": list(WORDS)}}
CLEAR = {"privacy": {"unit": "none"}}
CLIENT_DP = {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}
SIGMA = {"privacy": {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-3}}
HELD = {"data.holdout": 0.2, "tta.corruption": "clean"}
TASKS = {"continual.tasks": 2, "continual.head": "lda"}
CASES = {
    "secagg": ({}, {"secagg.enabled": True}),
    "plain": ({}, {}),
    "kept": (CLEAR, {"strategy.name": "fedsa", **HELD}),
    "tasks-dp": (
        SIGMA,
        {
            "strategy.transport": "dense",
            "continual.body": "factor_coso",
            "continual.side": "both",
            "continual.statistics_noise": 2.0,
            **TASKS,
        },
    ),
    "tasks-lae": (CLEAR, {"strategy.name": "ffa_lora", "continual.body": "lae", **TASKS}),
    "tasks-sketch": (CLEAR, {"strategy.name": "fedit", "continual.body": "coso", "continual.side": "in", **TASKS}),
    "tasks-inputs": (CLEAR, {"strategy.name": "fedit", "continual.body": "inflora", **TASKS}),
    "tasks-replay": (CLEAR, {"strategy.name": "lora_fair", "continual.body": "conpet_static", "continual.tasks": 2}),
    "client-dp": (CLIENT_DP, {"strategy.name": "fedit"}),
    "atp": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["atp"], "tta.method": "atp", **HELD}),
    "scaffold": (CLEAR, {"strategy.name": "ffa_lora", "strategy.wrap": ["scaffold"]}),
    "flora": (CLEAR, {"strategy.name": "flora"}),
    "secagg-clear": (CLEAR, {"secagg.enabled": True}),
    "tent": (CLEAR, {"strategy.name": "fedit", "tta.method": "tent", "tta.keep": True, **HELD}),
    "fedthe": (CLEAR, {"strategy.name": "fedit", "strategy.wrap": ["fedthe"], "tta.method": "fedthe", **HELD}),
}
SAMPLE = ("secagg", "tasks-dp")  # the others are slow
assert set(SAMPLE) <= CASES.keys()
PRIVATE = ("secagg", "plain", "tasks-dp")  # of sample-level privacy, which one of the sites then asks for
EVENTS = ("round", "sums", "task")
OWN = {"time", "seconds", "push_s", "pull_s"}  # of a run
UNTOLD = {f"client_{name}" for name in CLASSES}  # what a site with a policy does not send
POLICY = (
    "unit: none\nmax_delta: 0.01\nseeded_noise: true\nunbounded: [max_epsilon, max_rounds, records]\n"
    "metrics: [train_loss, loss, accuracy, num-examples, missed_tasks]\n"
)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with three_sites(tmp_path_factory.mktemp("deployment"), POLICY, WORDS) as made:
        yield made


def test_a_site_that_does_not_allow_seeded_noise_adds_its_own(deployment):
    """The same request, another adapter; and the run goes on when one of three sites refuses to take part."""
    policy = deployment.root / NAMES[0] / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before.replace("seeded_noise: true", "seeded_noise: false"))
    other = deployment.root / NAMES[1] / "policy.yaml"
    other.write_text(before.replace("[max_epsilon, ", "[") + "max_epsilon: 2\n")
    run = deployment.submit(TREE, "privacy.randomness=seeded", "run.rounds=1")
    deployment.wait(run)
    policy.write_text(before)
    other.write_text(before)
    (event,) = deployment.rounds(run)
    assert event["clients"] == [NAMES[0], NAMES[2]]
    assert "privacy.epsilon=8 is over max_epsilon=2" in event["quarantined"][NAMES[1]]
    twin = simulated(
        deployment,
        TREE,
        {"data.test": str(deployment.root / "test.csv"), "run.rounds": 1, "run.faults": {NAMES[1]: "crash"}},
        "first",
    )
    adapter = folder.load(deployment.coordinator / "runs" / run / "adapter")
    assert adapter.distance(folder.load(twin / "adapter")) > 0.01


def test_the_fleet_port_is_grpc_over_tls(deployment):
    ca = deployment.coordinator / "ca.crt"
    assert probe.tls_of("localhost", deployment.port, ca) == ("TLSv1.3", "h2")
    with (
        pytest.raises(ssl.SSLCertVerificationError),  # whoever does not have this authority's certificate
        socket.create_connection(("localhost", deployment.port)) as raw,
    ):
        ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")
    with grpc.insecure_channel(f"localhost:{deployment.port}") as channel, pytest.raises(grpc.RpcError) as refused:
        FleetStub(channel).SendNodeHeartbeat(SendNodeHeartbeatRequest(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    with (
        grpc.secure_channel(f"localhost:{deployment.port}", credentials) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):  # TLS, but no signature
        FleetStub(channel).SendNodeHeartbeat(SendNodeHeartbeatRequest(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_all_but_the_fleet_port_is_on_loopback(deployment):
    """Every listening socket of the coordinator and of the sites, from the kernel's table."""
    pids = [pid for process in deployment.processes.values() for pid, _ in children(process.pid)]
    found = listening(pids)
    own = int((deployment.coordinator / "post").read_text())  # where the runs' processes meet the face
    assert found.keys() == {deployment.port, deployment.http_port, deployment.control_port, own}
    assert all(address.endswith("0100007F") for address in found.values())  # by --listen those for sites too


@pytest.mark.parametrize(
    "case", [case if case in SAMPLE else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_sites_end_as_the_simulation_does(deployment, case):
    """The adapter, what every round reports, and what stays with each site."""
    privacy, options = CASES[case]
    tree, test = {**TREE, **privacy}, str(deployment.root / "test.csv")
    options = {**options, "privacy.randomness": "seeded", "run.rounds": 2, "data.test": test}
    (deployment.root / NAMES[2] / "policy.yaml").write_text(SAMPLE_LEVEL if case in PRIVATE else POLICY)
    run = deployment.submit(tree, *(f"{key}={json.dumps(value)}" for key, value in options.items()))
    twin = simulated(deployment, tree, options, case)
    deployment.wait(run)
    (deployment.root / NAMES[2] / "policy.yaml").write_text(POLICY)
    close(folder.load(deployment.coordinator / "runs" / run / "adapter").tensors, folder.load(twin / "adapter").tensors)
    wanted = [event for event in read(twin / "metrics.jsonl") if event["event"] in EVENTS]
    found = [event for event in deployment.events(run) if event["event"] in EVENTS]
    assert case.startswith("tasks") == any(event["event"] == "task" for event in found)
    for event, expected in zip(found, wanted, strict=True):
        assert event.get("clients", NAMES) == NAMES
        if event["event"] == "round" and case in PRIVATE:  # what a record has spent stays with real sites
            assert "epsilon_max" not in event and expected.pop("epsilon_max") > 0
            assert "epsilon_by_client" not in event and expected.pop("epsilon_by_client")
        assert not event.keys() & UNTOLD and event.keys() - OWN == expected.keys() - OWN - UNTOLD
        for key in expected.keys() - OWN - UNTOLD:
            value = expected[key]
            assert event[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    kept = 0
    for name in NAMES:
        here, there = deployment.root / name / "state" / run / name, twin / "clients" / name
        assert sorted(path.name for path in here.glob("*")) == sorted(path.name for path in there.glob("*"))
        for path in here.glob("*.safetensors"):
            close(load_file(path), load_file(there / path.name))
            kept += 1
    assert bool(kept) == (case in ("kept", "scaffold") or case.startswith("tasks") or case in PRIVATE)
    if case in ("secagg", "plain"):
        same_fetched_and_spent(deployment, run, twin)


def same_fetched_and_spent(deployment, run, twin):
    """What `server fetch` brings, and what is in the sites' ledgers, is what the simulation has."""
    place = deployment.root / f"fetched-{run}"
    brought = deployment.call("server", "fetch", deployment.coordinator, run, "--to", place)
    assert {"adapter", "metrics.jsonl", "summary.json", "report.html"} <= brought.keys()
    assert "<html" in (place / "report.html").read_text()
    got = folder.load(place / "adapter")
    close(got.tensors, folder.load(twin / "adapter").tensors)
    assert got.distance(got.map(torch.zeros_like)) > 0.1
    for name in NAMES:
        ledger = Ledger(deployment.root / name / "ledger" / f"{name}.jsonl")
        spent = [entry.release for entry in ledger.entries() if entry.run.startswith(run)]
        assert spent == [entry.release for entry in Ledger(twin / "ledger" / f"{name}.jsonl").entries()] != []


def test_a_sequence_needs_a_test_set_of_the_coordinator(deployment):
    path = deployment.root / "untested.yaml"
    path.write_text(json.dumps({**TREE, **CLEAR, "continual": {"body": "sequential", "tasks": 2}}))
    said = deployment.call("server", "run", deployment.coordinator, path, "run.rounds=2", code=2)
    assert "Set data.test." in said and "Traceback" not in said


@pytest.mark.slow
def test_an_unregistered_key_a_wrong_certificate_and_a_stranger_clock(deployment, monkeypatch):
    data = deployment.root / f"{NAMES[0]}.csv"
    place = deployment.add_site("stranger", data, register=False)
    seen = {row["check"]: row for row in deployment.call("site", "check", place, code=1)["checks"]}
    assert [name for name, row in seen.items() if not row["ok"]] == ["server"]
    assert "does not know this site's key" in seen["server"]["seen"]
    deployment.start("stranger")
    until(lambda: "does not know this site's key" in deployment.log("stranger"), "the refusal of a stranger", 60)
    assert not [
        row for row in deployment.call("server", "sites", deployment.coordinator)["sites"] if row["name"] == "stranger"
    ]
    deployment.call("server", "add-site", deployment.coordinator, "stranger", place / "site.pub")
    connected(deployment, "stranger")  # it has kept trying
    deployment.stop("stranger")
    (deployment.coordinator / "sites" / "stranger.pub").unlink()

    other = settings.server(deployment.coordinator)
    assert other.settings.port == deployment.port
    from fedpeft.deploy import keys

    keys.certificates(deployment.root / "elsewhere", "localhost")
    (place / "ca.crt").write_bytes((deployment.root / "elsewhere" / "ca.crt").read_bytes())
    seen = {row["check"]: row for row in deployment.call("site", "check", place, code=1)["checks"]}
    assert "certificate verify failed" in seen["server"]["seen"] and not seen["clock"]["ok"]

    site = settings.site(deployment.root / NAMES[0])
    assert probe.clock_behind_s(site) == 0.0
    signed = flower.identity
    monkeypatch.setattr(flower, "identity", lambda key, shift: signed(key, shift - 100))
    assert probe.clock_behind_s(site) == pytest.approx(100, abs=1.5)
    for wrong in (30, -400):
        monkeypatch.setattr(flower, "identity", lambda key, shift, wrong=wrong: signed(key, shift + wrong))
        with pytest.raises(probe.RunError, match="Set the clock"):
            probe.clock_behind_s(site)


def connected(deployment, name, seconds=60):
    def look():
        rows = deployment.call("server", "sites", deployment.coordinator)["sites"]
        return any(row["name"] == name and row["status"] == "online" for row in rows)

    until(look, f"{name} connected", seconds)


@pytest.mark.slow
def test_a_run_outlives_everything_that_is_killed(deployment):
    """Worker, client process, site, fleet process, run and coordinator, each by SIGKILL, in one run."""
    run = deployment.submit(
        TREE, "privacy.randomness=seeded", "run.rounds=100", "run.deadline_s=15", "privacy.planned_rounds=100"
    )

    def rounds_after(count=1, seconds=90):
        reached = len(deployment.rounds(run)) + count
        until(lambda: len(deployment.rounds(run)) >= reached, f"round {reached}", seconds)
        return deployment.rounds(run)[-1]

    def all_again():
        since = len(deployment.rounds(run))
        until(lambda: NAMES in [event["clients"] for event in deployment.rounds(run)[since:]], "all sites", 150)

    rounds_after(1, 300)
    first, second, third = NAMES
    ledger = Ledger(deployment.root / third / "ledger" / f"{third}.jsonl")

    deployment.kill(first, "worker")  # in mid-round or between two: a reply with a reason, then a new worker
    deployment.processes[second].send_signal(signal.SIGSTOP)  # away for a while, as behind a network that is gone
    rounds_after(2)
    deployment.processes[second].send_signal(signal.SIGCONT)
    deployment.kill_all(third)
    before = [(entry.run, entry.round, entry.request) for entry in ledger.entries()]
    dropped = rounds_after(2)
    assert third in dropped["quarantined"] or third not in dropped["clients"]
    deployment.start(third)
    all_again()
    assert [(entry.run, entry.round, entry.request) for entry in ledger.entries()][: len(before)] == before

    deployment.kill("coordinator", "fleet")
    rounds_after(2)
    deployment.kill("coordinator", "run")
    rounds_after(2)
    deployment.kill_all("coordinator")
    reached = len(deployment.rounds(run))
    time.sleep(1)
    deployment.start("coordinator")
    until(lambda: len(deployment.rounds(run)) > reached + 1, "rounds after the restart", 90)
    numbers = [event["round"] for event in deployment.rounds(run)]
    assert numbers == list(range(1, len(numbers) + 1))  # none lost, none twice
    all_again()
    deployment.call("server", "stop", deployment.coordinator, run)
    until(lambda: not deployment.pids("coordinator", "run"), "the end of the stopped run", 20)
    assert deployment.state(run) == "stopped"
    print([(event["round"], event["quarantined"], event["seconds"]) for event in deployment.rounds(run)])


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["round", "sums", "task"])
def test_a_sequence_goes_on_where_its_coordinator_was_killed(deployment, cut):
    """After a round of the first task, after the sums for its head, or after its row of the matrix."""
    privacy, options = CASES["tasks-dp"]
    tree = {**TREE, **privacy}
    options = {
        **options,
        "privacy.randomness": "seeded",
        "run.rounds": 4,
        "client.batch_size": 8,
        "data.test": str(deployment.root / "test.csv"),
    }
    run = deployment.submit(tree, *(f"{key}={json.dumps(value)}" for key, value in options.items()))
    until(lambda: any(event["event"] == cut for event in deployment.events(run)), cut)
    deployment.kill_all("coordinator")
    assert not any(event["event"] == "end" for event in deployment.events(run))
    deployment.start("coordinator")
    twin = simulated(deployment, tree, options, f"cut-{cut}")
    deployment.wait(run)
    place = deployment.coordinator / "runs" / run
    close(folder.load(place / "adapter").tensors, folder.load(twin / "adapter").tensors)
    ours, theirs = (json.loads((path / "summary.json").read_text())["continual"] for path in (place, twin))
    assert ours == theirs and len(ours["right"]) == 2
    for event in EVENTS:
        assert [(one["round"], one.get("task")) for one in deployment.events(run) if one["event"] == event] == [
            (one["round"], one.get("task")) for one in read(twin / "metrics.jsonl") if one["event"] == event
        ]
    for name in NAMES:  # what was answered again cost nothing more
        for task in range(2):
            account = f"{name}+task-{task}.jsonl"
            spent = [
                entry.release
                for entry in Ledger(deployment.root / name / "ledger" / account).entries()
                if entry.run.startswith(run)
            ]
            assert spent == [entry.release for entry in Ledger(twin / "ledger" / account).entries()]


@pytest.mark.slow
def test_insecure_mode_says_so_and_asks_sites_for_their_names(tmp_path):
    made = Deployment(tmp_path)
    write_records(tmp_path / "own.csv", 30, 0)
    made.add_site("clinic", tmp_path / "own.csv", register=False)
    (tmp_path / "clinic" / "ca.crt").unlink()
    made.start("clinic")
    assert made.processes.pop("clinic").wait(30) == 2  # never without TLS by accident
    try:
        made.start("coordinator", "--insecure")
        made.start("clinic", "--insecure")
        made.ready()
        assert all("INSECURE: no TLS" in made.log(what) for what in ("coordinator", "clinic"))
        run = made.submit(TRAIN, "data.clients=1", "run.rounds=1")
        made.wait(run)
        assert made.rounds(run)[0]["clients"] == ["clinic"]
    finally:
        made.close()


def test_the_coordinator_and_the_sites_stop_when_asked_to(deployment):
    for name in [*NAMES, "coordinator"]:
        deployment.stop(name)


def close(some, others):
    assert some.keys() == others.keys()
    for key, value in others.items():
        torch.testing.assert_close(some[key], value, rtol=1e-4, atol=1e-6)
