"""Whatever is killed, a run of eight sites ends by itself with adapter and ledgers of the run that nobody disturbed.

SIGKILL reaches nodes and workers of the sites, and the run, the fleet process and the coordinator above them, one
by one and a few at a time. A node or coordinator is started again by the test, as systemd would; all others are brought
back by their own parents. With secure sums every second kill is of a worker whose masks are in the others' uploads: the
round then begins anew under other masks.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter

import pytest

from support.deployed import LABELS, STEADY, TRAIN, Deployment, alive, children, read_results, start_sites, until

SITES = [f"site-{index}" for index in range(8)]
VICTIMS = ("site", "worker", "run", "fleet", "coordinator")
MASKED = "worker between its masks and its answer"  # of secure sums: by then others have its masks in their uploads
ROUNDS, AT_ONCE = 10, 3
TREE = {**TRAIN, "data": {"labels": LABELS}}
KILLS = {"grpc": 100, "http": 30, "secure sums": 30}


def kill_one(made, run, chance, victims):
    """SIGKILL to a process; what it was, or None where there was none."""
    victim = chance.choice(victims)
    if victim == MASKED:
        return kill_masked(made, run, chance.choice(SITES))
    if victim in ("site", "coordinator"):
        name = "coordinator" if victim == "coordinator" else chance.choice(SITES)
        process = made.processes.pop(name)
        assert process.poll() is None, f"{name} has ended by itself"
        below = [pid for pid, _ in children(process.pid)]
        process.kill()
        process.wait()
        until(lambda: not [pid for pid in below if alive(pid)], "children that end with their parent", 60)
        made.start(name)
        return victim
    pids = made.pids(chance.choice(SITES) if victim == "worker" else "coordinator", victim)
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(pids[0], signal.SIGKILL)
        return victim
    return None


def kill_masked(made, run, name):
    """SIGKILL to a site's worker as soon as it has sealed its shares, if the run lets it."""
    (pid, *_), begun = made.pids(name, "worker") or [None], len(made.log(name))
    end = time.monotonic() + 60
    while pid is not None and time.monotonic() < end and made.state(run) not in ("done", "failed"):
        if "query.secagg_shares: answered" in made.log(name)[begun:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return MASKED
        time.sleep(0.005)
    return None


def disturb(made, run, chance, most, victims):
    """Kill now and then until the run has ended, or as often as that; a round is let through after a few. What was
    killed.
    """
    killed = Counter()
    while made.state(run) not in ("done", "failed") and killed.total() < most:
        before = len(made.rounds(run))
        for _ in range(min(chance.randint(1, AT_ONCE), most - killed.total())):
            time.sleep(chance.uniform(0.0, 3.0))
            if victim := kill_one(made, run, chance, victims):
                killed[victim] += 1
        seen = lambda before=before: len(made.rounds(run)) > before or made.state(run) in ("done", "failed")  # noqa: E731
        until(seen, "a round after kills", 600)
    return killed


@pytest.mark.attack
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("way", KILLS)
def test_a_run_ends_as_if_nothing_had_been_killed(tmp_path, way):
    made, chance, killed, kills = Deployment(tmp_path), random.Random(17), Counter(), KILLS[way]
    victims = VICTIMS if way != "secure sums" else (*VICTIMS, *[MASKED] * len(VICTIMS))
    sums = f"secagg.enabled={json.dumps(way == 'secure sums')}"
    options = (*STEADY, f"run.rounds={ROUNDS}", f"privacy.planned_rounds={ROUNDS}", sums)
    try:
        start_sites(made, SITES, over_http=SITES if way == "http" else ())
        undisturbed = made.submit(TREE, *options)
        made.wait(undisturbed, 1200)
        wanted = read_results(made, undisturbed, SITES)
        assert wanted[1] == list(range(1, ROUNDS + 1))
        assert all([number for number, _ in spent] == wanted[1] for spent in wanted[2].values())
        while killed.total() < kills:
            made.ready()  # the last kill may have been the coordinator's, after the end of the run
            begun, run = time.monotonic(), made.submit(TREE, *options)
            here = disturb(made, run, chance, kills - killed.total(), victims)
            made.wait(run, 1200)
            killed += here
            print(f"{dict(here)}: {len(made.events(run))} events in {time.monotonic() - begun:.0f} s", flush=True)
            assert read_results(made, run, SITES) == wanted
        print(dict(killed))
    finally:
        made.close()
