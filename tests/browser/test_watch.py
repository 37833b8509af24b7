"""The page of watched runs in a real browser: sizes, colours, many clients, several runs, a run that goes on."""

from __future__ import annotations

import time

import pytest

from support.browser import PAGES
from support.run_folders import make_run
from support.watched import BEGUN, folder, lines, rounds, served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
LONG = "A-hospital-with-a-name-that-is-as-long-as-it-may-be-" + "x" * 40


def lively(count, played=12):
    """Events of a run in which some clients stand out; one has the longest name that a site may have."""
    names = [*(f"client-{index:04d}" for index in range(count - 1)), LONG]
    events = rounds(played, names, bytes_up=2_500_000, bytes_down=3_100_000, epsilon_max=1.25)
    reason = "update holds NaN in base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight"
    for number in range(1, played, 3):
        events.append({"event": "quarantine", "round": number, "client": names[1], "reason": reason, "time": BEGUN})
    events.append({"event": "late", "round": 2, "client": names[2], "time": BEGUN})
    events.append({"event": "round_failed", "round": 13, "reason": "2 of 5 replies, the quorum is 4", "time": BEGUN})
    return events


def check(browser, url, name):
    """The page in both sizes and colour schemes, and by the keyboard alone."""
    found = []
    for width, scheme in PAGES:
        browser.open(url, width, scheme)
        browser.wait_for("Live")
        browser.shoot(f"watch-{name}-{width}-{scheme}")
        found += [f"{width} {scheme}: {problem}" for problem in browser.problems()]
    assert found == []
    stops = browser.tab_stops()
    assert stops[0] == "BUTTON#pause" and "INPUT#client" in stops
    assert not [stop for stop in stops if "WITHOUT" in stop]


@pytest.mark.parametrize("count", [5, 200, 2000])
def test_a_run_of_so_many_clients(browser, tmp_path, count):
    with served(folder(tmp_path / "run", lively(count))) as server:
        check(browser, server.url, str(count))


def test_several_runs_side_by_side(browser, tmp_path):
    runs = [make_run(tmp_path / f"run-{index}", gain=0.1 - 0.02 * index, end=index != 1) for index in range(4)]
    runs.append(folder(tmp_path / ("a-run-folder-with-a-long-name-" + "y" * 50), lively(30)))
    runs.append(folder(tmp_path / "killed", rounds(3), pid=2**22 + 1))
    with served(*runs) as server:
        check(browser, server.url, "side-by-side")


def test_a_page_follows_and_what_a_reader_has_opened_stays_open(browser, tmp_path):
    run = folder(tmp_path / "run", rounds(3))
    with served(run) as server:
        browser.open(server.url)
        browser.wait_for("3 of 20")
        browser.run("document.querySelector('details').open = true; document.querySelector('summary').focus()")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines(rounds(4)[-1:]))
        browser.wait_for("4 of 20")
        assert browser.run("return document.querySelector('details').open")
        assert browser.run("return document.activeElement.tagName") == "SUMMARY"
        browser.run("document.getElementById('pause').focus()")
        browser.press("SPACE")
        browser.wait_for("Paused.")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines(rounds(5)[-1:]))
        time.sleep(5)
        assert "4 of 20" in browser.run("return document.body.innerText")
        browser.press("SPACE")
        browser.wait_for("5 of 20")
        assert browser.problems() == []
    browser.wait_for("does not answer")


def test_a_name_that_is_looked_for_is_found_by_the_keyboard(browser, tmp_path):
    with served(folder(tmp_path / "run", lively(200))) as server:
        browser.open(server.url)
        browser.wait_for("100 of 200 are shown")
        browser.run("document.getElementById('client').focus()")
        browser.type("0150")
        browser.press("ENTER")
        browser.wait_for("client-0150")
        assert "client-0149" not in browser.run("return document.body.innerText")


def test_without_scripts_the_page_stands_still_and_says_so(browser, tmp_path):
    with served(folder(tmp_path / "run", rounds(3))) as server:
        browser.open(server.url, script=False)
        browser.wait_for("Without scripts the page stands still")
        browser.wait_for("3 of 20")
