"""What releases cost, for the tests of ledgers."""

from __future__ import annotations

from fedpeft.privacy.accounting import compose_epsilon

DELTA = 1e-5


def cost(*releases, accountant="rdp"):
    return compose_epsilon(releases, DELTA, accountant)
