"""A run has one process, and Flower is told that it is worked on however long that one loads."""

from __future__ import annotations

import sys

import httpx
import pytest

from fedpeft.deploy import keys, settings
from fedpeft.deploy.coordinator import daemon
from fedpeft.deploy.coordinator import server as commands


class Link:
    """A SuperLink: runs by number, tokens that are handed out once, and which of them it has given up."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.runs = 0
        self.stopped: list[int] = []
        self.beats: list[str] = []
        self.given_up: set[str] = set()
        self.down = False

    def start_run(self, name: str) -> int:
        self.runs += 1
        self.waiting.append(self.runs)
        return self.runs

    def stop_run(self, number: int) -> None:
        self.stopped.append(number)

    def run_status(self, number: int) -> str:
        return "finished" if f"token-{number}" in self.given_up else "pending"

    def take(self, client: object) -> tuple[int, str] | None:
        return (self.waiting[0], f"token-{self.waiting.pop(0)}") if self.waiting else None


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A coordinator with one submitted run, whose process sleeps, and its SuperLink."""
    commands.init(tmp_path / "c", "localhost", 9092, 9093, "0.0.0.0")
    server, link = settings.server(tmp_path / "c"), Link()
    run = server.runs / "run-1"
    run.mkdir()
    (run / "resolved.yaml").write_text("{}")
    commands.put_status(run, state="submitted")

    class Held:
        def __init__(self, place: str, root: bytes | None, token: str) -> None:
            self.token = token

        def beat(self) -> bool:
            if link.down:
                raise httpx.ConnectError("down")
            link.beats.append(self.token)
            return self.token not in link.given_up

        def close(self) -> None:
            link.beats.append(f"{self.token} closed")

    monkeypatch.setattr(daemon, "HeldTask", Held)
    monkeypatch.setattr(daemon, "take_task", link.take)
    monkeypatch.setattr(daemon, "Control", lambda server, insecure: link)
    monkeypatch.setattr(daemon, "executor_client", lambda *_: None)
    monkeypatch.setattr(daemon, "launch", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(daemon, "CHECK_S", -1.0)
    monkeypatch.setattr(daemon, "TELL_S", -1.0)
    coordinator = daemon.Coordinator(server, True, {})
    yield coordinator, link, run
    daemon.end(list(coordinator.children.values()))


def test_flower_is_told_from_the_start_and_again(made):
    coordinator, link, _ = made
    coordinator.step()  # submits, and starts the process
    process = coordinator.children["run-1"].process
    coordinator.step()
    coordinator.step()
    assert link.beats == ["token-1"] * 3 and link.runs == 1
    assert coordinator.children["run-1"].process is process and process.poll() is None


def test_a_run_that_flower_gave_up_has_one_process_again(made):
    coordinator, link, _ = made
    coordinator.step()
    first = coordinator.children["run-1"].process
    link.given_up.add("token-1")
    coordinator.step()
    assert first.poll() is not None, "the old process is at work beside a new one"
    assert link.runs == 2 and link.stopped == [1]
    assert coordinator.children["run-1"].process.poll() is None and link.beats[-1] == "token-2"


def test_a_run_whose_first_word_is_lost_has_a_process(made, monkeypatch):
    coordinator, link, _ = made
    taken = daemon.take_task

    def take_and_go_down(client):
        task = taken(client)
        link.down = task is not None
        return task

    monkeypatch.setattr(daemon, "take_task", take_and_go_down)
    coordinator.step()
    assert not link.beats and coordinator.children["run-1"].process.poll() is None
    link.down = False
    coordinator.step()
    assert link.beats == ["token-1"] and link.runs == 1


def test_a_process_that_cannot_be_started_is_not_said_to_work(made, monkeypatch):
    coordinator, _, _ = made

    def fail(child):
        raise OSError(28, "No space left on device", "log.txt")

    monkeypatch.setattr(daemon.Child, "start", fail)
    coordinator.step()
    assert not coordinator.held and not coordinator.children


def test_a_run_that_cannot_be_submitted_takes_no_word_from_the_others(made, monkeypatch):
    coordinator, link, run = made
    coordinator.step()
    other = run.with_name("run-2")
    other.mkdir()
    (other / "resolved.yaml").write_text("{}")
    commands.put_status(other, state="submitted")

    def refuse(name):
        raise httpx.HTTPStatusError("500", request=None, response=None)

    monkeypatch.setattr(link, "start_run", refuse)
    coordinator.step()
    coordinator.step()
    assert link.beats == ["token-1"] * 3


def test_a_file_that_is_no_key_is_said_and_lets_nobody_in(made, caplog):
    coordinator, _, _ = made
    (coordinator.server.path / "sites" / "north.pub").write_text("ssh-rsa AAAA\n")
    assert coordinator.server.site_keys() == {} and "north.pub" in caplog.text


def test_a_link_that_is_down_takes_no_run_away(made):
    coordinator, link, _ = made
    coordinator.step()
    link.down = True
    coordinator.step()
    link.down = False
    coordinator.step()
    assert link.runs == 1 and coordinator.children["run-1"].process.poll() is None


def test_a_run_that_has_ended_is_let_go(made):
    coordinator, link, run = made
    coordinator.step()
    process = coordinator.children["run-1"].process
    commands.put_status(run, state="done")
    coordinator.step()
    assert process.poll() is not None and link.stopped == [1] and link.beats[-1] == "token-1 closed"
    coordinator.step()
    assert link.runs == 1 and not coordinator.children


def test_a_site_that_is_refused_holds_up_no_run_and_is_said_once(made, monkeypatch, caplog):
    coordinator, link, _ = made
    answer = httpx.Response(409, request=httpx.Request("POST", "http://here"))

    def refuse():
        raise httpx.HTTPStatusError("public key already in use", request=answer.request, response=answer)

    coordinator.insecure = False
    link.register_missing = refuse
    monkeypatch.setattr(type(coordinator.server), "sites", lambda server: {"north": "a key"})
    for _ in range(3):
        coordinator.step()
    assert link.runs == 1 and coordinator.children["run-1"].process.poll() is None
    assert caplog.text.count("the SuperLink refuses a site") == 1


def test_a_key_that_two_sites_have_is_the_first_one_s(made, caplog):
    coordinator, _, _ = made
    folder = coordinator.server.path / "sites"
    (folder / "north").mkdir(parents=True)
    line = keys.site_keys(folder / "north")
    for name in ("north", "south"):
        (folder / f"{name}.pub").write_text(line)
    assert list(coordinator.server.site_keys()) == ["north"]
    assert "south.pub: the key of north, which has it already" in caplog.text
