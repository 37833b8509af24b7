"""The page of a coordinator: its sites with their states, its newest runs, runs that come while it is looked at."""

from __future__ import annotations

import json
import os

import pytest

from fedpeft.cli import fleet
from fedpeft.cli.watch import Watched
from fedpeft.deploy import keys
from fedpeft.deploy.coordinator import server
from fedpeft.errors import RunError
from support.watched import BEGUN, ask, folder, lines, rounds, served

ONLINE = {"name": "north", "status": "online", "online_until": None}
AWAY = {"name": "south", "status": "offline", "online_until": BEGUN}


@pytest.fixture
def coordinator(tmp_path, monkeypatch):
    """Its folder; the page asks it anew each time."""
    path = tmp_path / "coordinator"
    server.init(path, "localhost", 9092, 9093, "127.0.0.1")
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        server.add_site(path, name, keys.site_keys(tmp_path / name))
    monkeypatch.setattr(fleet, "POLL_S", 0.0)
    return path


def submit(coordinator, name, events, place=0):
    run = folder(coordinator / "runs" / name, events)
    (run / "status.json").write_text(json.dumps({"state": "running"}))
    os.utime(run / "resolved.yaml", (BEGUN + place, BEGUN + place))
    return run


def test_a_coordinator_that_does_not_run_says_so_and_has_its_sites(coordinator):
    with served(coordinator) as page:
        text = ask(page)[2]
        said = json.loads(ask(page, "state.json")[2])
    assert "no run yet" in text and "The coordinator is not running." in text and "0 of 2 sites are connected" in text
    assert said["runs"] == [] and [row["name"] for row in said["coordinators"][0]["sites"]] == ["north", "south"]


def test_sites_have_their_state_and_when_they_last_answered(coordinator, monkeypatch):
    monkeypatch.setattr(server, "sites", lambda path: {"running": True, "sites": [ONLINE, AWAY]})
    submit(coordinator, "train-1", rounds(3, ["north"]))
    with served(coordinator) as page:
        part = json.loads(ask(page, "parts.json")[2])["coordinator-0"]
    rows = [row.split("</td>") for row in part.split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["<td>south", "<td>north"], "who is away stands first"
    assert rows[0][1].startswith("<td>offline since 14\u00a0Nov\u00a02023") and rows[0][2] == "<td>–"
    assert rows[1][1] == "<td>connected" and rows[1][2].startswith("<td>14\u00a0Nov\u00a02023"), (
        "it answered in a round"
    )
    assert "1 of 2 sites are connected" in part


def test_an_answer_of_the_coordinator_that_fails_is_said_and_the_page_goes_on(coordinator, monkeypatch):
    def fail(path):
        raise RunError("the coordinator does not answer on <9093>")

    monkeypatch.setattr(server, "sites", fail)
    with served(coordinator) as page:
        part = json.loads(ask(page, "parts.json")[2])["coordinator-0"]
    assert "does not answer on &lt;9093&gt;" in part and "not heard of" in part


def test_a_run_that_is_submitted_meanwhile_comes_onto_the_page(coordinator):
    first = submit(coordinator, "train-1", rounds(2))
    watched = Watched([coordinator])
    assert [run["run"] for run in watched.states()["runs"]] == ["train-1"]
    follower = watched.followers[0]
    submit(coordinator, "train-2", rounds(1), place=1)
    assert [run["run"] for run in watched.states()["runs"]] == ["train-2", "train-1"]
    assert watched.followers[1] is follower, "what was read of it is kept"
    with (first / "metrics.jsonl").open("a") as file:
        file.write(lines(rounds(3)[-1:]))
    assert [run["round"] for run in watched.states()["runs"]] == [1, 3]
    for place in range(3, 8):
        submit(coordinator, f"train-{place}", rounds(1), place)
    shown = [run["run"] for run in watched.states()["runs"]]
    assert shown == ["train-7", "train-6", "train-5", "train-4"]
    with served(coordinator) as page:
        assert "The newest 4 of 7 runs are shown." in ask(page)[2]


def test_what_each_client_has_spent_stands_beside_it(tmp_path):
    events = rounds(
        2, ["north", "south"], epsilon_max=1.5, epsilon_by_client={"north": 0.75, "south": 1.5, "west": 0.0}
    )
    with served(folder(tmp_path / "run", events)) as page:
        part = json.loads(ask(page, "parts.json")[2])["run-0-clients"]
    assert "<th>epsilon</th>" in part and "<td>0.75</td>" in part and "<td>1.5</td>" in part and "far-west" not in part
