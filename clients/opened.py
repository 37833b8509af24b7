"""A client's round between its request and its answer."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.clients.cohort.engine import Job
from fedpeft.clients.spending import Spending
from fedpeft.state import AdapterState
from fedpeft.strategies.client import Visit
from fedpeft.strategies.instructions import Instructions

Answer = tuple[AdapterState, dict[str, float]]  # update, metrics


@dataclass
class Opened:
    """A client's round that has been opened: the visit, the job to train, how many records of its own are in it, and
    what it answered before, if this very request has come before.
    """

    visit: Visit
    told: Instructions
    spending: Spending
    job: Job
    count: int
    answered: Answer | None = None


def why_unlike(cohort: list[Opened]) -> str | None:
    """Why these clients cannot share one pass over the model; None if they can."""
    roles = ("residual_A", "residual_B")
    if any(opened.told.trains != cohort[0].told.trains for opened in cohort):
        return "they train different roles"
    if len({opened.visit.start.select(roles).sha256() for opened in cohort}) > 1:
        return "their base weights differ"
    return None
