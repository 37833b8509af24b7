"""The page that follows runs: records in every state, over HTTP, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fedpeft.cli import main
from fedpeft.cli.watch import Server, Watched
from fedpeft.errors import InputError
from fedpeft.record import metrics
from support.run_folders import CONFIG, a_round, clients_evaluated, make_run, start, written

NAMES = ["client-0", "client-1", "client-2"]
BEGUN = 1_700_000_000.0
PRIVATE = {"privacy": {"unit": "sample", "release_metrics": False}}


def rounds(count, names=NAMES, step=10.0, **more):
    """The start of a run of 20 rounds, and `count` rounds that are `step` seconds apart."""
    events = [
        {**start(names, rounds=20), "time": BEGUN},
        {"event": "evaluate", "round": 0, "accuracy": 0.2, "loss": 2.0},
    ]
    for number in range(1, count + 1):
        scores = {"accuracy": 0.2 + number / 100, "loss": 2.0}
        events.append(a_round(number, names, time=BEGUN + step * number, **scores, **more))
    return [{"time": BEGUN, **event} for event in events]


def lines(events):
    return "".join(json.dumps(event) + "\n" for event in events)


def folder(path, events=None, config=None, pid=None):
    """A run folder as a process leaves it that is at work (this one, or `pid`); no record where `events` is None."""
    path.mkdir()
    text = CONFIG.format(strategy="fedit", clients=3, seed=0) if config is None else json.dumps(config)
    (path / "resolved.yaml").write_text(text)
    (path / ".lock").write_text(json.dumps({"pid": pid or os.getpid(), "host": socket.gethostname()}))
    if events is not None:
        (path / "metrics.jsonl").write_text(lines(events))
    return path


def dead_process():
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def state(watched):
    (only,) = watched.states()
    return only


@contextmanager
def served(*runs):
    with Server(Watched(runs)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, name="", method="GET", **headers):
    """Status, headers and text of an answer; `name` follows the token, or is a whole path."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    path = name if name.startswith("/") else f"/{server.token}/{name}"
    connection.putrequest(method, path, skip_host="Host" in headers)
    for key, value in headers.items():
        for each in value if isinstance(value, list) else [value]:
            connection.putheader(key.replace("_", "-"), each)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


# The record -----------------------------------------------------------------------------------------------------------


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


# Over HTTP ------------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
ALLOWED = set(
    re.findall(
        r"\S+",
        "!doctype html head meta title style link body section main form label input button script noscript p h1 h2 h3 "
        "div table tr td th figure figcaption svg path circle text desc ul li b details summary",
    )
)


def test_hostile_names_and_reasons_are_text(tmp_path):
    events = rounds(1, [HOSTILE, "client-1"])
    events.append({"event": "quarantine", "round": 2, "client": HOSTILE, "reason": HOSTILE, "time": BEGUN})
    events.append({"event": "round_failed", "round": 2, "reason": HOSTILE, "time": BEGUN})
    events.append({"event": "evaluation_failed", "round": 2, "client": "client-1", "reason": HOSTILE, "time": BEGUN})
    run = folder(tmp_path / "<b>run<svg onload=alert(3)>", events)
    (run / "status.json").write_text(json.dumps({"state": "waiting", "reason": HOSTILE}))
    other = folder(tmp_path / "other", rounds(1))
    with served(run, other) as server:
        page = ask(server, "?client=%22%3E%3Cscript%3Ealert(4)%3C/script%3E")[2]
        parts = json.loads(ask(server, "parts.json")[2])
    whole = page + "".join(parts.values())
    assert "\\xa0" not in whole, "a time is ours, and is not escaped as what came from elsewhere"
    assert "alert(1)" in whole and "alert(2)" in whole and "alert(3)" in whole and "alert(4)" in page
    opened = re.findall(r"<([a-zA-Z!][^\s/>]*)([^>]*)>", re.sub(r"<(script|style)>.*?</\1>", r"<\1>", page, flags=re.S))
    opened += re.findall(r"<([a-zA-Z!][^\s/>]*)([^>]*)>", "".join(parts.values()))
    assert {name for name, _ in opened} <= ALLOWED
    assert not [rest for _, rest in opened if re.search(r"\son\w+\s*=", re.sub(r'"[^"]*"', "", rest))]
    assert page.count("<script>") == 1


def test_the_page_loads_nothing_and_its_policy_lets_only_its_own_script_run(tmp_path):
    with served(folder(tmp_path / "run", rounds(2))) as server:
        status, headers, page = ask(server)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"} and not re.search(
        r"https?://|@import|url\(", page
    )
    assert not re.search(r'\sstyle="|\son\w+="', page), "the policy would drop it"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:9999", 200),  # a tunnel
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example:80@localhost", 403),
        ("", 403),
        (["localhost", "evil.example"], 403),
        ([], 403),
    ],
)
def test_other_hosts_are_refused(tmp_path, host, status):
    with served(folder(tmp_path / "run", rounds(1))) as server:
        for name in ("", "state.json"):
            got, headers, text = ask(server, name, Host=host)
            assert got == status and ("client-0" in text) == (status == 200)
            assert "default-src 'none'" in headers["Content-Security-Policy"], "an error has it too"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "BREW"])
def test_other_methods_are_refused(tmp_path, method):
    with served(folder(tmp_path / "run", rounds(1))) as server:
        assert ask(server, method=method)[0] == 405


def test_a_head_request_has_headers_only(tmp_path):
    with served(folder(tmp_path / "run", rounds(1))) as server:
        status, headers, text = ask(server, method="HEAD")
        assert status == 200 and text == "" and int(headers["Content-Length"]) > 1000


def test_a_record_that_cannot_be_drawn_is_said_once_and_the_server_goes_on(tmp_path, caplog):
    run = folder(tmp_path / "run", rounds(1))
    with served(run) as server:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines([{**a_round(2, NAMES), "train_loss": "high", "time": BEGUN}]))
        assert [ask(server, "parts.json")[0] for _ in range(2)] == [500, 500]
        (run / "metrics.jsonl").write_text(lines(rounds(3)))
        assert ask(server, "parts.json")[0] == 200
    assert [record.message.split(":")[0] for record in caplog.records] == ["the page cannot be drawn"]


def test_without_the_token_nothing_is_shown(tmp_path):
    with served(folder(tmp_path / "run", rounds(1))) as server:
        token = server.token
        wrong = ["/", "/state.json", "/wrong/", f"/{token}", f"/{token}/resolved.yaml", f"/{token}/../{token}/"]
        wrong += [
            f"/{token[:-1]}/",
            f"/{token}//",
            f"http://evil.example/{token}/",
            "/%00/",
            f"/x/{token}/",
        ]
        assert {path: ask(server, path)[0] for path in wrong} == dict.fromkeys(wrong, 404)
        assert len(token) >= 20 and server.server_address[0] == "127.0.0.1"


def test_an_unchanged_run_costs_no_content_and_no_drawing(tmp_path, monkeypatch):
    run = folder(tmp_path / "run", rounds(1))
    with served(run) as server:
        tag = ask(server, "parts.json")[1]["ETag"]
        monkeypatch.setattr(server.watched, "_draw", lambda *what: pytest.fail("drawn again"))
        status, headers, text = ask(server, "parts.json", If_None_Match=tag)
        assert (status, text, headers["ETag"]) == (304, "", tag)
        monkeypatch.undo()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines(rounds(2)[-1:]))
        status, headers, text = ask(server, "parts.json", If_None_Match=tag)
        assert status == 200 and headers["ETag"] != tag and "2 of 20" in text


def test_many_clients_are_cut_to_those_that_stand_out_and_others_are_had_by_name(tmp_path):
    names = [f"client-{index:04d}" for index in range(2000)]
    events = rounds(2, names)
    events.append({"event": "quarantine", "round": 3, "client": "client-1999", "reason": "NaN", "time": BEGUN})
    with served(folder(tmp_path / "run", events)) as server:
        whole = json.loads(ask(server, "parts.json")[2])["run-0-clients"]
        wanted = json.loads(ask(server, "parts.json?client=NT-150")[2])["run-0-clients"]
        assert len(json.loads(ask(server, "state.json")[2])["runs"][0]["clients"]) == 2000
    rows = [row for row in whole.split("<tr>") if row.startswith("<td>")]
    assert len(rows) == 100 and rows[0].startswith("<td>client-1999") and "100 of 2,000 are shown" in whole
    assert len(re.findall(r"<td>client-150\d<", wanted)) == 10 == wanted.count("<td>client-")


def test_several_runs_stand_side_by_side_with_what_makes_them_unlike(tmp_path):
    runs = [make_run(tmp_path / "a", gain=0.1), make_run(tmp_path / "b", gain=0.05, clients=3, end=False)]
    with served(*runs) as server:
        parts = json.loads(ask(server, "parts.json")[2])
    assert "At round 5, the last that all evaluated: a 70.0 %, b 45.0 %" in parts["runs"]
    assert "clients: a 4; b 3" in parts["runs"]
    assert re.findall(r"<li><svg.*?</svg>(.*?)</li>", parts["charts"])[:2] == ["a <b>70.0 %</b>", "b <b>45.0 %</b>"]
    assert 'role="img"' in parts["charts"] and "a: 20.0 % in round 0, 70.0 % in round 5; b: " in parts["charts"]


def test_the_page_of_a_run_has_the_owners_of_its_report(tmp_path):
    split = {"clients": {"client-0": [0], "client-1": [1]}, "owners": {"client-0": "St. Mary"}}
    run = written(tmp_path / "run", [start(NAMES[:2]), a_round(1, NAMES[:2], accuracy=0.5, loss=1.0)], split=split)
    assert set(state(Watched([run]))["clients"]) == {"St. Mary", "client-1"}


# The command ----------------------------------------------------------------------------------------------------------


def test_json_prints_the_state_once_and_ends(tmp_path, capsys):
    main.app(["watch", str(folder(tmp_path / "run", rounds(3))), "--json"], standalone_mode=False)
    (only,) = json.loads(capsys.readouterr().out)["runs"]
    assert only["round"] == 3 and only["clients"]["client-1"]["rounds"] == 3


def test_what_cannot_be_watched_is_refused(tmp_path):
    run = folder(tmp_path / "run", rounds(1))
    with pytest.raises(InputError, match="no such folder"):
        Watched([tmp_path / "absent"])
    with pytest.raises(InputError, match="not a run folder"):
        Watched([tmp_path])
    with pytest.raises(InputError, match=r"run is given more than once"):
        Watched([run, run])
    with pytest.raises(InputError, match="17 run folders; at most 16"):
        Watched([run] * 17)
    with served(run) as server, pytest.raises(InputError, match=r"--port \d+: cannot be had on 127\.0\.0\.1"):
        Server(server.watched, server.server_address[1])


def test_ctrl_c_ends_the_server_without_an_error(tmp_path):
    run = folder(tmp_path / "run", rounds(1))
    command = [sys.executable, "-m", "fedpeft.cli.main", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("http://127.0.0.1:")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
