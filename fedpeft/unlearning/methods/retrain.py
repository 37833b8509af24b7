"""Exact retraining: the run again, by its own config and seeds, without what is to be forgotten.

It is what the others are measured against, and the only one that forgets by construction. Clients keep their names and
so their own draws; only a round's sample of clients is another, where not all are asked. A task that is left out takes
its rounds along (continual.leave_out). Bourtoule et al. call it the naive way, arXiv
1912.03817.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpeft.adapters import folder as folders
from fedpeft.clients.train import steps_of
from fedpeft.record.metrics import read
from fedpeft.simulations.run import resume
from fedpeft.unlearning.method import Case, Outcome, UnlearningMethod


class Retrain(UnlearningMethod):
    """The whole run again, without what is to be forgotten: exact, and the yardstick."""

    paper = "the naive way of Bourtoule et al. 2019, arXiv 1912.03817"
    reruns = True

    def unlearn(self, case: Case, folder: Path) -> Outcome:
        # The folder has config, split and fingerprints by now, as a run has that was broken off ahead of round 1.
        resume(folder)
        client, data = case.config.client, case.world.local.train_data
        sizes = {name: int((~np.isin(mine.rows, case.asked.numbers)).sum()) for name, mine in data.items()}
        steps = passes = 0
        for event in read(folder / "metrics.jsonl"):
            for name in event["clients"] if event["event"] == "round" else ():
                taken = steps_of(sizes[name], client, in_order=False)
                steps += taken
                passes += taken * min(client.batch_size, sizes[name])
        return Outcome(folders.load(folder / "adapter"), steps, passes)
