"""What releases cost, for the tests of ledgers."""

from __future__ import annotations

from fedpeft.privacy.accounting import composed

DELTA = 1e-5


def cost(*releases, accountant="rdp"):
    return composed(releases, DELTA, accountant)
