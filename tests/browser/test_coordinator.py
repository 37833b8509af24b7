"""A coordinator and its sites at work, followed in a real browser from before the first run to after the last."""

from __future__ import annotations

import pytest

from support.browser import PAGES
from support.deployed import NAMES, TRAIN, three_sites
from support.watched import served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
PATIENCE_S = 120.0  # other work may share the cores


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with three_sites(tmp_path_factory.mktemp("deployment")) as made:
        made.call("server", "sites", made.coordinator, "--wait", "3")
        yield made


def test_sites_runs_and_their_end_come_onto_the_page(browser, deployment):
    with served(deployment.coordinator) as server:
        browser.open(server.url)
        browser.wait_for("3 of 3 sites are connected", PATIENCE_S)
        browser.wait_for("No run has been submitted yet")
        found = browser.problems()
        run = deployment.submit(TRAIN)
        browser.wait_for(run, PATIENCE_S)
        browser.wait_for("3 of 3", PATIENCE_S)
        deployment.wait(run)
        browser.wait_for("state\tdone", PATIENCE_S)
        assert all(name in browser.run("return document.body.innerText") for name in NAMES)
        other = deployment.submit(TRAIN, "run.rounds=2")
        browser.wait_for(f"{other}\t{run}", PATIENCE_S)  # side by side
        deployment.wait(other)
        deployment.stop(NAMES[2])
        browser.wait_for("2 of 3 sites are connected", PATIENCE_S)
        browser.wait_for("offline since")
        for width, scheme in PAGES:
            browser.open(server.url, width, scheme)
            browser.wait_for("Live")
            browser.shoot(f"coordinator-{width}-{scheme}")
            found += [f"{width} {scheme}: {problem}" for problem in browser.problems()]
        assert found == []
        deployment.stop("coordinator")
        browser.wait_for("The coordinator is not running", PATIENCE_S)


def test_the_report_of_a_deployment(browser, deployment):
    (page, *_) = (deployment.coordinator / "runs").glob("*/report.html")
    found = []
    for width, scheme in PAGES:
        browser.open(page.as_uri(), width, scheme)
        browser.shoot(f"report-deployment-{width}-{scheme}")
        found += [f"{width} {scheme}: {problem}" for problem in browser.problems()]
    assert found == [] and "server run DIR" in browser.run("return document.body.innerText")
