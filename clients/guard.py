"""Differential privacy at a client: its policy and plan before a step is taken, its ledger before an update leaves."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fedpeft.clients import policy
from fedpeft.clients.policy import Policy, Refused
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.privacy import checks
from fedpeft.privacy import plan as plans
from fedpeft.privacy.accounting import Release, compose_epsilon
from fedpeft.privacy.ledger import TASK, Budget, Entry, Ledger, accounts_in, accounts_of, client_of, list_exposures
from fedpeft.privacy.noise import OperatingSystem, Randomness, Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.sequence.build import sums_of_a_task

log = logging.getLogger("fedpeft")
FAILED = "failed "  # begins the name of a release that was none


class Guard:
    """Stands between a server's request and a client's records.

    Args:
        folder: holds <client>.jsonl, the ledger of each.
        run: name of the run in the ledgers.
    """

    def __init__(self, config: Config, folder: Path, run: str) -> None:
        self.config, self.folder, self.run = config, folder, run
        self.private = config.privacy.unit == "sample"
        # Each task has its own account, so a budget is planned for the rounds of one.
        self.rounds = config.run.rounds // (config.continual.learned if config.continual.body else 1)
        self.policy = cache(self._policy_of)

    def _policy_of(self, client: str) -> Policy | None:
        try:
            return policy.of_client(self.config.privacy.policy, client)
        except InputError as error:
            log.error("%s: %s", client, error)
            # One sentence whatever is wrong: what the file says is the site's own business.
            raise Refused(policy.INVALID) from error

    def admit(self, client: str, number: int) -> None:
        """Raise Refused unless the client's policy allows this round. Reads no record."""
        bounds = self.policy(client)
        if bounds is not None:
            bounds.require(self.config, number)

    def admit_evaluation(self, client: str) -> None:
        """Raise Refused unless accuracy and loss may leave this client."""
        bounds = self.policy(client)
        if self.private and not self.config.privacy.release_metrics:
            raise Refused("accuracy and loss are not covered by the guarantee; privacy.release_metrics is false.")
        if bounds is not None and not {"accuracy", "loss", "num-examples"} <= set(bounds.metrics):
            raise Refused("refused by the site's policy: accuracy and loss are not among its metrics.")

    def allowed(self, client: str, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics that may leave; without its count of examples a client weighs 1."""
        bounds = self.policy(client)
        if self.private and not self.config.privacy.release_metrics:
            metrics = {}
        elif bounds is not None:
            metrics = {key: value for key, value in metrics.items() if key in bounds.metrics}
        return {"num-examples": 1.0, **metrics}

    def records(self, client: str) -> int | None:
        """How many records the client is publicly said to have; None where nothing is said."""
        bounds = self.policy(client)
        return (bounds.records if bounds else None) or self.config.privacy.records

    def plan(self, client: str, count: Callable[[], int]) -> Plan | None:
        """The client's plan, None without privacy; `count` is asked only where no public number is given."""
        if not self.private:
            return None
        bounds = self.policy(client)
        records = self.records(client) or count()
        sums = sums_of_a_task(self.config)  # a task's account has them beside the steps of its rounds
        plan = plans.make_plan(self.config.privacy, self.config.client, self.rounds, records, sums)
        if bounds is not None:
            bounds.require_noise(plan.noise_multiplier)
        return plan

    def require(self, clients: dict[str, int]) -> None:
        """Raise InputError if a client, named with its number of records, cannot be trained privately as configured, or
        its policy is none.
        """
        for client in clients:
            policy.of_client(self.config.privacy.policy, client)
        if self.private:
            for client, count in clients.items():
                plans.require(self.config.privacy, self.config.client, self.records(client) or count, count, client)

    def source(self, client: str, number: int, *purpose: str) -> Randomness:
        """What the client's sampling and noise of a round are drawn from."""
        if self.config.privacy.randomness == "os":
            return OperatingSystem()
        return Seeded(self.config.run.seed, "privacy", "round", number, "client", client, *purpose)

    def afford(self, account: str, number: int, request: str, plan: Plan, sums: float | None = None) -> None:
        """Raise what `spend` would; writes nothing. Nobody needs to compute what cannot be sent."""
        self.ledger(account).require(*self._release(account, number, request, plan, sums))

    def spend(self, account: str, number: int, release: str, plan: Plan, sums: float | None = None) -> None:
        """Write a release into the ledger of the client or of its task, durably; then it may leave.

        Args:
            release: names what leaves (`release`). The very same release is counted once.
            sums: noise multiplier of sums over all records of a task; None where one round's steps are released.

        Raises:
            Refused: the site's policy allows no more rounds.
            BudgetExhausted: it would pass the run's or the site's budget.
        """
        self.ledger(account).reserve(*self._release(account, number, release, plan, sums), once=True)

    def spend_failed(self, account: str, number: int, request: str, plan: Plan, sums: float | None = None) -> None:
        """Count what failed after records were touched, once a request: that it failed may have to do with a record."""
        self.spend(account, number, f"{FAILED}{request}", plan, sums)

    def counted(self, client: str) -> frozenset[str] | None:
        """The releases of this run in the client's accounts, none of which failed; None without privacy."""
        if not self.private:
            return None
        return frozenset(
            entry.request
            for entries in self.accounts_of_run(client)
            for entry in entries
            if entry.run == self.run and not entry.request.startswith(FAILED)
        )

    def accounts_of_run(self, client: str) -> list[list[Entry]]:
        """What stands in each account of the client that this run may write to; those that are not there are left
        out.
        """
        # By name: to look for them in the folder of very many clients would take longer than a round.
        tasks = self.config.continual.learned if self.config.continual.body is not None else 0
        accounts = [client, *(f"{client}{TASK}{task}" for task in range(tasks))]
        return [entries for account in accounts if (entries := self.ledger(account).entries())]

    def _release(
        self, account: str, number: int, name: str, plan: Plan, sums: float | None
    ) -> tuple[Entry, Budget, Release | None, Budget | None, list[Entry]]:
        if sums is not None:
            # Sums run over all records, so nothing is sampled and nothing amplified: rate 1, one step.
            entry = Entry(self.run, number, name, 1.0, sums, 1)
            return entry, plan.budget, None, *self._lifetime_budget(account)
        entry = Entry(
            self.run, number, name, plan.sample_rate, plan.noise_multiplier, self.config.client.local_steps or 0
        )
        bounds = self.policy(client_of(account))
        if bounds is not None:
            # Counted here, as a server may number rounds as it likes; the very same release is not another round.
            done = sum(one.run == self.run and one != entry for one in self.ledger(account).entries())
            bounds.require_rounds(done + 1)
        return entry, plan.budget, plan.release, *self._lifetime_budget(account)

    def _lifetime_budget(self, account: str) -> tuple[Budget | None, list[Entry]]:
        """What the client's policy allows all runs together, and what stands in the client's other accounts."""
        client = client_of(account)
        bounds = self.policy(client)
        if bounds is None:
            return None, []
        return bounds.lifetime(self.config), [
            entry
            for ledger in accounts_of(self.folder, client)
            if ledger.account != account
            for entry in ledger.entries()
        ]

    def ledger(self, account: str) -> Ledger:
        """The ledger of an account, which is a client or a client and a task; its file need not be there."""
        return Ledger(self.folder / f"{account}.jsonl")

    def epsilon(self, accounts: list[list[Entry]]) -> float:
        """What the entries of a client's accounts cost. In a sequence of tasks it is that of the task that cost most: a
        record is in one task only.
        """
        privacy = self.config.privacy
        return max(
            compose_epsilon(tuple(entry.release for entry in entries), privacy.delta, privacy.accountant)
            for entries in list_exposures(accounts or [[]])
        )

    def spending(self, clients: list[str]) -> dict[str, dict[str, Any]]:
        """What each client has spent: epsilon, delta, steps, rounds, sample_rate, noise_multiplier."""
        table, kept = {}, accounts_in(self.folder, frozenset(clients))
        for client in clients:
            accounts = [ledger.entries() for ledger in kept.get(client, ())]
            entries = [entry for account in accounts for entry in account]
            steps = [entry for entry in entries if entry.sample_rate < 1] or entries
            table[client] = {
                "epsilon": self.epsilon(accounts),
                "delta": self.config.privacy.delta,
                "steps": sum(entry.steps for entry in steps),
                "rounds": len({(entry.run, entry.round) for entry in entries}),
                "sample_rate": max((entry.sample_rate for entry in steps), default=None),
                "noise_multiplier": min((entry.noise_multiplier for entry in steps), default=None),
            }
        return table


def hash_request(received: AdapterState, told: Instructions) -> str:
    """Hash of a request: the same one is answered with the same update, at no further cost."""
    # Sorted: a hash must not hang on the order in which keys were written.
    text = json.dumps(told.to_json(), sort_keys=True) + received.sha256()
    return hashlib.sha256(text.encode()).hexdigest()


def name_release(request: str, update: AdapterState) -> str:
    """The name of a release in the ledger: a hash of the request and of every bit that answers it."""
    return hashlib.sha256((request + update.sha256()).encode()).hexdigest()


def check(config: Config) -> None:
    """Refuse what sample-level DP cannot protect, before anything is loaded."""
    privacy = config.privacy
    if privacy.policy is not None:
        place = Path(privacy.policy)
        if not place.exists():
            raise InputError(f"privacy.policy: no file or folder {privacy.policy}.")
        for path in sorted(place.glob("*.yaml")) if place.is_dir() else [place]:
            policy.load(path)
    if privacy.unit != "sample":
        return
    checks.require_covered(config)
    client = config.client
    if client.local_steps is None:
        raise InputError(
            "client.local_steps=null: with privacy.unit=sample batches are Poisson samples, and the "
            "number of steps must be public. Set client.local_steps and client.local_epochs=null."
        )
    if client.loss_weighting == "token":
        raise InputError(
            "client.loss_weighting=token: with privacy.unit=sample a record's gradient must not depend on how long the "
            "others of its batch are. Set client.loss_weighting=record."
        )
    if client.max_grad_norm is not None:
        raise InputError(
            f"client.max_grad_norm={client.max_grad_norm:g}: with privacy.unit=sample every record's "
            "gradient is clipped by privacy.clip. Set client.max_grad_norm=null."
        )
    if unequal := config.unequal_ranks:
        raise InputError(
            f"{unequal}: with privacy.unit=sample noise would fill the rows that a lower rank lacks. Set "
            f"{unequal.partition('=')[0]}=null."
        )
