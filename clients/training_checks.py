"""Combinations in section `client` that cannot work, refused before anything is loaded."""

from __future__ import annotations

from fedpeft.clients import rates
from fedpeft.clients.optimizers.base import find_optimizer
from fedpeft.config import Config
from fedpeft.errors import InputError


def check(config: Config) -> None:
    """Refuse what contradicts itself in a client's training; each message names the keys and the way out."""
    client = config.client
    find_optimizer(client).require(client)
    rates.require(client, config.run.rounds)
    if client.micro_batch is not None and client.micro_batch > client.batch_size:
        raise InputError(
            f"client.micro_batch={client.micro_batch} is a part of client.batch_size={client.batch_size}, and above "
            "it. Lower it, or set it to null."
        )
