"""The page of watched runs over HTTP: what it shows, what it refuses, and the command that serves it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from fedpeft.cli import main
from fedpeft.cli.watch import Server, Watched
from fedpeft.errors import InputError
from fedpeft.record import live_page
from support.run_folders import make_run
from support.watched import BEGUN, ask, folder, lines, rounds, served

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


def test_a_record_that_cannot_be_drawn_is_said_once_and_the_server_goes_on(tmp_path, caplog, monkeypatch):
    run = folder(tmp_path / "run", rounds(1))
    with served(run) as server:
        with monkeypatch.context() as broken:
            broken.setattr(live_page, "parts", lambda *_: 1 / 0)
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
