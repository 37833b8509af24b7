"""A run of real sites ends by itself with the adapter of the undisturbed run, whatever is cut off meanwhile."""

from __future__ import annotations

import pytest

from fedpeft.adapters import folder
from fedpeft.privacy.ledger import Ledger
from support.deployed import LABELS, TRAIN, Deployment, write_records
from support.network import Cutting

SITES = [f"site-{index}" for index in range(3)]
TREE = {**TRAIN, "data": {"labels": LABELS}}
STEADY = ("privacy.randomness=seeded", "run.quorum=1.0", "run.deadline_s=600")


def started(made, names, cutting=None):
    """Sites with records of their own, at work; behind a proxy if there is one."""
    made.start("coordinator")
    for seed, name in enumerate(names):
        write_records(made.root / f"{name}.csv", 30, seed)
        made.add_site(name, made.root / f"{name}.csv")
        if cutting is not None:
            file = made.root / name / "site.yaml"
            file.write_text(file.read_text().replace(f":{made.port}", f":{cutting.port}"))
    made.ready()
    for name in names:
        made.start(name)


def results(made, run, names):
    """The adapter's bits, the numbers of the rounds, and what each site has spent, each round once."""
    tensors = folder.load(made.coordinator / "runs" / run / "adapter").tensors
    spent = {}
    for name in names:
        entries = [one for one in Ledger(made.root / name / "ledger" / f"{name}.jsonl").entries() if one.run == run]
        spent[name] = [entry.round for entry in entries]
    bits = {key: value.numpy().tobytes() for key, value in tensors.items()}
    return bits, [event["round"] for event in made.rounds(run)], spent


@pytest.mark.attack
@pytest.mark.timeout(1800)
def test_a_proxy_that_cuts_every_connection_changes_nothing(tmp_path):
    made, names = Deployment(tmp_path), SITES
    cutting = Cutting(made.port)
    try:
        started(made, names, cutting)
        options = (*STEADY, "run.rounds=5", "privacy.planned_rounds=5")
        disturbed = made.submit(TREE, *options)
        made.wait(disturbed, 600)
        cuts, cutting.lasting_s = cutting.cuts, (1e6, 1e6)
        undisturbed = made.submit(TREE, *options)
        made.wait(undisturbed, 600)
        assert cuts > 20 and results(made, disturbed, names) == results(made, undisturbed, names)
    finally:
        cutting.close()
        made.close()
