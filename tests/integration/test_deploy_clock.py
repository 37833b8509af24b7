"""A run of real sites whose coordinator's clock jumps ends by itself as one whose clock is right."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import support
from support.deployed import LABELS, STEADY, TRAIN, Deployment, read_results, start_sites, until

SITES = [f"site-{index}" for index in range(3)]
TREE = {**TRAIN, "data": {"labels": LABELS}}
JUMPS = {3600: r"is 36\d\d s old", -3600: r"is -3[56]\d\d s old"}  # in seconds, and what a site then says
ROUNDS = 12


class Jumping(Deployment):
    """All processes of its coordinator have a clock of their own; those of the sites have the machine's."""

    def start(self, what, *options):
        with pytest.MonkeyPatch.context() as patch:
            if what == "coordinator":
                patch.setenv("PYTHONPATH", str(Path(support.__file__).parent / "shifted"))
                patch.setenv("CLOCK_FILE", str(self.root / "clock"))
            super().start(what, *options)


@pytest.mark.attack
@pytest.mark.timeout(1800)
def test_a_clock_that_jumps_an_hour_and_back_changes_nothing(tmp_path):
    """Flower's SuperLink counts by it how long a site has been silent, and the face how old a signature is: sites are
    refused, and say so. Where it went forward they count as away at once, where it went back for an hour as there.
    """
    made = Jumping(tmp_path)
    long = "client.local_steps=40"  # so that a jump comes in the midst of a round
    options = (*STEADY, f"run.rounds={ROUNDS}", f"privacy.planned_rounds={ROUNDS}", long)
    try:
        start_sites(made, SITES, SITES[:1])
        undisturbed = made.submit(TREE, *options)
        made.wait(undisturbed, 600)
        run = made.submit(TREE, *options)
        for jump_s, words in JUMPS.items():
            reached = len(made.rounds(run)) + 2
            until(lambda reached=reached: len(made.rounds(run)) >= reached, "two rounds", 300)
            (tmp_path / "clock").write_text(str(jump_s))
            until(lambda words=words: all(re.search(words, made.log(name)) for name in SITES), "a refusal of all", 120)
            assert made.state(run) != "done"
            time.sleep(15)  # until the run misses them, if it does
            (tmp_path / "clock").write_text("0")
        made.wait(run, 600)
        assert read_results(made, run, SITES) == read_results(made, undisturbed, SITES)
    finally:
        made.close()
