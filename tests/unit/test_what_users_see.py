"""What a reader takes away of sequences, far updates, unlike runs and privacy: in summary.json, page and terminal."""

from __future__ import annotations

import html
from typing import Any

import pytest

from fedpeft.cli import console
from fedpeft.record import plots, run_folder, side_by_side
from support.run_folders import (
    SITES,
    SPLIT,
    Event,
    a_round,
    first_line,
    page_of,
    plain,
    start,
    summary_of,
    terminal,
    written,
)

pytestmark = pytest.mark.usefixtures("unpainted")

# A sequence of tasks --------------------------------------------------------------------------------------------------


def sequence(tasks: int = 3) -> list[Event]:
    """Two rounds a task. The trained classifier has 98.5 % on the first two classes and falls; the head holds."""
    right = [[78, 0, 0], [76, 74, 0], [72, 73, 70]]
    trained = [0.9, 0.985, 0.6, 0.7, 0.5, 0.528]
    events = [
        start(SITES),
        {"event": "evaluate", "round": 0, "accuracy": 0.51, "loss": 1.0},
        {
            "event": "baselines",
            "largest_class": 0.34,
            "largest_class_name": "3",
            "frozen_head": 0.8125,
            "frozen_head_forgetting": 0.05,
            "frozen_head_by_task": [0.95, 0.9, 0.8125],
        },
    ]
    for task in range(tasks):
        for number in (2 * task + 1, 2 * task + 2):
            events.append(a_round(number, SITES, accuracy=trained[number - 1], loss=1.0, classes=2 * task + 2))
        events.append(
            {
                "event": "task",
                "round": 2 * task + 2,
                "task": task,
                "classes": [2 * task, 2 * task + 1],
                "right": right[task],
                "count": [80, 80, 80],
            }
        )
    return events


CONTINUAL = {"continual.body": "sequential", "continual.head": "ranpac", "continual.tasks": 3, "run.rounds": 6}


def test_a_sequence_without_a_task_is_complete_and_compared_with_nothing_that_knows_its_classes(tmp_path, monkeypatch):
    events = sequence()
    events[2] |= {"frozen_logistic": 0.97, "pixels_or_words_logistic": 0.9}
    run = written(tmp_path / "run", events, {**CONTINUAL, "continual.tasks": 4, "continual.leave_out": [1]})
    summary, head = summary_of(run), first_line(page_of(run))
    assert (summary["sequence"]["tasks"], summary["sequence"]["tasks_done"]) == (3, 3)
    assert "on the 6 classes after task 3 of 3" in head
    assert summary["comparison"]["baseline"] == "frozen_head" and summary["comparison"]["constant"] is None
    assert "task 3 of 3" in terminal(run, monkeypatch)


def test_a_sequence_leads_with_the_head_that_answers_over_all_classes(tmp_path, monkeypatch):
    run = written(tmp_path / "run", sequence(), CONTINUAL)
    summary, page = summary_of(run), page_of(run)
    right = 72 + 73 + 70
    assert summary["final"]["accuracy"] == right / 240 and summary["best"] is None
    assert summary["accuracy_by_round"] is None  # they are of unlike classes
    assert summary["test_records"] == 240 and summary["sequence"]["classes"] == 6
    assert summary["sequence"]["forgetting"] == pytest.approx(((78 - 72) / 80 + (74 - 73) / 80) / 2)
    assert summary["sequence"]["trained_classifier"]["accuracy"] == 0.528
    assert summary["sequence"]["trained_classifier"]["classes_by_round"] == [2, 2, 4, 4, 6, 6]
    assert summary["comparison"]["baseline"] == "frozen_head"
    assert summary["comparison"]["gap"] == pytest.approx(right / 240 - 0.8125)
    head = first_line(page)
    assert head.startswith("Accuracy 89.6 % ± 2.0 (n = 240") and "on all 6 classes after task 3 of 3" in head
    assert "by the head ranpac, forgetting 4.4 points" in head
    assert "The frozen model with the same head has 81.2 %, forgetting 5.0 points: +8.3 points." in page
    top, _, rounds = page.partition("<h2>Rounds</h2>")
    assert "98.5 %" not in top and "best" not in head and "52.8" not in head
    assert "98.5 %" in rounds and "<th>accuracy of the classifier as trained, classes so far</th>" in rounds
    shown = terminal(run, monkeypatch)
    rows = [line for line in shown.splitlines() if "│" in line]
    assert "89.6%" in next(line for line in rows if "federated, final: head ranpac" in line)
    assert "81.2%" in next(line for line in rows if "frozen model, same head" in line)
    assert "52.8%" in next(line for line in rows if "classifier as trained" in line)
    assert "98.5%" not in shown


def test_the_plot_of_a_sequence_joins_no_two_tasks_and_marks_where_they_end(tmp_path):
    figure = plots.accuracy(run_folder.load(written(tmp_path / "run", sequence(), CONTINUAL), "run"))
    lines = figure.axes[0].lines
    answers = next(line for line in lines if str(line.get_label()).startswith("head ranpac"))
    assert list(answers.get_xdata()) == [2, 4, 6]
    assert answers.get_ydata() == pytest.approx([78 / 80, 150 / 160, 215 / 240])
    runs = [list(line.get_xdata()) for line in lines if line.get_color() == "#56b4e9"]
    assert runs == [[1, 2], [3, 4], [5, 6]]
    assert [
        line.get_xdata()[0] for line in lines if line.get_linestyle() == ":" and len(set(line.get_xdata())) == 1
    ] == [2.5, 4.5, 6.5]


def test_a_sequence_in_its_midst_or_of_an_older_record_says_what_it_knows(tmp_path):
    half = summary_of(written(tmp_path / "half", sequence(2), CONTINUAL))
    assert half["headline"].startswith("Accuracy 93.8 %") and "on the 4 classes after task 2 of 3" in half["headline"]
    assert half["comparison"] is None  # the others know all classes
    old = [event for event in sequence() if event["event"] not in ("baselines", "evaluate")]
    found = written(tmp_path / "old", old, CONTINUAL)
    assert summary_of(found)["baseline"] is None and "89.6 %" in first_line(page_of(found))
    none = summary_of(written(tmp_path / "none", sequence(1)[:-1], CONTINUAL))
    assert none["final"] is None and none["headline"].startswith("No task has ended yet.")


# Updates --------------------------------------------------------------------------------------------------------------


def hostile(treated: bool) -> list[Event]:
    events = plain([])
    for number in (1, 2, 3):
        facts: Event = {
            "update_norms": {name: 1.0 + index for index, name in enumerate(SITES)},
            "update_distances": dict.fromkeys(SITES, 0.5),
            "far_updates": {},
        }
        if number != 2:
            facts["update_norms"][SITES[2]] = 1500.0 * number
            facts["far_updates"] = {SITES[2]: 1000.0 * number}
        if treated:
            facts["treated"] = {SITES[2]: "trimmed in 99 % of its values"}
        events.append(a_round(number, SITES, accuracy=0.5, loss=1.0, test_records=400, **facts))
    return events


@pytest.mark.parametrize("treated", [True, False])
def test_a_client_far_beyond_the_others_is_named_everywhere(treated, tmp_path, monkeypatch):
    run = written(tmp_path / "run", hostile(treated), split=SPLIT)
    (row,) = summary_of(run)["updates"]
    assert (row["client"], row["far_rounds"], row["times_median"]) == (SITES[2], [1, 3], 3000.0)
    assert row["treated_rounds"] == ([1, 2, 3] if treated else [])
    page, shown = page_of(run), terminal(run, monkeypatch)
    became = "trimmed in 99 % of its values by the robust rule" if treated else "counted like any other"
    for text in (page, shown):
        assert (
            f"<b>south</b>: update far beyond the others' in 2 rounds, last 3 (up to 3,000 times their median), "
            f"{became}"
        ) in text
        assert "over 10 times the median norm" in text  # the rule
    state = "trimmed in 99 % of its values" if treated else "used"
    assert f"<td>3</td><td><b>south</b></td><td>{state}</td><td>4,500</td><td>2,250</td><td>0.5</td>" in page
    assert "<b>south" not in (run / "report.html").read_text()  # escaped there
    marks = plots.PLOTS["participation"](run_folder.load(run, "run")).axes[0].lines
    assert any(line.get_label() == "far beyond the others' (2)" for line in marks)


def test_a_run_in_which_nobody_stands_out_warns_of_nobody(tmp_path, monkeypatch):
    run = written(tmp_path / "run", plain([0.5, 0.6]))
    assert summary_of(run)["updates"] == []
    assert "far beyond" not in page_of(run) + terminal(run, monkeypatch)


# Side by side ---------------------------------------------------------------------------------------------------------


def test_unlike_runs_are_said_to_be_unlike_and_compared_where_they_can_be(tmp_path, monkeypatch):
    one = written(tmp_path / "one", plain([0.5, 0.6, 0.9], {"largest_class": 0.3}), split=SPLIT)
    other = {
        **SPLIT,
        "fingerprint": "a" * 64,
        "histogram": {"labels": ["no", "yes", "maybe"], "counts": [[1, 2, 3]] * 3},
    }
    texts = {"data.source": "docstrings", "model.task": "sequence-classification", "model.name": "tiny-bert"}
    two = written(tmp_path / "two", plain([0.4, 0.7], {"largest_class": 0.5}, records=100), texts, split=other)
    said = side_by_side.said([one, two])
    assert said["ranking"].startswith("At round 2, the last that all evaluated: two 70.0 %, one 60.0 %")
    page = html.unescape(side_by_side.compare([one, two], tmp_path / "c.html").read_text())
    for line in (
        "rounds: one 3; two 2",
        "data source: one digits; two docstrings",
        "test records: one 400; two 100",
        "training records (fingerprint): one ffffffffffff; two aaaaaaaaaaaa",
        "classes: one 2 (no, yes); two 3 (no, yes, maybe)",
    ):
        assert line in said["differences"] and f"<li>{line}</li>" in page
    assert "<td>always giving one answer</td><td>30.0 %</td><td>50.0 %</td>" in page
    rows = side_by_side.table([one, two])
    assert [row["common_accuracy"] for row in rows] == [0.6, 0.7]
    with console.out.capture() as captured:
        monkeypatch.setattr(console.out, "width", 200)
        console.comparison({"report": "c.html", **said, "runs": rows})
    assert "differ in rounds: one 3; two 2" in captured.get()


def test_a_sequence_beside_another_run_has_no_common_round(tmp_path):
    one = written(tmp_path / "one", plain([0.5, 0.6, 0.9]))
    tasks = written(tmp_path / "tasks", sequence(), CONTINUAL)
    said = side_by_side.said([one, tasks])
    assert said["ranking"].startswith("At the end of each: one 90.0 %, tasks 89.6 %")
    assert "tasks: one no sequence; tasks 3" in said["differences"]


def test_like_runs_have_no_box(tmp_path):
    runs = [written(tmp_path / name, plain([0.5]), {"client.lr": rate}) for name, rate in (("a", 0.1), ("b", 0.2))]
    assert side_by_side.said(runs)["differences"] == []
    page = side_by_side.compare(runs, tmp_path / "c.html").read_text()
    assert "not alike" not in page and "<td>client.lr</td><td>0.1</td><td>0.2</td>" in page


# Names, and privacy ---------------------------------------------------------------------------------------------------


def test_sites_keep_their_names_in_tables_plots_and_quarantine(tmp_path, monkeypatch):
    events = plain([0.5])
    events.append({"event": "quarantine", "round": 2, "client": SITES[1], "reason": "A has NaN"})
    events.append(a_round(2, [SITES[0], SITES[2]], quarantined={SITES[1]: "A has NaN"}, accuracy=0.5, loss=1.0))
    run = written(tmp_path / "run", events, split=SPLIT)
    page = page_of(run)
    assert f"<td>2</td><td>{SITES[1]}</td><td>A has NaN</td>" in page and "client-0" not in page
    assert f"quarantined: {SITES[1]} in round 2" in terminal(run, monkeypatch)
    loaded = run_folder.load(run, "run")
    for figure, axis in ((plots.clients_by_label(loaded), "x"), (plots.PLOTS["participation"](loaded), "y")):
        axes = figure.axes[-2 if axis == "x" else 0]
        labels = axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()
        assert {label.get_text() for label in labels} == set(SITES)


PRIVATE = {
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "strategy.weighting": "uniform",
    "client.local_steps": 2,
    "client.local_epochs": None,
}


def private(**more: Any) -> list[Event]:
    return [*plain([])[:2], a_round(1, SITES, accuracy=0.5, loss=1.0, test_records=400, epsilon_max=2.5, **more)]


@pytest.mark.parametrize(("randomness", "said"), [("seeded", True), ("os", False)])
def test_a_private_run_says_first_what_it_spent_and_whether_it_is_private(randomness, said, tmp_path, monkeypatch):
    run = written(tmp_path / "run", private(), {**PRIVATE, "privacy.randomness": randomness}, split=SPLIT)
    wanted = f"Epsilon 2.5 at delta 1e-05 for one record{' (seeded: not private)' if said else ''}."
    assert first_line(page_of(run)) == wanted
    for text in (summary_of(run)["headline"], terminal(run, monkeypatch)):
        assert text.startswith(wanted)


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({**PRIVATE}, False),
        ({**PRIVATE, "privacy.release_metrics": True}, True),
        ({"privacy.unit": "client", "privacy.noise_multiplier": 1.0, "strategy.weighting": "uniform"}, False),
        ({}, True),
    ],
)
def test_label_counts_of_a_private_run_are_shown_only_where_they_are_released(settings, drawn, tmp_path):
    run = written(tmp_path / "run", private(), settings, split=SPLIT)
    page = page_of(run)
    assert (run / "plots" / "clients_by_label.png").exists() == drawn == ('alt="clients by label"' in page)
    assert ("numbers of records and of labels are left out" in page) == (not drawn)
