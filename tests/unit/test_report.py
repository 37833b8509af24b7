"""Pages of synthetic run folders: numbers, escaping, runs side by side, broken folders."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from fedpeft.errors import InputError
from fedpeft.record import metrics, plots, report, side_by_side
from support.run_folders import a_round, drawn, line, make_run, start


def pixels(path):
    """The image as [height, width] grey levels."""
    return np.asarray(Image.open(path).convert("L"))


def cells(page):
    """Rows of all tables of a page."""
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_a_private_run_shows_accuracy_against_epsilon_and_what_each_client_spent(tmp_path, unpainted):
    clients = {f"client-{index}": {"epsilon": 0.5 + index, "delta": 1e-5, "steps": 10} for index in range(4)}
    section = {"unit": "sample", "delta": 1e-5, "claim": "each <record>", "outside": ["who took part"]}
    section["clients"] = clients
    run = make_run(tmp_path / "run", epsilon=0.7, extra={"privacy": section})
    figures = drawn(run)
    (bought,), (each,) = figures["privacy"].axes, figures["epsilon_by_client"].axes
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
        *(
            f"plots/{name}.{suffix}"
            for name in plots.PLOTS
            if name not in ("privacy", "epsilon_by_client", "test_time", "clients_rounds", "clients_skew")
            for suffix in ("png", "svg", "pdf")
        ),
        "report.html",
    ]
    for path in files[:-1:3]:
        image = pixels(path)
        assert image.shape[1] > 600 and image.shape[0] > 200
        assert len(np.unique(image)) > 50 and image.min() < 60 < 250 < image.max()
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    inlined = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', files[-1].read_text())
    for path, text in zip(files[1:-1:3], inlined, strict=True):
        on_page, alone = base64.b64decode(text).decode(), path.read_text()
        assert "#262626" in alone and "currentColor" not in alone, "a paper has no dark scheme"
        assert on_page.count("currentColor") == alone.count("#262626") and "prefers-color-scheme" in on_page


def test_the_page_has_the_numbers_and_loads_nothing_from_elsewhere(tmp_path, unpainted):
    run = make_run(tmp_path / "run", bad={3: ("client-2", "norm 9.1 is over 2")}, extra={"device": "cpu-of-test"})
    page = report.write(run)[-1].read_text()
    assert ("Accuracy 70.0 % on the server test set after round 5; mean of the last 5 evaluated rounds 50.0 %.") in page
    assert "Best without federation: the frozen model, 20.0 %: +50.0 points." in page
    rows = cells(page)
    for row in (
        ["strategy", "fedit"],
        ["trained parameters of a client", "7,818"],
        ["clients to server", "1.2 MB"],
        ["server to clients", "2.0 MB"],
        ["time of the rounds", "2.5 s"],
        ["after the last round", "accuracy 70.0 %, loss 1 (round 5)"],
        ["device", "cpu-of-test"],
        ["quarantined updates", "1"],
        ["client-2", "1", "round 3", "norm 9.1 is over 2"],
        ["3", "client-2", "norm 9.1 is over 2"],
        ["4", "4", "1.2", "1.3", "60.0 %", "250 kB", "400 kB", "0.5 s"],
    ):
        assert row in rows
    assert any(row[0] == "from start to end" and row[1].endswith(" ms") for row in rows if row)
    assert "1 of 4 clients quarantined in round 3: client-2." in page
    assert "name: fedit" in page and "has not ended" not in page
    assert ["strategy.name", "&quot;fedit&quot;"] not in rows, "the default"
    assert ["data.clients", "4"] in rows and "<h1>FedIT, 4 clients: run</h1>" in page
    links = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]{4})', page)
    assert links and set(links) == {"data"}
    assert not re.search(r"<script|<link|<iframe|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]+", "", page))


OWNERS = {"client-0": "St. Mary", "client-1": "<b>N & Sons</b>", "client-2": "South", "client-3": "South"}


def test_a_client_is_named_by_its_owner_where_the_split_says_so(tmp_path, unpainted):
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
        ("clients_by_label", figures["clients_by_label"].axes[0].xaxis),
    ):
        assert {label.get_text() for label in axis.get_ticklabels()} == set(names), name
    heights = [bar.get_height() for bar in figures["clients_sizes"].axes[0].patches]
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


def test_an_interrupted_run_is_reported_as_far_as_it_came(tmp_path, unpainted):
    run = make_run(tmp_path / "run", rounds=2, end=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    page = report.write(run)[-1].read_text()
    assert "has not ended; this is its state after round 2" in page and "Accuracy 40.0 %" in page


def test_a_run_whose_results_are_not_written_yet_has_not_ended(tmp_path, unpainted):
    """Its end is recorded first: adapters and answers take minutes, and a full disk has no room for them."""
    run = make_run(tmp_path / "run", rounds=2)
    (run / "summary.json").unlink()
    assert "has not ended; this is its state after round 2" in report.write(run)[-1].read_text()
    assert [row["rounds"] for row in side_by_side.table([run])] == [2]


def test_a_report_removes_its_own_old_figures_and_no_file_of_the_user(tmp_path):
    run = make_run(tmp_path / "run", rounds=2)
    (run / "plots").mkdir()
    for name in ("privacy.svg", "accuracy.csv", "loss.py", "privacy"):
        (run / "plots" / name).write_text("mine")
    report.write(run)
    assert not (run / "plots" / "privacy.svg").exists() and (run / "plots" / "accuracy.svg").exists()
    assert all((run / "plots" / name).read_text() == "mine" for name in ("accuracy.csv", "loss.py", "privacy"))


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


FAST_IN_TABLE = {
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
SLOW_ON_PAGE = [
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
    "1.2 MB",
    "2.0 MB",
    "2.5 s",
    "–",
    metrics.SERVER,
]
FAST_ON_PAGE = [
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
    "750 kB",
    "1.2 MB",
    "1.5 s",
    "–",
    metrics.SERVER,
]


def test_compare_puts_runs_side_by_side(tmp_path, unpainted):
    slow = make_run(tmp_path / "one" / "run", rounds=5)
    fast = make_run(tmp_path / "two" / "run", strategy="fedsvd", rounds=3, gain=0.2, seed=7)
    rows = side_by_side.table([slow, fast])
    assert [row["run"] for row in rows] == ["one/run", "two/run"]
    assert rows[1] == FAST_IN_TABLE
    page = side_by_side.compare([slow, fast], tmp_path / "new" / "c.html")
    found = cells(page.read_text())
    assert SLOW_ON_PAGE in found
    assert FAST_ON_PAGE in found
    assert "At round 3, the last that all evaluated: two/run 80.0 %, one/run 50.0 %." in page.read_text()
    assert "<li>rounds: one/run 5; two/run 3</li>" in page.read_text()
    assert ["strategy.name", "&quot;fedit&quot;", "&quot;fedsvd&quot;"] in found and ["run.seed", "0", "7"] in found
    assert not any(row[0] == "privacy.unit" for row in found)  # the same in both
    assert page.read_text().count("<img") == 1 and "evaluated on: " not in page.read_text()
    axes = plots.compared(side_by_side.load_all([slow, fast])).axes[0]
    assert line(axes, "two/run").get_ydata() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert sum(item.get_label().startswith("frozen model") for item in axes.lines) == 1


def test_compare_says_when_accuracies_are_not_comparable_or_a_run_has_not_ended(tmp_path, unpainted):
    runs = [make_run(tmp_path / "global"), make_run(tmp_path / "personal", personalised=True, end=False)]
    page = side_by_side.compare(runs, tmp_path / "c.html").read_text()
    assert f"evaluated on: global {metrics.SERVER}; personal clients&#x27; held-out records" in page
    assert "personal has not ended." in page and "global has not ended" not in page


# Somebody has taken a number out of a line.
EDITED = "".join(json.dumps(event) + "\n" for event in (start(["a"]), {**a_round(1, ["a"]), "bytes_up": None}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("resolved.yaml", None, r"resolved\.yaml: cannot be read"),
        ("resolved.yaml", "a: [", r"resolved\.yaml: not readable as YAML"),
        ("resolved.yaml", "- 1", r"resolved\.yaml: expected a mapping"),
        ("metrics.jsonl", None, r"metrics\.jsonl: cannot be read"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl: line 1 is not an event"),
        ("metrics.jsonl", "", r"metrics\.jsonl: .*no start event"),
        ("metrics.jsonl", EDITED, r"metrics\.jsonl: an event is not as runs record it"),
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


ROW = {"forget_accuracy": 0.9, "retain_accuracy": 0.95, "test_accuracy": 0.9, "attack_auc": 0.5, "distance": None}
UNLEARNED = {
    "run": "/runs/clinic",
    "method": "loku",
    "asked": {"kind": "client", "name": "north", "words": "client north"},
    "rows": {"trained": ROW, "unlearned": {**ROW, "forget_accuracy": 0.1, "attack_auc": 0.25}},
    "cost": {"seconds": 9.15, "steps": 60, "record_passes": 1896},
    "privacy": ["no <guarantee>"],
    "notes": ["it went too far"],
}
UNLEARNED["asked"] |= {"forget_records": 40, "retain_records": 1160, "test_records": 597}


def test_the_report_of_an_unlearned_run_says_what_it_still_knows(tmp_path):
    run = make_run(tmp_path / "less", rounds=0, end=False)
    (run / "summary.json").write_text(json.dumps({"unlearning": UNLEARNED}))
    identity = {"versions": {"python": "3.11"}, "fingerprints": {"unlearning": {"reruns": False}}}
    (run / "identity.json").write_text(json.dumps(identity))
    page = report.write(run)[-1].read_text()
    assert '<p class="lead">Unlearned: client north, by loku, from the run /runs/clinic.</p>' in page
    assert "Membership attack, AUC 0.250 (was 0.500); accuracy on what is forgotten 10.0 % (was 90.0 %)" in page
    assert ["accuracy on what is forgotten", "90.0 %", "10.0 %"] in cells(page)
    assert "no &lt;guarantee&gt;" in page and "<li>It went too far.</li>" in page and "not ended" not in page
    assert "fedpeft unlearn /runs/clinic --method loku --client north" in page and "<h2>Rounds" not in page
    assert ["versions", "python 3.11"] in cells(page) and "without client north: less</h1>" in page
