"""The coordinator's commands without a coordinator: the last run by name, and waiting for sites."""

from __future__ import annotations

import os

import pytest

from fedpeft.deploy import settings
from fedpeft.deploy.coordinator import server
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
        (rows(True, "online", "offline"), r"1 of 2 sites are connected \(site-0\)"),
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
