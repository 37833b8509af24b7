"""The record of a run: what is written, what survives a kill and a resume, and the summary's numbers."""

from __future__ import annotations

import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import InputError
from fedpeft.record.metrics import CLIENTS, SERVER, Recorder, baseline, evaluations, make_finite, read, summarise

START = {
    "event": "start",
    "strategy": "fedsvd",
    "engine": "cohort",
    "seed": 3,
    "clients": 4,
    "rounds": 3,
    "trainable_parameters": 120,
}
PLAIN = {"privacy": {"unit": "none"}}


def round_event(number, **scores):
    return {
        "event": "round",
        "round": number,
        "clients": ["a", "b"],
        "quarantined": {},
        "bytes_down": 1000 * number,
        "bytes_up": 10 * number,
        "train_loss": 1.0 / number,
        **scores,
        "seconds": 0.5,
    }


def run_events(rounds=3):
    events = [START, {"event": "evaluate", "round": 0, "accuracy": 0.25, "loss": 2.0}]
    for number in range(1, rounds + 1):
        if number == 2:
            events.append({"event": "quarantine", "round": 2, "client": "c", "reason": "A has NaN or inf"})
        accuracy = {1: 0.5, 2: 0.75, 3: 0.625}[number]
        events.append(round_event(number, accuracy=accuracy, loss=1.5 - 0.25 * number))
    return events


def recorded(path, events):
    recorder = Recorder(path)
    for event in events:
        recorder.record(event)
    return recorder


def without_time(events):
    return [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in events]


def test_each_event_is_one_line_with_a_time_in_the_order_given(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl")
    for count, event in enumerate(run_events(), start=1):
        recorder.record(event)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == count  # there at once, not at the end
    found = read(tmp_path / "metrics.jsonl")
    assert without_time(found) == without_time(run_events())
    assert list(found[0]) == [*START, "time"]
    times = [event["time"] for event in found]
    assert times == sorted(times) and times[0] > 1.6e9


def test_numbers_that_are_not_finite_become_valid_json(tmp_path):
    deep = {"a": {"loss": -math.inf}}
    recorded(tmp_path / "m", [{"event": "x", "loss": math.nan, "deep": deep, "list": [1.5, math.inf]}])
    text = (tmp_path / "m").read_text()
    event = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    event.pop("time")
    assert event == {
        "event": "x",
        "loss": None,
        "loss_nonfinite": "nan",
        "deep": {"a": {"loss": None, "loss_nonfinite": "-inf"}},
        "list": [1.5, None],
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values)
def test_finite_is_strict_json_and_changes_nothing_that_was(value):
    result = make_finite(value)
    json.dumps(result, allow_nan=False)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        assert result != value
    else:
        assert result == value


def test_a_new_run_does_not_go_on_in_the_file_of_another(tmp_path):
    recorded(tmp_path / "m", run_events())
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(InputError, match="already holds"):
        Recorder(tmp_path / "m").record(START)
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_skipped_with_a_warning(tmp_path, caplog, cut):
    recorded(tmp_path / "m", run_events())
    text = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(text[:-cut])
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        found = read(tmp_path / "m")
    assert without_time(found) == without_time(run_events()[:-1])
    assert "incomplete" in caplog.text


def test_a_broken_line_before_the_last_is_an_error_that_names_it(tmp_path):
    recorded(tmp_path / "m", run_events())
    lines = (tmp_path / "m").read_text().splitlines(keepends=True)
    for bad, found in (("{torn\n", "is not JSON"), ("[1, 2]\n", "not an event"), ('{"round": 1}\n', "not an event")):
        (tmp_path / "m").write_text("".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(InputError, match=f"m: line 2 .*{found}"):
            read(tmp_path / "m")
    with pytest.raises(InputError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("tail", ["", '{"event": "round", "rou', "\x00\x00"])
@pytest.mark.parametrize("killed_in", [2, 3])
def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path, killed_in, tail):
    """Killed with part of a round on record after checkpoint 1, perhaps while writing; or at its end."""
    whole = [*run_events(), {"event": "end", "round": 3}]
    recorded(tmp_path / "whole", whole)
    first = next(index for index, event in enumerate(whole) if event.get("round") == 2)
    recorded(tmp_path / "cut", whole if killed_in == 3 else whole[: first + 1])  # the quarantine of round 2 is there
    with (tmp_path / "cut").open("a") as file:
        file.write(tail)
    again = Recorder(tmp_path / "cut")
    again.resume(1)
    assert without_time(read(tmp_path / "cut")) == without_time(whole[:first])
    for event in whole[first:]:
        again.record(event)
    assert without_time(read(tmp_path / "cut")) == without_time(read(tmp_path / "whole"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cut", "whole"]


def test_resume_keeps_lines_as_they_were_and_drops_the_end(tmp_path):
    recorded(tmp_path / "m", [*run_events(), {"event": "end", "round": 3}])
    lines = (tmp_path / "m").read_text().splitlines()
    Recorder(tmp_path / "m").resume(3)
    assert (tmp_path / "m").read_text().splitlines() == lines[:-1]


def test_a_run_goes_on_after_a_round_that_was_dropped(tmp_path):
    """Its checkpoint has the number of the dropped round, and no event of that number is a round's."""
    whole = [*run_events(rounds=2), {"event": "round_dropped", "round": 3, "reason": "an upload was damaged"}]
    recorded(tmp_path / "m", whole)
    Recorder(tmp_path / "m").resume(3)
    assert without_time(read(tmp_path / "m")) == without_time(whole)


def test_resume_refuses_a_record_that_is_behind_the_checkpoint(tmp_path):
    recorded(tmp_path / "m", run_events(rounds=2))
    with pytest.raises(InputError, match="ends in round 2; the checkpoint is of round 3"):
        Recorder(tmp_path / "m").resume(3)
    with pytest.raises(InputError, match="nothing-here"):
        Recorder(tmp_path / "nothing-here").resume(0)


def test_summary_numbers_by_hand():
    summary = summarise(run_events(), PLAIN, {"device": "cpu"})
    accuracy, loss = (summary["measures"].pop(name) for name in ("accuracy", "loss"))
    assert (accuracy["final"], accuracy["best"], accuracy["best_round"], accuracy["frozen"]) == (0.625, 0.75, 2, 0.25)
    assert loss["best"] == min(score for score in (loss["best"], loss["final"])) and loss["clients"] is None
    assert (summary.pop("measures"), summary.pop("by_class"), summary.pop("metric")) == ({}, None, None)
    assert summary == {
        "strategy": "fedsvd",
        "engine": "cohort",
        "seed": 3,
        "rounds": 3,
        "clients": 4,
        "trainable_parameters": 120,
        "final": {"round": 3, "accuracy": 0.625, "loss": 0.75},
        "best": {"round": 2, "accuracy": 0.75, "loss": 1.0},
        "baseline": {"round": 0, "accuracy": 0.25, "loss": 2.0, "evaluated_on": SERVER},
        "evaluated_on": SERVER,
        "evaluated_rounds": [1, 2, 3],
        "accuracy_by_round": [0.5, 0.75, 0.625],
        "bytes_up": 60,
        "bytes_down": 6000,
        "seconds": 1.5,
        "quarantined": [{"round": 2, "client": "c", "reason": "A has NaN or inf"}],
        "dropped_rounds": [],
        "epsilon_max": None,
        "device": "cpu",
        "baselines": {},
        "test_records": None,
        "test_tokens": None,
        "standard_error": None,
        "last_rounds": {"rounds": [1, 2, 3], "accuracy": 0.625},
        "updates": [],
        "comparison": {
            "baseline": "frozen",
            "accuracy": 0.25,
            "gap": 0.375,
            "constant": None,
            "no_better_than_constant": None,
        },
        "headline": "Accuracy 62.5 % on the server test set after round 3; mean of the last 3 evaluated rounds 62.5 %. "
        "Best without federation: the frozen model, 25.0 %: +37.5 points.",
    }


def test_summary_of_rounds_evaluated_now_and_then_and_of_none():
    events = [START, round_event(1), round_event(2, accuracy=0.5, loss=1.0), round_event(3)]
    summary = summarise(events, PLAIN)
    assert (summary["rounds"], summary["evaluated_rounds"], summary["accuracy_by_round"]) == (3, [2], [0.5])
    assert summary["final"]["round"] == 2 and summary["baseline"] is None
    empty = summarise([START], PLAIN)
    assert empty["final"] is None and empty["best"] is None and empty["rounds"] == 0 and empty["bytes_up"] == 0


def test_best_is_the_earliest_of_equals_skips_nan_and_falls_to_the_lowest_loss():
    def best(*pairs):
        events = [round_event(number, accuracy=accuracy, loss=loss) for number, (accuracy, loss) in enumerate(pairs, 1)]
        return summarise([START, *events], PLAIN)["best"]["round"]

    assert best((0.5, 1.0), (0.75, 9.0), (0.75, 0.1)) == 2
    assert best((None, 1.0), (0.25, 3.0), (None, 0.1)) == 2
    assert best((None, 1.0), (None, 0.5), (None, 0.75)) == 2


def test_a_personalised_run_is_scored_by_its_clients():
    start = {**START, "personalised": True}
    rounds = [round_event(1, accuracy=0.1, loss=9.0, client_accuracy=0.5, client_loss=1.0)]
    zero = {"event": "evaluate", "round": 0, "accuracy": 0.25, "loss": 2.0}
    summary = summarise([start, zero, *rounds], PLAIN)
    assert summary["evaluated_on"] == CLIENTS
    assert summary["final"] == {"round": 1, "accuracy": 0.5, "loss": 1.0}
    assert summary["baseline"] == {"round": 0, "accuracy": 0.25, "loss": 2.0, "evaluated_on": SERVER}
    own = {"event": "evaluate", "round": 0, "accuracy": 0.25, "loss": 2.0, "client_accuracy": 0.3, "client_loss": 1.9}
    assert baseline([start, own, *rounds]) == {"round": 0, "accuracy": 0.3, "loss": 1.9, "evaluated_on": CLIENTS}
    only_clients = [{key: value for key, value in rounds[0].items() if key not in ("accuracy", "loss")}]
    assert evaluations([START, *only_clients])[0] == CLIENTS
    assert evaluations([START, *rounds]) == (SERVER, [{"round": 1, "accuracy": 0.1, "loss": 9.0}])


def test_epsilon_is_the_largest_and_null_without_privacy():
    epsilons = enumerate([0.5, 1.25, None], start=1)
    events = [START, *(round_event(number, epsilon_max=epsilon) for number, epsilon in epsilons)]
    assert summarise(events, {"privacy": {"unit": "sample"}})["epsilon_max"] == 1.25
    assert summarise(events, PLAIN)["epsilon_max"] is None


def test_what_is_no_record_of_a_run_is_refused():
    with pytest.raises(InputError, match="no start event"):
        summarise([round_event(1)], PLAIN)
    with pytest.raises(InputError, match="'bytes_up'"):
        summarise([START, {key: value for key, value in round_event(1).items() if key != "bytes_up"}], PLAIN)
