"""The coordinator's commands without a coordinator: the last run by name, and waiting for sites."""

from __future__ import annotations

import errno
import logging
import os
import ssl
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpeft import config as configs
from fedpeft.deploy import keys, processes, settings
from fedpeft.deploy.coordinator import daemon, server
from fedpeft.deploy.coordinator import run as runs
from fedpeft.errors import InputError, RunError


@pytest.fixture
def folder(tmp_path):
    server.init(tmp_path / "coordinator", "localhost", 9092, 9093, "127.0.0.1")
    return tmp_path / "coordinator"


def put_run(folder, name, at, state="done"):
    run = folder / "runs" / name
    run.mkdir()
    (run / "resolved.yaml").write_text("run: {rounds: 1}\n")
    os.utime(run / "resolved.yaml", (at, at))
    server.put_status(run, state=state)
    return run


def test_last_is_the_run_that_was_submitted_last_whatever_its_name(folder):
    found = settings.server(folder)
    with pytest.raises(InputError, match=r"no run 'last'.*Runs: none"):
        found.run("last")
    old, new = put_run(folder, "zeta-1", at=1000), put_run(folder, "alpha-2", at=2000, state="running")
    assert found.run("last") == new and found.run("zeta-1") == old
    (new / "log.txt").write_text("at work")
    assert server.logs(folder, "last") == "at work"
    assert server.status(folder, "last")["runs"][0]["run"] == "alpha-2"
    assert server.stop(folder, "last") == {"run": "alpha-2", "state": "stopped"}
    with pytest.raises(InputError, match="alpha-2 is stopped, not done"):
        server.fetch(folder, "last", folder.parent / "result")


def test_a_stop_is_not_written_over_by_the_process_that_it_is_to_stop(folder, monkeypatch):
    """Which writes its state at the start of every round."""
    place = put_run(folder, "alpha-1", at=1000, state="running")
    writes, stops = server.write_bytes, []

    def write_slowly(path, data):
        if not stops:
            stops.append(threading.Thread(target=server.stop, args=(folder, "alpha-1")))
            stops[0].start()
            time.sleep(0.2)  # the stop comes while this is on its way to the disk
        writes(path, data)

    monkeypatch.setattr(server, "write_bytes", write_slowly)
    runs.waiting(place, None)
    stops[0].join()
    assert server.get_status(place)["state"] == "stopped"
    runs.waiting(place, "a site")
    assert server.get_status(place)["state"] == "stopped"


def rows(running, *statuses):
    return {
        "running": running,
        "sites": [{"name": f"site-{number}", "status": status} for number, status in enumerate(statuses)],
    }


@pytest.fixture
def seen(folder, monkeypatch):
    """What `sites` says, one after another, the last for ever; two sites were added."""
    for name in ("site-0", "site-1"):
        (folder / "sites" / f"{name}.pub").write_text("key")
    answers = []

    def sites(path):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, RunError):
            raise answer
        return answer

    monkeypatch.setattr(server, "sites", sites)
    return answers


@pytest.mark.parametrize("count", [0, 1, 2])
def test_waiting_ends_when_so_many_are_connected(count, folder, seen):
    states = [rows(True, "offline", "unknown"), rows(True, "online", "offline"), rows(True, "online", "online")]
    seen += [rows(False, "unknown", "unknown"), RunError("does not answer"), *states]
    assert server.await_sites(folder, count, patience_s=30, poll_s=0) == states[count]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (rows(False, "unknown", "unknown"), "the coordinator is not running"),
        (rows(True, "online", "offline"), r"1 of 2 sites are connected; not site-1\."),
        (RunError("it does not answer"), "it does not answer"),
    ],
)
def test_waiting_gives_up_and_says_what_is_missing(last, said, folder, seen):
    seen.append(last)
    with pytest.raises(RunError, match=said):
        server.await_sites(folder, 2, patience_s=0, poll_s=0)


def test_more_sites_than_were_added_are_not_waited_for(folder, seen):
    seen.append(rows(True, "online", "online"))
    with pytest.raises(InputError, match="--wait: 3 sites, but 2 were added"):
        server.await_sites(folder, 3)


def chain(folder):
    """Whether ca.crt vouches for server.crt, as strictly as Python 3.13 asks."""
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.crt", folder / "server.key")
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context.wrap_bio(ours, theirs, server_hostname="localhost")
    other = serving.wrap_bio(theirs, ours, server_side=True)
    for side in (one, other, one, other):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return one.version()


def test_a_certificate_that_has_ended_is_refused_and_renewed_without_new_keys(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keys, "DAYS", -1)  # it begins a day ago
    server.init(tmp_path / "c", "localhost", 9092, 9093, "127.0.0.1")
    folder = tmp_path / "c"
    before = {name: (folder / name).read_bytes() for name in ("ca.key", "ca.crt", "server.key", "server.crt")}
    with pytest.raises(InputError, match=r"server\.crt: it ended 1 days ago.*server renew"):
        daemon.serve(folder)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        chain(folder)

    monkeypatch.setattr(keys, "DAYS", 20)
    made = server.renew(folder)
    after = {name: (folder / name).read_bytes() for name in before}
    assert [name for name in before if before[name] != after[name]] == ["server.crt"]
    assert made["days"] == 20 and "ca.crt" not in made["next"] and chain(folder) == "TLSv1.3"
    with caplog.at_level(logging.WARNING, "fedpeft"):
        logging.getLogger("fedpeft").propagate = True
        server.require_certificates(settings.server(folder))
    assert "server.crt ends in 20 days" in caplog.text

    monkeypatch.setattr(keys, "DAYS", 30 * 365)  # longer than its authority has left
    assert "new ca.crt to every site" in server.renew(folder)["next"]
    sites_own = tmp_path / "site"
    sites_own.mkdir()
    for name in ("server.crt", "server.key"):
        (sites_own / name).write_bytes((folder / name).read_bytes())
    (sites_own / "ca.crt").write_bytes(before["ca.crt"])  # a site that has not got the new one
    assert chain(folder) == chain(sites_own) == "TLSv1.3"


class Full:
    """Stands where write_bytes is, on a disk that is full."""

    def __init__(self, left):
        self.left = left

    def __call__(self, path, data):
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.left -= 1
        path.write_bytes(data)


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_that_a_full_disk_does_not_take_leaves_nothing(folder, monkeypatch, left):
    monkeypatch.setattr(server, "state", lambda found: {"insecure": True})
    monkeypatch.setattr(server, "write_bytes", Full(left))
    with pytest.raises(OSError, match="No space left"):
        server.run(folder, "quickstart", ["data.clients=4", "run.clients_per_round=2"])
    assert list((folder / "runs").iterdir()) == []


def test_all_sites_have_one_base_so_auto_is_float32_and_that_is_said(folder, monkeypatch, caplog):
    monkeypatch.setattr(server, "state", lambda found: {"insecure": True})
    made = server.run(folder, "quickstart", ["data.clients=4", "model.dtype=auto", "run.clients_per_round=2"])
    assert configs.load(Path(made["folder"]) / "resolved.yaml").model.dtype == "float32"
    assert "model.dtype=auto: float32" in caplog.text


def test_a_coordinator_on_a_full_disk_starts_no_run_says_so_once_and_goes_on(folder, monkeypatch, caplog):
    put_run(folder, "alpha-1", at=1000, state="submitted")
    started = []
    monkeypatch.setattr(daemon.Child, "start", lambda child: started.append(child.role))
    coordinator = daemon.Coordinator(settings.server(folder), True, {})
    monkeypatch.setattr(daemon, "write_bytes", Full(0))
    logging.getLogger("fedpeft").propagate = True
    with caplog.at_level(logging.INFO, "fedpeft"):
        for _ in range(3):
            coordinator.checked = -daemon.CHECK_S
            coordinator.step()
    assert [record.levelname for record in caplog.records] == ["ERROR"] and not started
    assert "alpha-1/begun: no space left on device; make room" in caplog.text
    monkeypatch.setattr(daemon, "write_bytes", Full(9))
    for _ in range(2):
        coordinator.full, coordinator.checked = -daemon.FULL_S, -daemon.CHECK_S
        coordinator.step()
    assert started == ["run alpha-1"]


@pytest.mark.parametrize(("number", "state"), [(errno.ENOSPC, "running"), (errno.EACCES, "failed")])
def test_a_run_without_room_pauses_and_with_another_trouble_of_the_disk_fails_in_a_sentence(
    folder, monkeypatch, caplog, number, state
):
    place = put_run(folder, "alpha-1", at=1000, state="running")
    monkeypatch.setattr(runs, "Clerk", lambda *given: None)

    def play(*given):
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    monkeypatch.setattr(runs, "play", play)
    logging.getLogger("fedpeft").propagate = True
    with pytest.raises(SystemExit) if state == "running" else nullcontext() as ended:
        runs.main(folder, "alpha-1", "insecure")
    assert ended is None or ended.value.code in processes.WHY  # its coordinator says why: its own log lies on that disk
    assert server.get_status(place)["state"] == state
    assert "metrics.jsonl: " in caplog.text and "Traceback" not in caplog.text


def test_a_process_that_ends_at_once_is_started_again_after_a_longer_pause_each_time(monkeypatch):
    now, child = [1000.0], processes.Child("run alpha-1", ["false"], {})
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda *given, **named: SimpleNamespace(poll=lambda: 1, returncode=1)
    )
    child.start()
    waits = []
    for _ in range(8):
        begun = child.begun
        while child.begun == begun:
            now[0] += 0.5
            child.keep()
        waits.append(child.begun - begun)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    now[0] += processes.STEADY_S + 1
    child.keep()
    assert child.begun == now[0] and child.pause_s == 1.0
