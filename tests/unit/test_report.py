"""Plots and pages of synthetic run folders: numbers, what is drawn and what is not, escaping, broken folders."""

from __future__ import annotations

import base64
import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from fedpeft.errors import InputError
from fedpeft.record import metrics, plots, report, run_folder, side_by_side

CONFIG = "strategy:\n  name: {strategy}\ndata:\n  clients: {clients}\nprivacy:\n  unit: none\nrun:\n  seed: {seed}\n"


def make_run(
    path,
    *,
    strategy="fedit",
    clients=4,
    rounds=5,
    seed=0,
    gain=0.1,
    names=None,
    labels=("0", "1", "2"),
    used=None,
    bad=None,
    personalised=False,
    end=True,
    extra=None,
    epsilon=None,
):
    """A run folder whose accuracy is 0.2 + gain * round; `used` clients a round, `bad` {round: (client, reason)}."""
    path.mkdir(parents=True)
    names = names or [f"client-{index}" for index in range(clients)]
    (path / "resolved.yaml").write_text(CONFIG.format(strategy=strategy, clients=len(names), seed=seed))
    recorder = metrics.Recorder(path / "metrics.jsonl")
    recorder.record(
        {
            "event": "start",
            "strategy": strategy,
            "engine": "cohort",
            "seed": seed,
            "clients": len(names),
            "rounds": rounds,
            "trainable_parameters": 7818,
            "personalised": personalised,
        }
    )
    recorder.record({"event": "evaluate", "round": 0, "accuracy": 0.2, "loss": 2.5})
    for number in range(1, rounds + 1):
        asked, quarantined = names[:used], dict([(bad or {}).get(number)] if number in (bad or {}) else [])
        for client, reason in quarantined.items():
            recorder.record({"event": "quarantine", "round": number, "client": client, "reason": reason})
        scores = {"accuracy": 0.2 + gain * number, "loss": 2.5 - 0.3 * number}
        if personalised:
            each = {
                name: {"accuracy": 0.2 + 0.1 * index, "loss": 1.0, "num-examples": 5.0}
                for index, name in enumerate(names)
            }
            recorder.record({"event": "clients_evaluated", "round": number, "clients": each})
            scores = {f"client_{key}": value for key, value in scores.items()}
        good = [name for name in asked if name not in quarantined]
        recorder.record(
            {
                "event": "round",
                "round": number,
                "clients": good,
                "quarantined": quarantined,
                "bytes_down": 400_000,
                "bytes_up": 250_000,
                "train_loss": 2.4 - 0.3 * number,
                **scores,
                "seconds": 0.5,
                **({"epsilon_max": epsilon * number} if epsilon else {}),
            }
        )
    if end:
        recorder.record({"event": "end", "round": rounds})
        summary = metrics.summarise(metrics.read(path / "metrics.jsonl"), {}, extra)
        (path / "summary.json").write_text(json.dumps(summary))
    counts = [[2 * index + column for column in range(len(labels))] for index in range(len(names))]
    split = {
        "clients": {name: list(range(sum(row))) for name, row in zip(names, counts, strict=True)},
        "histogram": {"labels": list(labels), "counts": counts},
    }
    (path / "split.json").write_text(json.dumps(split))
    return path


def pixels(path):
    """The image as [height, width] grey levels."""
    return np.asarray(Image.open(path).convert("L"))


def drawn(run):
    """Name -> figure of all that a run has to show."""
    loaded = run_folder.load(run, "run")
    return {name: figure for name, draw in plots.PLOTS.items() if (figure := draw(loaded)) is not None}


def cells(page):
    """Rows of all tables of a page."""
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def line(axes, start):
    return next(item for item in axes.lines if item.get_label().startswith(start))


def test_a_private_run_shows_accuracy_against_epsilon_and_what_each_client_spent(tmp_path):
    clients = {f"client-{index}": {"epsilon": 0.5 + index, "delta": 1e-5, "steps": 10} for index in range(4)}
    section = {"unit": "sample", "delta": 1e-5, "claim": "each <record>", "outside": ["who took part"]}
    section["clients"] = clients
    run = make_run(tmp_path / "run", epsilon=0.7, extra={"privacy": section})
    bought, each = drawn(run)["privacy"].axes
    curve = line(bought, "fedit")
    assert list(curve.get_xdata()) == pytest.approx([0.7 * number for number in range(1, 6)])
    assert list(curve.get_ydata()) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert [bar.get_height() for bar in each.patches] == [0.5, 1.5, 2.5, 3.5]
    report.write(run)
    page = (run / "report.html").read_text()
    assert "each &lt;record&gt;" in page and "<li>who took part</li>" in page
    assert ["client-3", "3.5", "1e-05", "10"] in cells(page)


def test_files_written_are_real_images_and_the_page_holds_the_same_ones(tmp_path):
    run = make_run(tmp_path / "run", used=3, bad={2: ("client-0", "NaN")}, personalised=True)
    files = report.write(run)
    assert [path.relative_to(run).as_posix() for path in files] == [
        *(f"plots/{name}.png" for name in plots.PLOTS if name not in ("privacy", "test_time")),
        "report.html",
    ]
    for path in files[:-1]:
        image = pixels(path)
        assert image.shape[1] > 800 and image.shape[0] > 200
        assert len(np.unique(image)) > 50 and image.min() < 60 < 250 < image.max()
    inlined = re.findall(r'src="data:image/png;base64,([^"]+)"', files[-1].read_text())
    assert [base64.b64decode(text) for text in inlined] == [path.read_bytes() for path in files[:-1]]


def test_the_page_has_the_numbers_and_loads_nothing_from_elsewhere(tmp_path):
    run = make_run(tmp_path / "run", bad={3: ("client-2", "norm 9.1 is over 2")}, extra={"device": "cpu-of-test"})
    page = report.write(run)[-1].read_text()
    assert ("Accuracy 70.0 % on the server test set after round 5; mean of the last 5 evaluated rounds 50.0 %.") in page
    assert "Best without federation: the frozen model, 20.0 %: +50.0 points." in page
    rows = cells(page)
    for row in (
        ["strategy", "fedit"],
        ["trainable parameters", "7,818"],
        ["bytes up", "1,250,000 (1.25 MB)"],
        ["bytes down", "2,000,000 (2 MB)"],
        ["seconds", "2.5"],
        ["device", "cpu-of-test"],
        ["quarantined updates", "1"],
        ["3", "client-2", "norm 9.1 is over 2"],
        ["4", "4", "1.2", "1.3", "60.0 %", "0.25", "0.4", "0.5"],
    ):
        assert row in rows
    assert "name: fedit" in page and "has not ended" not in page
    links = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]{4})', page)
    assert links and set(links) == {"data"}
    assert not re.search(r"<script|<link|<iframe|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]+", "", page))


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


def test_loss_and_traffic_plots_hold_the_events_numbers(tmp_path):
    figures = drawn(make_run(tmp_path / "run"))
    loss = figures["loss"].axes[0]
    assert line(loss, "clients'").get_ydata() == pytest.approx([2.1, 1.8, 1.5, 1.2, 0.9])
    assert line(loss, "server test set").get_ydata() == pytest.approx([2.5, 2.2, 1.9, 1.6, 1.3, 1.0])
    traffic, bought = figures["communication"].axes
    assert line(traffic, "clients to server").get_ydata() == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.25])
    assert line(traffic, "server to clients").get_ydata() == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2.0])
    x, y = line(bought, "fedit").get_data()
    assert x == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.25]) and y[-1] == pytest.approx(0.7)


def test_the_histogram_shows_each_clients_shares(tmp_path):
    figure = drawn(make_run(tmp_path / "run"))["clients_by_label"]
    top, shares = figure.axes[:2]
    assert [bar.get_height() for bar in top.patches] == [3, 9, 15, 21]
    image = np.asarray(shares.images[0].get_array())  # [labels, clients]
    np.testing.assert_allclose(image[:, 1], [2 / 9, 3 / 9, 4 / 9])
    np.testing.assert_allclose(image.sum(axis=0), 1)
    assert {text.get_text() for text in shares.texts} >= {"0", "8"}


@pytest.mark.parametrize(("clients", "labels"), [(1, 1), (3, 2), (200, 60)])
def test_names_on_an_axis_never_crowd(tmp_path, clients, labels):
    run = make_run(tmp_path / "run", clients=clients, labels=[f"label {index}" for index in range(labels)], rounds=1)
    figure = drawn(run)["clients_by_label"]
    shares = figure.axes[1]
    assert 1 <= len(shares.get_xticks()) <= 40 and 1 <= len(shares.get_yticks()) <= 25
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


OWNERS = {"client-0": "St. Mary", "client-1": "<b>N & Sons</b>", "client-2": "South", "client-3": "South"}


def test_a_client_is_named_by_its_owner_where_the_split_says_so(tmp_path):
    """In tables, plots and sentences; an owner of two clients is named with each, a client without one as it is."""
    clients = {f"client-{index}": {"epsilon": 0.5 + index} for index in range(5)}
    section = {"unit": "none", "delta": 1e-5, "claim": "c", "outside": [], "clients": clients}
    run = make_run(tmp_path / "run", clients=5, bad={2: ("client-1", "NaN")}, epsilon=0.7, extra={"privacy": section})
    path = run / "split.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "owners": OWNERS}))
    names = ["St. Mary", "<b>N & Sons</b>", "client-2 (South)", "client-3 (South)", "client-4"]
    figures = drawn(run)
    for name, axis in (
        ("participation", figures["participation"].axes[0].yaxis),
        ("clients_by_label", figures["clients_by_label"].axes[1].xaxis),
    ):
        assert {label.get_text() for label in axis.get_ticklabels()} == set(names), name
    heights = [bar.get_height() for bar in figures["clients_by_label"].axes[0].patches]
    assert heights == [3, 9, 15, 21, 27], "each beside its own records"
    report.write(run)
    rows = cells((run / "report.html").read_text())
    assert ["2", "&lt;b&gt;N &amp; Sons&lt;/b&gt;", "NaN"] in rows
    assert {"client-2 (South)": "2.5", "client-4": "4.5", "St. Mary": "0.5"}.items() <= {
        row[0]: row[1] for row in rows if len(row) == 2
    }.items()
    text = (run / "report.html").read_text()
    assert "client-0" not in text and "client-1" not in text and "<b>N" not in text
    assert metrics.read(run / "metrics.jsonl")[2]["clients"][0] == "client-0", "the record keeps the client's name"


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
    figure = drawn(make_run(tmp_path / "run", labels=()))["clients_by_label"]
    assert len(figure.axes) == 1 and figure.axes[0].get_xlabel() == "client"


def test_spread_over_the_clients_of_a_personalised_run(tmp_path):
    run = make_run(tmp_path / "run", personalised=True, clients=5)
    over, final = drawn(run)["clients_accuracy"].axes
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
    assert changed == {"accuracy.png", "communication.png"}


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    evil, dollars = '<script>alert("x")</script>', "$\\bad{$ & 'co'"
    run = make_run(
        tmp_path / "a<b>",
        strategy="<i>fed</i>",
        names=[evil, dollars, "ok"],
        labels=[evil, "$", "_"],
        bad={1: (evil, "<img src=x onerror=alert(1)>")},
        extra={evil: evil},
    )
    (run / "resolved.yaml").write_text("strategy:\n  name: '<b>bold</b>'\n")
    other = make_run(tmp_path / "_plain")
    for page in (report.write(run)[-1], side_by_side.compare([run, other], tmp_path / "c.html")):
        text = page.read_text()
        assert not re.search(r"<script|<i>|<b>|<img src=x", text)
        assert "a&lt;b&gt;" in text
    assert "&lt;script&gt;" in report.write(run)[-1].read_text()


def test_an_interrupted_run_is_reported_as_far_as_it_came(tmp_path):
    run = make_run(tmp_path / "run", rounds=2, end=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    page = report.write(run)[-1].read_text()
    assert "has not ended; this is its state after round 2" in page and "Accuracy 40.0 %" in page


def test_a_run_without_a_round_or_without_accuracy_still_has_a_page(tmp_path):
    empty = make_run(tmp_path / "empty", rounds=0, end=False)
    assert "Nothing has been evaluated yet." in report.write(empty)[-1].read_text()
    run = make_run(tmp_path / "loss-only", rounds=2, end=False)
    events = metrics.read(run / "metrics.jsonl")
    for event in events:
        event.pop("accuracy", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "Loss 1.9 on the server test set after round 2." in report.write(run)[-1].read_text()
    assert not (run / "plots" / "accuracy.png").exists()
    assert side_by_side.compare([empty, run], tmp_path / "c.html").exists()


def test_compare_puts_runs_side_by_side(tmp_path):
    slow = make_run(tmp_path / "one" / "run", rounds=5)
    fast = make_run(tmp_path / "two" / "run", strategy="fedsvd", rounds=3, gain=0.2, seed=7)
    rows = side_by_side.table([slow, fast])
    assert [row["run"] for row in rows] == ["one/run", "two/run"]
    assert rows[1] == {
        "run": "two/run",
        "strategy": "fedsvd",
        "rounds": 3,
        "test_records": None,
        "frozen_accuracy": 0.2,
        "best_baseline_accuracy": 0.2,
        "largest_class_accuracy": None,
        "standard_error": None,
        "common_accuracy": pytest.approx(0.8),
        "last_rounds_accuracy": pytest.approx(0.6),
        "final_accuracy": pytest.approx(0.8),
        "best_accuracy": pytest.approx(0.8),
        "mb_up": 0.75,
        "mb_down": pytest.approx(1.2),
        "seconds": 1.5,
        "epsilon_max": None,
        "evaluated_on": metrics.SERVER,
    }
    page = side_by_side.compare([slow, fast], tmp_path / "new" / "c.html")
    found = cells(page.read_text())
    where = metrics.SERVER
    assert [
        "one/run",
        "fedit",
        "5",
        "–",
        "20.0 %",
        "20.0 %",
        "–",
        "50.0 %",
        "70.0 %",
        "–",
        "50.0 %",
        "70.0 %",
        "1.25",
        "2",
        "2.5",
        "–",
        where,
    ] in found
    assert [
        "two/run",
        "fedsvd",
        "3",
        "–",
        "20.0 %",
        "20.0 %",
        "–",
        "80.0 %",
        "80.0 %",
        "–",
        "60.0 %",
        "80.0 %",
        "0.75",
        "1.2",
        "1.5",
        "–",
        where,
    ] in found
    assert "At round 3, the last that all evaluated: two/run 80.0 %, one/run 50.0 %." in page.read_text()
    assert "<li>rounds: one/run 5; two/run 3</li>" in page.read_text()
    assert ["strategy.name", "&quot;fedit&quot;", "&quot;fedsvd&quot;"] in found and ["run.seed", "0", "7"] in found
    assert not any(row[0] == "privacy.unit" for row in found)  # the same in both
    assert page.read_text().count("<img") == 1 and "evaluated on: " not in page.read_text()
    axes = plots.compared(side_by_side.load_all([slow, fast])).axes[0]
    assert line(axes, "two/run").get_ydata() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert sum(item.get_label().startswith("frozen model") for item in axes.lines) == 1


def test_compare_says_when_accuracies_are_not_comparable_or_a_run_has_not_ended(tmp_path):
    runs = [make_run(tmp_path / "global"), make_run(tmp_path / "personal", personalised=True, end=False)]
    page = side_by_side.compare(runs, tmp_path / "c.html").read_text()
    assert f"evaluated on: global {metrics.SERVER}; personal clients&#x27; held-out records" in page
    assert "personal has not ended." in page and "global has not ended" not in page


@pytest.mark.parametrize("many", [9, 20])
def test_compared_runs_stay_apart_however_many(tmp_path, many):
    runs = [make_run(tmp_path / f"_run-{index}", rounds=1, gain=0.01 * index) for index in range(many)]
    figure = plots.compared(side_by_side.load_all(runs))
    curves = [item for item in figure.axes[0].lines if "run-" in item.get_label()]
    looks = [(item.get_color(), item.get_linestyle()) for item in curves]
    assert len(looks) == many == len(set(looks))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == many + 1 and any("_run-8 (28.0 %)" in text for text in legend)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("resolved.yaml", None, r"resolved\.yaml: cannot be read"),
        ("resolved.yaml", "a: [", r"resolved\.yaml: not readable as YAML"),
        ("resolved.yaml", "- 1", r"resolved\.yaml: expected a mapping"),
        ("metrics.jsonl", None, r"metrics\.jsonl: cannot be read"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl: line 1 is not an event"),
        ("metrics.jsonl", "", r"metrics\.jsonl: .*no start event"),
        ("summary.json", None, r"summary\.json: cannot be read"),
        ("summary.json", "[]", r"summary\.json: expected a JSON object"),
        ("split.json", "{", r"split\.json: not readable as JSON"),
        ("split.json", "{}", r"split\.json: `clients`"),
        ("split.json", '{"clients": {"a": [1]}, "owners": {"a": 7}}', r"split\.json: `owners` must map"),
        (
            "split.json",
            '{"clients": {"a": [1]}, "histogram": {"labels": ["0"], "counts": [[1, 2]]}}',
            r"json: histogram",
        ),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path, file, content, message):
    run = make_run(tmp_path / "run")
    (run / file).unlink() if content is None else (run / file).write_text(content)
    for use in (report.write, lambda path: side_by_side.table([path])):
        with pytest.raises(InputError, match=message):
            use(run)


def test_runs_that_cannot_be_compared(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="nowhere: there is no such run folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no run folder given"):
        side_by_side.table([])
    with pytest.raises(InputError, match="more than once"):
        side_by_side.compare([run, tmp_path / "run" / ".." / "run"], tmp_path / "c.html")
