"""A run that has not ended has one process, whatever became of the last one, and with or without a SuperLink."""

from __future__ import annotations

import sys

import httpx
import pytest

from fedpeft.deploy import keys, settings
from fedpeft.deploy.coordinator import daemon
from fedpeft.deploy.coordinator import server as commands
from fedpeft.deploy.processes import Child, end_children
from fedpeft.errors import RunError


def put_run(server, name, state="submitted"):
    run = server.runs / name
    run.mkdir()
    (run / "resolved.yaml").write_text("{}")
    commands.put_status(run, state=state)
    return run


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A coordinator with one submitted run, whose process sleeps; there is no SuperLink."""
    commands.init(tmp_path / "c", "localhost", 9092, 9093, "0.0.0.0")
    server = settings.server(tmp_path / "c")
    run = put_run(server, "run-1")
    monkeypatch.setattr(daemon, "launch_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(daemon, "CHECK_S", -1.0)
    coordinator = daemon.Coordinator(server, True, {})
    yield coordinator, run
    daemon.end_children(list(coordinator.children.values()))


def test_a_run_has_one_process_and_another_when_that_ended(made):
    coordinator, _ = made
    put_run(coordinator.server, "run-0", "done")
    coordinator.step()
    first = coordinator.children["run-1"].process
    coordinator.step()
    assert list(coordinator.children) == ["run-1"] and coordinator.children["run-1"].process is first
    first.kill()
    first.wait()
    coordinator.step()
    again = coordinator.children["run-1"].process
    assert again is not first and again.poll() is None


def test_a_process_that_cannot_be_started_is_not_said_to_work(made, monkeypatch):
    coordinator, _ = made

    def fail(child):
        raise OSError(28, "No space left on device", "log.txt")

    monkeypatch.setattr(daemon.Child, "start", fail)
    coordinator.step()
    assert not coordinator.children


def test_a_run_that_has_ended_is_let_go(made):
    coordinator, run = made
    coordinator.step()
    process = coordinator.children["run-1"].process
    commands.put_status(run, state="done")
    coordinator.step()
    assert process.poll() is not None and not coordinator.children
    coordinator.step()
    assert not coordinator.children


def test_a_file_that_is_no_key_is_said_and_lets_nobody_in(made, caplog):
    coordinator, _ = made
    (coordinator.server.path / "sites" / "north.pub").write_text("ssh-rsa AAAA\n")
    assert coordinator.server.site_keys() == {} and "north.pub" in caplog.text


@pytest.mark.parametrize("error", [httpx.HTTPStatusError, httpx.ConnectError])
def test_a_site_that_is_refused_holds_up_no_run_and_is_said_once(made, monkeypatch, caplog, error):
    coordinator, _ = made
    answer = httpx.Response(409, request=httpx.Request("POST", "http://here"))

    class Link:
        def register_missing(self):
            kinds = {"response": answer} if error is httpx.HTTPStatusError else {}
            raise error("public key already in use", request=answer.request, **kinds)

    coordinator.insecure, coordinator.control = False, Link()
    monkeypatch.setattr(type(coordinator.server), "sites", lambda server: {"north": "a key"})
    for _ in range(3):
        coordinator.step()
    assert coordinator.children["run-1"].process.poll() is None
    assert caplog.text.count("the SuperLink refuses a site") == (error is httpx.HTTPStatusError)


def test_a_key_that_two_sites_have_is_the_first_one_s(made, caplog):
    coordinator, _ = made
    folder = coordinator.server.path / "sites"
    (folder / "north").mkdir(parents=True)
    line = keys.site_keys(folder / "north")
    for name in ("north", "south"):
        (folder / f"{name}.pub").write_text(line)
    assert list(coordinator.server.site_keys()) == ["north"]
    assert "south.pub: the key of north, which has it already" in caplog.text


KILLED_ONCE = """
import os, pathlib, signal, sys, time
if not (flag := pathlib.Path(sys.argv[1])).exists():
    flag.touch()
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_what_is_killed_while_a_coordinator_starts_is_started_again_and_what_fails_ends_the_start(
    tmp_path, monkeypatch
):
    killed = Child("fleet", [sys.executable, "-c", KILLED_ONCE, str(tmp_path / "flag")], {})
    failed, begun = Child("fleet", [sys.executable, "-c", "raise SystemExit(1)"], {}), set()

    def answers(host, port):
        begun.add(killed.begun)
        return len(begun) == 2

    monkeypatch.setattr(daemon, "ports", lambda server: [("localhost", 1)])
    monkeypatch.setattr(daemon.address, "answers", answers)
    killed.start()
    try:
        daemon._wait_for(None, killed)
        assert killed.process.poll() is None
    finally:
        end_children([killed])
    monkeypatch.setattr(daemon.address, "answers", lambda host, port: False)
    failed.start()
    with pytest.raises(RunError, match="the fleet does not come up"):
        daemon._wait_for(None, failed)
