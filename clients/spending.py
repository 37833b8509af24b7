"""A private client pays for every request, also where it fails, and tells the server nothing of the failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedpeft.clients.guard import Guard
from fedpeft.clients.policy import Refused
from fedpeft.clients.store import Store
from fedpeft.errors import RunError
from fedpeft.privacy.ledger import BudgetExhausted
from fedpeft.privacy.plan import Plan
from fedpeft.state import AdapterState

log = logging.getLogger("fedpeft")


class Failed(RunError):
    """A private client failed after it had touched records, or may have; the same sentence whatever the reason."""

    def __init__(self) -> None:
        super().__init__("the client failed; the reason stays with it.")


@dataclass
class Spending:
    """One request to one client.

    Attributes:
        kept: name under which the store keeps the answer.
        account: in the ledger.
        request: its hash.
        plan: what pays for it; None until it is known, and without privacy.
        sums: noise multiplier of sums over records; None for a round's steps.
    """

    client: str
    kept: str
    number: int
    account: str
    request: str = ""
    plan: Plan | None = None
    sums: float | None = None

    def fail(self, guard: Guard) -> None:
        """Count the failure, once for a request, and raise Failed."""
        if self.plan is not None:
            guard.spend_failed(self.account, self.number, self.request, self.plan, self.sums)
        # After it is counted: that it failed is itself told to the server.
        raise Failed


@contextmanager
def hide_spending(guard: Guard, store: Store, spending: Spending) -> Iterator[None]:
    """Under DP, turn whatever happens inside into one sentence; from the plan on it is counted as what it might tell.

    The same request again finds the failure in the store. A disk that cannot be written says nothing of a record: it
    is not counted, and the request may come again.
    """
    try:
        yield
    except (Refused, BudgetExhausted, Failed, OSError):  # a disk that is full has nothing to do with a record
        raise
    except Exception as error:
        if not guard.private:
            raise
        log.exception("%s failed in round %d; the server is not told why", spending.client, spending.number)
        if spending.plan is None:
            raise Failed from error
        # Kept before it is counted, as an answer is: after a kill in between the same request fails and is counted.
        store.save_reply(spending.kept, spending.number, spending.request, AdapterState({}), {})
        spending.fail(guard)
