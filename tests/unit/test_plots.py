"""Plots of synthetic run folders: numbers, names on axes, what is drawn and what is not."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import numpy as np
import pytest

from fedpeft.record import drawing, plots, report, side_by_side
from support.run_folders import drawn, line, make_run


def test_the_accuracy_plot_shows_the_rise_over_the_frozen_model(tmp_path):
    axes = drawn(make_run(tmp_path / "run"))["accuracy"].axes[0]
    x, y = line(axes, "fedit").get_data()
    assert list(x) == [0, 1, 2, 3, 4, 5] and y == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    frozen = line(axes, "frozen model (20.0 %)")
    assert list(frozen.get_ydata()) == [0.2, 0.2] and frozen.get_linestyle() == "--"


def test_reference_lines_of_the_baselines_event(tmp_path):
    run = make_run(tmp_path / "run", end=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "baselines", "frozen_logistic": 0.875, "pixels_or_words_logistic": 0.5}) + "\n")
    axes = drawn(run)["accuracy"].axes[0]
    assert list(line(axes, "logistic regression on frozen features").get_ydata()) == [0.875, 0.875]
    assert list(line(axes, "logistic regression on raw inputs").get_ydata()) == [0.5, 0.5]


def test_loss_and_upload_plots_hold_the_events_numbers(tmp_path):
    figures = drawn(make_run(tmp_path / "run"))
    loss = figures["loss"].axes[0]
    assert line(loss, "clients'").get_ydata() == pytest.approx([2.1, 1.8, 1.5, 1.2, 0.9])
    assert line(loss, "server test set").get_ydata() == pytest.approx([2.2, 1.9, 1.6, 1.3, 1.0]), "from round 1"
    (bought,) = figures["communication"].axes
    x, y = line(bought, "fedit").get_data()
    assert x == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.25]) and y[-1] == pytest.approx(0.7)


def test_the_histogram_shows_each_clients_shares(tmp_path):
    figures = drawn(make_run(tmp_path / "run"))
    (top,), (shares, bar) = figures["clients_sizes"].axes, figures["clients_by_label"].axes
    assert bar.get_ylim() == pytest.approx((0, 2 / 3)), "the scale ends at the data"
    assert [bar.get_height() for bar in top.patches] == [3, 9, 15, 21]
    image = np.asarray(shares.images[0].get_array())  # [labels, clients]
    np.testing.assert_allclose(image[:, 1], [2 / 9, 3 / 9, 4 / 9])
    np.testing.assert_allclose(image.sum(axis=0), 1)
    assert {text.get_text() for text in shares.texts} >= {"0", "8"}


@pytest.mark.parametrize(("clients", "labels"), [(1, 1), (3, 2), (200, 60)])
def test_names_on_an_axis_never_crowd(tmp_path, clients, labels):
    run = make_run(tmp_path / "run", clients=clients, labels=[f"label {index}" for index in range(labels)], rounds=1)
    figure = drawn(run)["clients_by_label"]
    shares = figure.axes[0]
    assert (1 <= len(shares.get_xticks()) <= 40) == (clients <= 40) and 1 <= len(shares.get_yticks()) <= 25
    figure.savefig(io.BytesIO())
    inside = figure.bbox.padded(1)
    boxes = [tick.get_window_extent() for tick in shares.get_xticklabels()]
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
    assert not any(left.overlaps(right) for left, right in pairwise(boxes))


def test_participation_marks_who_was_used_and_who_was_quarantined(tmp_path):
    run = make_run(tmp_path / "run", clients=12, used=3, bad={2: ("client-1", "NaN")})
    axes = drawn(run)["participation"].axes[0]
    grid = np.isfinite(np.ma.filled(axes.images[0].get_array(), np.nan))  # [clients, rounds]
    assert grid.shape == (12, 5)
    assert grid[0].all() and not grid[3:].any() and list(grid[1]) == [True, False, True, True, True]
    x, y = line(axes, "quarantined (1)").get_data()
    assert (list(x), list(y)) == ([2], [1])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"client-{index}" for index in range(12)]  # client-10 after client-9


def test_the_axes_of_participation_fill_the_figure_whatever_is_marked(tmp_path):
    """A mark that is only named in the legend takes no room."""
    run = make_run(tmp_path / "run", clients=12, used=3, bad={2: ("client-1", "NaN")})
    events = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    bottoms = []
    for treated in ({}, {"client-0": "trimmed"}):
        changed = [{**event, "treated": treated} if event["event"] == "round" else event for event in events]
        (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
        figure = drawn(run)["participation"]
        figure.draw_without_rendering()
        bottoms.append(figure.axes[0].get_position().y0)
    assert bottoms[1] < bottoms[0] + 0.1  # at most a row of the legend more


def test_one_evaluation_of_the_clients_has_no_curve(tmp_path):
    figures = drawn(make_run(tmp_path / "run", personalised=True, rounds=1))
    assert "clients_accuracy" not in figures and "clients_at_the_end" in figures


def test_only_what_there_is_to_show_is_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    assert not {"participation", "clients_accuracy"} & set(drawn(run))  # all took part, none was evaluated
    report.write(run)
    stale = run / "plots" / "participation.png"
    stale.write_bytes(b"of an earlier report")
    report.write(run)
    assert not stale.exists()
    (run / "split.json").unlink()
    assert "clients_by_label" not in drawn(run)


def test_data_without_classes_show_their_sizes_only(tmp_path):
    figures = drawn(make_run(tmp_path / "run", labels=()))
    assert "clients_by_label" not in figures and figures["clients_sizes"].axes[0].get_xlabel() == "client"


def test_many_clients_are_drawn_as_what_they_have_in_common(tmp_path):
    figures = drawn(make_run(tmp_path / "run", clients=200, rounds=1))
    outline = figures["clients_sizes"].axes[0].collections[0].get_paths()[0].vertices
    heights = outline[outline[:, 1] > 0, 1]
    assert list(heights) == sorted(heights, reverse=True) and len({*outline[:, 0]}) == 201  # edges of 200 clients
    image = np.asarray(figures["clients_by_label"].axes[0].images[0].get_array())
    largest = image.argmax(axis=0)
    assert list(largest) == sorted(largest), "clients stand by their most frequent label"
    skew = figures["clients_skew"].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert skew.max() == pytest.approx(2 / 3) and "clients_skew" not in drawn(make_run(tmp_path / "few"))


def test_how_often_many_clients_took_part_counts_those_who_never_did(tmp_path):
    bars = drawn(make_run(tmp_path / "run", clients=50, used=20, bad={2: ("client-1", "NaN")}))["clients_rounds"].axes[
        0
    ]
    found = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars.patches}
    assert found == {0: 30, 4: 1, 5: 19}
    assert "clients_rounds" not in drawn(make_run(tmp_path / "few", clients=40))


def test_labels_stand_at_their_lines_and_never_on_each_other(tmp_path):
    run = make_run(tmp_path / "run", gain=0.0)  # the curve and the frozen model's line are one
    with drawing.style():
        figure = drawn(run)["accuracy"]
        figure.savefig(io.BytesIO())
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 2 and boxes[0].y1 <= boxes[1].y0 and not figure.legends
    inside = figure.bbox.padded(1)
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)


def test_spread_over_the_clients_of_a_personalised_run(tmp_path):
    run = make_run(tmp_path / "run", personalised=True, clients=5)
    figures = drawn(run)
    (over,), (final,) = figures["clients_accuracy"].axes, figures["clients_at_the_end"].axes
    assert line(over, "median").get_ydata() == pytest.approx([0.4] * 5)
    assert final.lines[0].get_ydata() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert "clients' held-out records" in drawn(run)["accuracy"].axes[0].get_title()
    x = line(drawn(run)["accuracy"].axes[0], "fedit").get_xdata()
    assert list(x) == [1, 2, 3, 4, 5]  # round 0 was scored on other records: only its dashed line is there
    page = report.write(run)[-1].read_text()
    assert "The frozen model has 20.0 % on the server test set." in page and "points" not in page


def test_images_repeat_exactly_and_follow_the_data(tmp_path):
    import matplotlib

    first, same = (make_run(tmp_path / name / "run", gain=0.1) for name in "ab")
    other = make_run(tmp_path / "c" / "run", gain=0.12)
    before = {path.name: path.read_bytes() for path in report.write(first)[:-1]}
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.facecolor": "red"}):  # as a user's matplotlibrc would
        assert {path.name: path.read_bytes() for path in report.write(same)[:-1]} == before
    changed = {path.name for path in report.write(other)[:-1] if path.read_bytes() != before[path.name]}
    names = ("accuracy", "communication")
    assert changed == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf")}


@pytest.mark.parametrize("many", [9, 20])
def test_compared_runs_stay_apart_however_many(tmp_path, many):
    runs = [make_run(tmp_path / f"_run-{index}", rounds=1, gain=0.01 * index) for index in range(many)]
    figure = plots.compared(side_by_side.load_all(runs))
    curves = [item for item in figure.axes[0].lines if "run-" in item.get_label()]
    looks = [(item.get_color(), item.get_linestyle()) for item in curves]
    assert len(looks) == many == len(set(looks))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == many + 1 and any("_run-8 (28.0 %)" in text for text in legend)
