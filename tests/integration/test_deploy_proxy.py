"""A run of real sites ends by itself with the adapter of the undisturbed run, whatever is cut off meanwhile."""

from __future__ import annotations

import pytest

from support.deployed import LABELS, STEADY, TRAIN, Deployment, read_results, start_sites, until
from support.network import Cutting

SITES = [f"site-{index}" for index in range(3)]
TREE = {**TRAIN, "data": {"labels": LABELS}}


@pytest.mark.attack
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("lasting_s", "cuts"), [((0.2, 1.0), 20), ((30.0, 30.0), 4)])
def test_a_proxy_that_cuts_every_connection_changes_nothing(tmp_path, lasting_s, cuts):
    """At 30 s pulls that wait are cut too: one lasts up to 20 s. A run begins between cuts, and another after some."""
    made = Deployment(tmp_path)
    proxies = {port: Cutting(port, lasting_s) for port in (made.port, made.http_port)}
    try:
        start_sites(made, SITES, SITES[:1], {port: proxy.port for port, proxy in proxies.items()})
        options, runs = (*STEADY, "run.rounds=5", "privacy.planned_rounds=5"), []
        for _ in range(2):
            runs.append(made.submit(TREE, *options))
            made.wait(runs[-1], 600)
            before = [proxy.cuts for proxy in proxies.values()]
            until(lambda: all(proxy.cuts >= cuts for proxy in proxies.values()), "cuts", 300)
        for proxy in proxies.values():
            proxy.lasting_s = (1e6, 1e6)
        runs.append(made.submit(TREE, *options))
        made.wait(runs[-1], 600)
        first, second, undisturbed = (read_results(made, run, SITES) for run in runs)
        assert min(before) >= cuts and first == second == undisturbed
    finally:
        for proxy in proxies.values():
            proxy.close()
        made.close()
