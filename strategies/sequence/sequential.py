"""Sequential fine-tuning in a federation: the strategy's adapter goes on from task to task."""

from __future__ import annotations

from fedpeft.strategies.sequence.base import ServerBody


class FederatedSequential(ServerBody):
    """Nothing is done against forgetting."""
