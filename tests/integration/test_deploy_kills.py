"""A run of real sites ends by itself with the adapter of the undisturbed run, whatever is cut off or killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time

import pytest

from fedpeft.adapters import folder
from fedpeft.privacy.ledger import Ledger
from support.deployed import LABELS, TRAIN, Deployment, alive, children, until, write_records
from support.network import Cutting

SITES = [f"site-{index}" for index in range(8)]
KILLS, ROUNDS = int(os.environ.get("FEDPEFT_KILLS", "100")), 30
ROLES = ("site", "worker", "run", "face", "superlink", "coordinator")
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
    made, names = Deployment(tmp_path), SITES[:3]
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


def kill_one(made, chance, victim):
    """SIGKILL to a process; parents are started again by whoever watches them, as systemd would. Whether one died."""
    if victim in ("site", "coordinator"):
        name = "coordinator" if victim == "coordinator" else chance.choice(SITES)
        process = made.processes.pop(name)
        below = [pid for pid, _ in children(process.pid)]
        process.kill()
        process.wait()
        until(lambda: not [pid for pid in below if alive(pid)], "children that end with their parent", 60)
        made.start(name)
        return True
    what = chance.choice(SITES) if victim == "worker" else "coordinator"
    pids = made.pids(what, victim)
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(pids[0], signal.SIGKILL)
        return True
    return False


@pytest.mark.attack
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("secure", [False, True], ids=["dp", "dp-secagg"])
def test_random_kills_over_eight_sites(tmp_path, secure):
    """Half of the kills each way. Under secure sums a broken round is dropped and drawn anew, so there the adapter is
    another; its rounds are counted once all the same.
    """
    made, chance = Deployment(tmp_path), random.Random(17 + secure)
    options = (
        *STEADY,
        f"run.rounds={ROUNDS}",
        f"privacy.planned_rounds={ROUNDS}",
        f"secagg.enabled={json.dumps(secure)}",
    )
    begun = time.monotonic()
    try:
        started(made, SITES)
        run = made.submit(TREE, *options)
        until(lambda: made.rounds(run), "the first round", 300)
        killed: dict[str, int] = dict.fromkeys(ROLES, 0)
        while sum(killed.values()) < KILLS // 2:
            victim = chance.choice(ROLES)
            killed[victim] += kill_one(made, chance, victim)
            time.sleep(chance.uniform(0.2, 3.0))
            if made.state(run) in ("done", "failed"):
                break
        made.wait(run, 3000)
        disturbed = results(made, run, SITES)
        print(f"{killed}: {time.monotonic() - begun:.0f} s")
        assert disturbed[1] == sorted(set(disturbed[1])) and disturbed[1][-1] >= ROUNDS
        assert all(rounds == sorted(set(rounds)) for rounds in disturbed[2].values())
        if not secure:
            twin = made.submit(TREE, *options)
            made.wait(twin, 3000)
            assert disturbed == results(made, twin, SITES)
    finally:
        made.close()
