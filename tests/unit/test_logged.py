"""Warnings in the terminal: each once, with how often it came again; never broken where nobody sees a terminal."""

from __future__ import annotations

import logging

import pytest

from fedpeft.cli import console, logged


@pytest.fixture
def log():
    log = logging.getLogger("fedpeft.of_this_test")
    log.propagate = False
    yield log
    log.handlers.clear()


def said(log, resident=False):
    """What three rounds print, and the sum of them."""
    handler = logged.Logged(resident)
    log.handlers[:] = [handler]
    long = "the adapter's array: float32 [4745], expected float32 [4746], " + "x" * 200
    with console.err.capture() as captured:
        for number in (1, 2, 3):
            log.warning("round %d: %s quarantined: %s", number, "client-001", long)
            log.warning("round %d: %s quarantined: %s", number, f"client-00{number + 1}", "B has NaN")
        handler.sum_up()
        handler.sum_up()
    return captured.get().splitlines()


def test_a_warning_that_comes_again_is_counted(log):
    lines = said(log)
    assert [line for line in lines if "client-001" in line] == [lines[0], lines[-1]] and len(lines) == 5
    assert lines[0].startswith("WARNING  round 1: client-001 quarantined: the adapter's array: float32 [4745]")
    assert lines[-1].startswith("WARNING  2 more times, last in round 3: client-001 quarantined: the adapter's")
    assert all(len(line) > 250 for line in (lines[0], lines[-1]))  # not broken at 80 columns
    assert [line for line in lines[1:4] if "B has NaN" in line] == lines[1:4]  # of other clients each


def test_a_service_logs_each_time(log):
    lines = said(log, resident=True)
    assert len(lines) == 6 and not any("more times" in line for line in lines)


def test_what_is_no_warning_is_never_counted(log):
    handler = logged.Logged()
    log.handlers[:], log.level = [handler], logging.INFO
    with console.err.capture() as captured:
        log.info("round 1: [bold]started")
        log.info("round 2: [bold]started")
        handler.sum_up()
    assert captured.get() == "INFO     round 1: [bold]started\nINFO     round 2: [bold]started\n"
