"""Static ConPET in a federation: one adapter for all tasks, and clients that replay their own earlier records.

Song et al., arXiv 2309.14763. From the second task on every batch of a client is half new and half old records; an old
one is drawn by its task, all earlier tasks alike, then within the task. Raw records stay at the client; nothing but the
adapter is sent. The strategy averages the adapter as always.

A record takes part in rounds of later tasks too, so under sample-level DP its tasks would add up; it is refused there.
"""

from __future__ import annotations

from fedpeft.strategies.sequence.base import ServerBody


class FederatedConPETStatic(ServerBody):
    """Dynamic replay at the clients."""

    paper = "Song et al. 2023, arXiv 2309.14763"
    replays = True
