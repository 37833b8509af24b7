"""Faults of the private path: patches of the code that makes it, and the check of the audit that each is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedpeft.clients import local
from fedpeft.privacy.plan import Plan

Patch = Callable[..., None]  # monkeypatch.setattr
FAULTS: dict[str, tuple[str, str, Callable[[Patch], None]]] = {}  # name -> part of the audit, check, how to seed it
HEAD = 170  # values of the classifier, which come first


def fault(part: str, check: str):
    def note(seed):
        FAULTS[seed.__name__] = part, check, seed
        return seed

    return note


def planned(put, engine: str, **changes: Callable[[Plan], float]) -> None:
    """One engine trains by another plan than the ledger gets."""

    def other(private):
        return private and replace(
            private, plan=replace(private.plan, **{key: change(private.plan) for key, change in changes.items()})
        )

    alone, together = local.train, local.train_cohort
    if engine == "alone":
        put(local, "train", lambda *args, private=None, **rest: alone(*args, private=other(private), **rest))
    else:
        put(
            local,
            "train_cohort",
            lambda model, jobs, *rest: together(
                model, [replace(job, private=other(job.private)) for job in jobs], *rest
            ),
        )
