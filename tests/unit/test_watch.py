"""Runs that are followed by their records, in every state that a record may be in."""

from __future__ import annotations

import json
import re

import pytest

from fedpeft.cli.watch import Watched
from fedpeft.record import metrics
from support.run_folders import a_round, clients_evaluated, start, written
from support.watched import BEGUN, NAMES, PRIVATE, ask, dead_process, folder, lines, rounds, served, state


def test_a_run_at_work_shows_round_rate_and_expected_end(tmp_path):
    """3 of 20 rounds, one every 10 s: the end is 17 rounds after the last one."""
    said = state(Watched([folder(tmp_path / "run", rounds(3))]))
    assert (said["state"], said["round"], said["rounds"]) == ("running", 3, 20)
    assert said["seconds_per_round"] == 10 and said["expected_end"] == BEGUN + 30 + 170
    assert [row["accuracy"] for row in said["played"]] == pytest.approx([0.2, 0.21, 0.22, 0.23])
    assert said["headline"][0].startswith("Accuracy 23.0 % on the server test set after round 3")
    assert (said["bytes_up"], said["bytes_down"]) == (30, 30)


def test_a_pause_before_a_resume_does_not_slow_the_rate(tmp_path):
    events = rounds(8)
    for event in events:
        event["time"] += 86_400 * (event.get("round", 0) > 4)
    said = state(Watched([folder(tmp_path / "run", events)]))
    assert said["seconds_per_round"] == 10 and said["expected_end"] == BEGUN + 86_400 + 80 + 120


def test_only_what_is_new_is_read_and_a_torn_line_waits_for_its_end(tmp_path, monkeypatch):
    run = folder(tmp_path / "run", rounds(2))
    watched, heard = Watched([run]), []
    hear = type(watched.followers[0])._hear
    monkeypatch.setattr(
        type(watched.followers[0]), "_hear", lambda self, event: (heard.append(event), hear(self, event))
    )
    assert state(watched)["round"] == 2 and len(heard) == 4
    third = lines(rounds(3)[-1:])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(third[:40])
    assert state(watched)["round"] == 2 and state(watched)["problems"] == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write(third[40:])
    assert state(watched)["round"] == 3 and len(heard) == 5
    assert state(watched)["clients"]["client-0"]["rounds"] == 3


def test_a_run_that_is_resumed_from_an_earlier_round_is_read_anew(tmp_path):
    run = folder(tmp_path / "run", rounds(5))
    watched = Watched([run])
    assert state(watched)["clients"]["client-1"]["rounds"] == 5
    recorder = metrics.Recorder(run / "metrics.jsonl")
    recorder.resume(2)
    said = state(watched)
    assert said["round"] == 2 and said["clients"]["client-1"]["rounds"] == 2
    for number in range(3, 8):  # longer than it was
        recorder.record(a_round(number, NAMES[:1], accuracy=0.5, loss=1.0))
    said = state(watched)
    assert said["round"] == 7 and said["clients"]["client-1"]["rounds"] == 2
    assert [row["accuracy"] for row in said["played"]][-5:] == [0.5] * 5


def test_a_record_that_was_begun_anew_and_is_longer_is_noticed(tmp_path):
    run = folder(tmp_path / "run", rounds(2))
    watched = Watched([run])
    assert state(watched)["round"] == 2
    (run / "metrics.jsonl").write_text(lines(rounds(9, step=7.0)))  # the same file on the disk, other content
    assert state(watched)["clients"]["client-0"]["rounds"] == 9


def test_a_record_that_is_not_there_yet_and_one_that_is_taken_away(tmp_path):
    run = folder(tmp_path / "run")
    watched = Watched([run])
    said = state(watched)
    assert (said["state"], said["clients"], said["played"], said["headline"]) == ("not begun", {}, [], [])
    (run / "metrics.jsonl").write_text(lines(rounds(1)))
    assert state(watched)["state"] == "running"
    (run / "metrics.jsonl").unlink()
    assert state(watched)["state"] == "not begun" and state(watched)["clients"] == {}


def test_a_run_whose_process_has_died_says_so_and_has_no_end(tmp_path):
    run = folder(tmp_path / "run", rounds(3), pid=dead_process())
    (run / "checkpoints" / "round-000003").mkdir(parents=True)
    said = state(Watched([run]))
    assert (said["state"], said["reason"], said["expected_end"]) == ("interrupted", "its process is gone", None)
    assert "The last complete round is 3. Go on with: fedpeft resume" in said["advice"]


def test_of_a_process_on_another_machine_nothing_is_claimed(tmp_path):
    run = folder(tmp_path / "run", rounds(3))
    (run / ".lock").write_text(json.dumps({"pid": dead_process(), "host": "another-machine"}))
    assert state(Watched([run]))["state"] == "not ended"


def test_a_run_that_has_ended_is_done_though_its_process_is_gone(tmp_path):
    run = folder(tmp_path / "run", [*rounds(3), {"event": "end", "round": 3, "time": BEGUN + 31}], pid=dead_process())
    said = state(Watched([run]))
    assert (said["state"], said["expected_end"], said["last_event"]) == ("done", None, BEGUN + 31)


@pytest.mark.parametrize(
    ("status", "seen"),
    [
        ({"state": "waiting", "reason": "1 of 3 sites are connected"}, ("waiting", "1 of 3 sites are connected")),
        ({"state": "failed", "reason": "quorum"}, ("failed", "quorum")),
        ({"state": "running"}, ("running", "")),
    ],
)
def test_a_coordinators_run_says_what_it_waits_for(tmp_path, status, seen):
    run = folder(tmp_path / "run", rounds(1))
    (run / "status.json").write_text(json.dumps(status))
    said = state(Watched([run]))
    assert (said["state"], said["reason"]) == seen


def test_lines_that_are_no_events_are_named_and_left_out(tmp_path):
    run = folder(tmp_path / "run", rounds(1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"broken\n[1]\n{"event": "round", "time": 1}\n' + lines(rounds(2)[-1:]))
    said = state(Watched([run]))
    assert said["round"] == 2 and said["clients"]["client-0"]["rounds"] == 2
    assert said["problems"] == ["metrics.jsonl: 3 lines are no events of a run and are left out; the first is line 4."]


def test_clients_are_counted_seen_and_quarantined_with_the_last_reason(tmp_path):
    events = rounds(1)
    for number, reason in ((2, "NaN"), (3, "too far")):
        events.append({"event": "quarantine", "round": number, "client": "client-2", "reason": reason, "time": BEGUN})
        if number == 3:  # the round failed, and was tried again under its number
            events.append(dict(events[-1]))
        events.append(a_round(number, NAMES[:2], time=BEGUN + 10 * number, quarantined={"client-2": reason}))
    events.append(a_round(4, NAMES[1:2], time=BEGUN + 40))
    clients = state(Watched([folder(tmp_path / "run", events)]))["clients"]
    assert {name: (row["rounds"], row["last_round"], row["seen"] - BEGUN) for name, row in clients.items()} == {
        "client-0": (3, 3, 30),
        "client-1": (4, 4, 40),
        "client-2": (1, 1, 10),
    }
    bad = clients["client-2"]
    assert (bad["quarantined"], bad["quarantined_last"], bad["reason"], bad["is_quarantined"]) == (
        2,
        3,
        "too far",
        True,
    )
    assert not clients["client-0"]["is_quarantined"] and clients["client-0"]["quarantined"] == 0


@pytest.mark.parametrize(("config", "shown"), [(None, True), (PRIVATE, False)])
def test_what_a_private_run_hides_of_its_clients_is_nowhere(tmp_path, config, shown):
    """As in its report: numbers of records and scores on a client's own records."""
    scored = {**clients_evaluated(1, NAMES), "time": BEGUN}
    scored["clients"]["client-1"].update({"accuracy": 0.777, "num-examples": 4242.0})
    run = folder(tmp_path / "run", [*rounds(1), scored], config=config)
    with served(run) as server:
        texts = [ask(server, name)[2] for name in ("", "parts.json", "state.json")]
    assert [("77.7 %" in text or "0.777" in text) for text in texts] == [shown] * 3
    assert not any("4242" in text or "4,242" in text for text in texts)


def test_a_config_that_cannot_be_read_hides_too_and_the_page_goes_on(tmp_path):
    scored = {**clients_evaluated(1, NAMES), "time": BEGUN}
    run = folder(tmp_path / "run", [*rounds(1), scored])
    watched = Watched([run])
    (run / "resolved.yaml").write_text("[")
    said = state(watched)
    assert all("accuracy" not in row for row in said["clients"].values()) and said["round"] == 1
    assert "resolved.yaml: not readable as YAML" in said["problems"][0]


def test_a_sequence_has_its_matrix_and_joins_no_scores_of_unlike_classes(tmp_path):
    events = rounds(0)
    for task in range(2):
        for number in (2 * task + 1, 2 * task + 2):
            events.append(a_round(number, NAMES, accuracy=0.5, loss=1.0, classes=2 * task + 2, time=BEGUN + number))
        row = {"task": task, "classes": [2 * task, 2 * task + 1], "right": [9 - task, 5 * task], "count": [10, 10]}
        events.append({"event": "task", "round": 2 * task + 2, **row, "time": BEGUN})
    run = folder(tmp_path / "run", events, config={"continual": {"tasks": 2, "head": "ncm"}})
    with served(run) as server:
        parts = json.loads(ask(server, "parts.json")[2])
    cells = re.findall(r"<t[dh]>(.*?)</t[dh]>", parts["run-0-tasks"])
    assert cells[4:] == ["task 1", "2", "90.0 %", "", "task 2", "4", "80.0 %", "50.0 %"]
    accuracy = parts["charts"].split("</figure>")[0]
    assert [path.count("L") for path in re.findall(r'class="c0" d="(M[^H]*?)"', accuracy)] == [0, 1, 1]


def test_the_page_of_a_run_has_the_owners_of_its_report(tmp_path):
    split = {"clients": {"client-0": [0], "client-1": [1]}, "owners": {"client-0": "St. Mary"}}
    run = written(tmp_path / "run", [start(NAMES[:2]), a_round(1, NAMES[:2], accuracy=0.5, loss=1.0)], split=split)
    assert set(state(Watched([run]))["clients"]) == {"St. Mary", "client-1"}


NONSENSE = ["x", [], {"a": 1}, -1, 1e300, 10**400, float("nan")]


@pytest.mark.parametrize("key", ["time", "clients", "rounds", "accuracy", "loss", "bytes_up", "seconds", "train_loss"])
def test_a_value_that_makes_no_sense_ends_neither_the_page_nor_that_of_other_runs(tmp_path, key):
    for place, value in enumerate(NONSENSE):
        for line in (0, 1, -1):
            events = rounds(3)
            events[line][key] = value
            run = folder(tmp_path / f"run-{place}-{line}", events)
            watched = Watched([run, folder(tmp_path / f"other-{place}-{line}", rounds(2))])
            assert all(watched.answer(name, "")[0] for name in ("", "parts.json", "state.json"))


def test_warnings_name_owners_as_the_table_does(tmp_path):
    names = [f"client-{number}" for number in range(4)]
    far = {"update_norms": {name: 1000.0 if name == "client-3" else 1.0 for name in names}}
    events = rounds(3, names, **far, far_updates={"client-3": 1000.0})
    run = folder(tmp_path / "run", events)
    owners = {name: f"hospital-{name[-1]}" for name in names}
    (run / "split.json").write_text(json.dumps({"clients": {name: [0] for name in names}, "owners": owners}))
    said = state(Watched([run]))
    assert set(said["clients"]) == set(owners.values())
    assert said["warnings"] and all(text.startswith("hospital-3: ") for text in said["warnings"])
