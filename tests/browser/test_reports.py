"""Reports of real runs, opened as files in a real browser: no error, nothing that cannot be read, seen or reached."""

from __future__ import annotations

import re

import pytest

import fedpeft
from fedpeft.record import side_by_side
from support.browser import PAGES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
FEW = {"run.rounds": 3, "data.limit": 300}
KINDS = {
    "simulation": ("quickstart", {**FEW, "data.clients": 6, "run.clients_per_round": 3}),
    "many": ("quickstart", {"run.rounds": 2, "data.clients": 60, "data.partition.min_examples": 1}),
    "hostile": ("hostile", {"run.rounds": 2}),
    "private": ("fedsvd_dp", {"run.rounds": 2}),
    "tasks": ("continual", {}),
    "test-time": ("tta", {"run.rounds": 2}),
    "text": ("instruct", {"run.rounds": 1}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind -> its folder, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(kind):
        if kind not in made:
            config, more = KINDS[kind]
            made[kind] = fedpeft.simulate(config, more, root / kind).folder
        return made[kind]

    return make


def look(browser, page, name):
    """The page in both sizes and colour schemes; what is wrong with it."""
    found = []
    for width, scheme in PAGES:
        browser.open(page.as_uri(), width, scheme)
        browser.shoot(f"report-{name}-{width}-{scheme}")
        found += [f"{width} {scheme}: {problem}" for problem in browser.problems()]
    drawn = browser.run("return [...document.images].map((image) => image.complete && image.naturalWidth > 200)")
    return [*found, *(["a figure is not drawn"] if not all(drawn) else [])]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_report(browser, runs, kind):
    page = runs(kind) / "report.html"
    assert look(browser, page, kind) == []
    assert not [stop for stop in browser.tab_stops() if "WITHOUT" in stop]
    text = browser.run("return document.body.innerText")
    assert "How it was made" in text and not re.search(r"\b(nan|None|null)\b", text.split("Config")[0])


def test_figures_are_the_pages_own_in_the_dark(browser, runs):
    """No white slab: the corner of a figure has the page's colour, and its ink is light."""
    page = runs("simulation") / "report.html"
    for scheme, dark in (("light", False), ("dark", True)):
        browser.open(page.as_uri(), 1400, scheme)
        red, ink = browser.pixels_of_first_image()
        assert (red < 60) == dark and (ink > 150) == dark


def test_the_report_of_what_was_unlearned(browser, runs, tmp_path):
    made = fedpeft.unlearn(runs("simulation"), client="client-001", out=tmp_path / "less")
    fedpeft.report(made["out"])
    assert look(browser, tmp_path / "less" / "report.html", "unlearned") == []


def test_runs_side_by_side(browser, runs, tmp_path):
    page = side_by_side.compare([runs("simulation"), runs("many"), runs("hostile")], tmp_path / "c.html")
    assert look(browser, page, "side-by-side") == []
