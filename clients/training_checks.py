"""Combinations in section `client` that cannot work, refused before anything is loaded."""

from __future__ import annotations

from fedpeft.clients import rates
from fedpeft.clients.optimizers.base import find_optimizer
from fedpeft.config import Config


def check(config: Config) -> None:
    """Refuse what contradicts itself in a client's training; each message names the keys and the way out."""
    find_optimizer(config.client).require(config.client)
    rates.require(config.client, config.run.rounds)
