"""A run of real sites ends by itself with the adapter of the undisturbed run, whatever is cut off meanwhile."""

from __future__ import annotations

import pytest

from support.deployed import LABELS, STEADY, TRAIN, Deployment, read_results, start_sites
from support.network import Cutting

SITES = [f"site-{index}" for index in range(3)]
TREE = {**TRAIN, "data": {"labels": LABELS}}


@pytest.mark.attack
@pytest.mark.timeout(1800)
def test_a_proxy_that_cuts_every_connection_changes_nothing(tmp_path):
    made = Deployment(tmp_path)
    cutting = Cutting(made.port)
    try:
        start_sites(made, SITES, cutting.port)
        options = (*STEADY, "run.rounds=5", "privacy.planned_rounds=5")
        disturbed = made.submit(TREE, *options)
        made.wait(disturbed, 600)
        cuts, cutting.lasting_s = cutting.cuts, (1e6, 1e6)
        undisturbed = made.submit(TREE, *options)
        made.wait(undisturbed, 600)
        assert cuts > 20 and read_results(made, disturbed, SITES) == read_results(made, undisturbed, SITES)
    finally:
        cutting.close()
        made.close()
