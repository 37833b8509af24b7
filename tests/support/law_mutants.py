"""Leaks of the kinds that private clients have had, put into the product one at a time: the law has to find each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedpeft.clients import inputs, local, scoring, sequence
from fedpeft.clients import train as training
from fedpeft.clients.guard import Guard
from fedpeft.clients.local import Local
from fedpeft.errors import RunError
from fedpeft.privacy.plan import Plan


@dataclass(frozen=True)
class Leak:
    """`make` puts it in; it shows within the first `tries` requests of `kind`."""

    make: Callable[[Any], None]
    kind: str = "training"
    tries: int = 40


def check_on_records(monkeypatch: Any) -> None:
    """The model is tried on the client's own records, at the request's values, before anything is counted."""
    genuine = Local._open

    def opened(self, client, received, task):
        found = genuine(self, client, received, task)
        self.model.write(found.visit.start)
        own = self.train_data[client]
        with torch.no_grad():
            losses = training.per_sample_loss(
                self.model, *training.on_device(own, range(len(own)), torch.device("cpu"))
            )
        if not torch.isfinite(losses).all():
            raise RunError("per-sample gradients differ: verification failed.")
        return found

    monkeypatch.setattr(Local, "_open", opened)


def name_the_record(monkeypatch: Any) -> None:
    """A record that the model cannot take is named in an error that may be told."""
    genuine = inputs.find_usable

    def usable(model, data, looks=None):
        found = genuine(model, data, looks)
        if len(found) < len(data):
            raise local.Refused(f"record {len(found)} is not finite.")
        return found

    monkeypatch.setattr(inputs, "find_usable", usable)


def status_of_loss(monkeypatch: Any) -> None:
    """A client fails by a digit of its loss after training."""
    genuine = local.train

    def train(model, data, *arguments, **options):
        done = genuine(model, data, *arguments, **options)
        with torch.no_grad():
            loss = training.per_sample_loss(model, data.inputs, data.labels).nan_to_num().clamp(0, 100).mean()
        if int(1e3 * loss) % 2:
            raise RunError("it diverged.")
        return done

    monkeypatch.setattr(local, "train", train)


def size_of_records(monkeypatch: Any) -> None:
    """The update is longer by a value for each record that was trained on."""
    genuine = Local.train

    def train(self, client, received, task):
        update, metrics = genuine(self, client, received, task)
        return update.replace({"x": torch.zeros(len(self.records(client, task)))}), metrics

    monkeypatch.setattr(Local, "train", train)


def exact_count(monkeypatch: Any) -> None:
    """The true number of records is the client's weight, whatever the config releases."""
    monkeypatch.setattr(
        Guard, "allowed", lambda self, client, metrics: {"num-examples": float(metrics.get("num-examples", 1.0))}
    )


def no_entry(monkeypatch: Any) -> None:
    """What leaves is not written down."""
    monkeypatch.setattr(Guard, "spend", lambda self, *arguments: None)


def free_failures(monkeypatch: Any) -> None:
    """What fails after records were touched costs nothing."""

    def train(*arguments, **options):
        raise ValueError("out of memory for record 11")

    monkeypatch.setattr(local, "train", train)
    monkeypatch.setattr(Guard, "spend_failed", lambda self, *arguments: None)


def stop_when_still(monkeypatch: Any) -> None:
    """A client stops as soon as its records hardly move a tensor."""
    genuine = Plan.noised_mean

    def noised_mean(self, total, source):
        if total.norm() < 1.5 * self.clip:
            raise RunError("no trained tensor moved.")
        return genuine(self, total, source)

    monkeypatch.setattr(Plan, "noised_mean", noised_mean)


def count_again(monkeypatch: Any) -> None:
    """The same answer again is another entry."""
    genuine, numbers = Guard.spend, itertools.count()
    monkeypatch.setattr(
        Guard,
        "spend",
        lambda self, account, number, name, *plan: genuine(self, account, number, f"{name} {next(numbers)}", *plan),
    )


def sums_of_some(monkeypatch: Any) -> None:
    """Sums for a head fail where a task has an odd number of records."""
    genuine = sequence.private_head_sums

    def sums(model, head, data, noise, source):
        if len(data) % 2:
            raise ValueError("the covariance of odd records is singular")
        return genuine(model, head, data, noise, source)

    monkeypatch.setattr(sequence, "private_head_sums", sums)


def score_or_fail(monkeypatch: Any) -> None:
    """A client whose records cannot be scored says so."""
    monkeypatch.setattr(scoring, "answer", scoring.scores)


LEAKS = {
    "a check of gradients on the records": Leak(check_on_records),
    "a record that is named": Leak(name_the_record),
    "a status that hangs on the loss": Leak(status_of_loss),
    "a stage that hangs on the loss": Leak(status_of_loss, "stages"),
    "a size that hangs on the records": Leak(size_of_records),
    "a true count of records": Leak(exact_count),
    "an update in no ledger": Leak(no_entry),
    "a masked update in no ledger": Leak(no_entry, "stages"),
    "sums in no ledger": Leak(no_entry, "sums"),
    "a failure in no ledger": Leak(free_failures),
    "a stop when no tensor moved": Leak(stop_when_still),
    "an answer that is counted again": Leak(count_again),
    "sums that fail by a count": Leak(sums_of_some, "sums"),
    "a score that fails by a record": Leak(score_or_fail, "scoring"),
}
