"""A simulated run says of its privacy: epsilon in each round (`Spent`), and the `privacy` section of its summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.objectives.base import load_objective
from fedpeft.privacy.ledger import accounts_in
from fedpeft.privacy.plan import RELATION
from fedpeft.run.world import World
from fedpeft.strategies.wrappers.client_dp import ClientDP, describe

RANDOMNESS = {"os": "operating system", "seeded": "seeded, so reproducible and not private"}


class Spent:
    """Under sample-level DP, what clients have spent by each round of a run, kept from one round to the next.

    A ledger is read again where it may have grown: of the clients that the round asked, and of those that
    were late and have spent nothing since. All are read where that is not
    known: before the first round here (the run may have been resumed), after a round that left no event, and where a
    task begins, as all clients may have given sums since.
    """

    def __init__(self, here: World) -> None:
        self.here, self.last = here, -1
        self.epsilons: dict[str, float] = {}  # of the clients that have spent
        self.again: set[str] = set()
        self.late: dict[str, int] = {}  # the round that a client did not answer in time, until its ledger has it

    def describe_round(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """For the event of a round: `epsilon_max`, the most that any client has spent so far, and `epsilon_by_client`
        of those that this round asked. The others' has not changed, and there may be very many.
        """
        if self.here.config.privacy.unit != "sample":
            return {}
        number, guard, clients = event["round"], self.here.local.guard, self.here.local.train_data
        asked = sorted({*event["clients"], *event["quarantined"]} & clients.keys())
        self.late |= dict.fromkeys({*event["quarantined"]} & clients.keys(), number)
        if number == self.last + 1 and (number - 1) % guard.rounds:
            read = {client: guard.accounts_of_run(client) for client in sorted({*asked, *self.again, *self.late})}
        else:
            kept = accounts_in(guard.folder, clients)
            read = {client: [ledger.entries() for ledger in ledgers] for client, ledgers in kept.items()}
        self.again = set()
        for client, accounts in read.items():
            # Before it was resumed the run may have counted rounds that are still to come.
            so_far = [[one for one in entries if one.run != guard.run or one.round <= number] for entries in accounts]
            if so_far != accounts:
                self.again.add(client)
            # Whoever did not answer in time may still spend, in this round or many later.
            since = self.late.get(client, number + 1)
            if any(one.run == guard.run and since <= one.round <= number for entries in so_far for one in entries):
                del self.late[client]
            self.epsilons[client] = guard.epsilon(so_far)
        self.last = number
        return {
            "epsilon_max": max(self.epsilons.values(), default=0.0),
            "epsilon_by_client": {client: self.epsilons.get(client, 0.0) for client in asked},
        }


def section(here: World) -> dict[str, Any] | None:
    """What is protected, from whom, by what and at what cost; None without privacy.

    `clients` has what each client spent; `claim` and `outside` are sentences for the reader.
    """
    privacy = here.config.privacy
    if privacy.unit == "none":
        return None
    common = {
        "unit": privacy.unit,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "clip": privacy.clip,
        "randomness": RANDOMNESS[privacy.randomness],
    }
    if isinstance(here.strategy, ClientDP):
        return {**common, "claim": describe(here.strategy), "outside": list_outside(here), "clients": {}}
    clients = here.local.guard.spending(list(here.local.train_data))
    claim = (
        f"Each client's updates are (epsilon, {privacy.delta:g})-private for neighbours that {RELATION}, against "
        "everyone who sees them, the server included. Epsilon is a client's own; where one person has records at "
        "several clients, theirs add up."
    )
    return {**common, "relation": RELATION, "claim": claim, "outside": list_outside(here), "clients": clients}


def list_outside(here: World) -> list[str]:
    """What leaves, or counts as public, beside what the guarantee covers."""
    config, privacy, guard = here.config, here.config.privacy, here.local.guard
    lines = []
    if privacy.randomness == "seeded":
        lines.append("noise and sampling come from run.seed: whoever has it can remove the noise")
    if privacy.unit == "sample" and any(guard.records(client) is None for client in here.local.train_data):
        lines.append(
            "the number of records of a client counts as public where neither its policy nor privacy.records "
            "gives another: it sets the client's sampling rate and noise"
        )
    if config.adapter.start is not None:
        lines.append(
            "the adapter that the run began from (adapter.start): it counts as public, and what it was trained on "
            "before is not in this run's epsilon"
        )
    if privacy.release_metrics:
        lines.append("loss, accuracy and counts of each client, its labels' too (privacy.release_metrics)")
    if config.run.baselines and load_objective(config.model.task).classes:
        lines.append(
            "the logistic regressions of the table (in a sequence the frozen model's head too), which only a "
            "simulation can fit on all records"
        )
    lines.append("which clients took part or failed, and how long they took")
    return lines
