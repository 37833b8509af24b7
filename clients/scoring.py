"""Scores of a received model on a client's held-out records.

A client with a policy sends those of the objective's measures (F1, ...) that the policy lists. A private client sends
none of them, whatever its policy lists, as they have no noise and stand in no account; accuracy and loss only where its
config releases them, unprotected. What the config does not release is whether scoring went well: which records a client
has, and what they do to a model or a test-time method, must not show in a status. So it answers in one form whatever
happens, with NaN where there is no number; why, its own log says.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import TYPE_CHECKING

from fedpeft.clients import sequence, test_time
from fedpeft.clients.train import evaluate
from fedpeft.config import Config
from fedpeft.errors import RunError
from fedpeft.objectives.base import load_objective
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions

if TYPE_CHECKING:
    from fedpeft.clients.local import Local

log = logging.getLogger("fedpeft")
COUNT = "num-examples"


def answer(
    local: Local, client: str, received: AdapterState, start: AdapterState, told: Instructions
) -> dict[str, float]:
    """What leaves for one request.

    Args:
        received: what the server sent, checked.
        start: the adapter to score.

    Raises:
        RunError: there are no records; never from a private client.
        OSError: a disk that cannot be written has nothing to do with a record.
    """
    if not local.guard.private:
        plain, bounds = scores(local, client, received, start, told), local.guard.policy(client)
        if bounds is None:
            return plain
        withheld = set(local.model.base.objective.measures) - set(bounds.metrics)
        return {key: value for key, value in plain.items() if key not in withheld}
    found: dict[str, float] = {}
    try:
        found = scores(local, client, received, start, told)
    except OSError:
        raise
    except Exception:  # of what kind may depend on a record
        log.exception("%s was not scored in round %s; the server is not told why", client, told.round)
    return {key: float(found.get(key, 0.0 if key == COUNT else math.nan)) for key in names(local.config)}


def scores(
    local: Local, client: str, received: AdapterState, start: AdapterState, told: Instructions
) -> dict[str, float]:
    """Accuracy and loss, and with `tta` those of the client's stream."""
    held = local.usable(sequence.records_of_seen(local.data(local.holdout, client), told, client))
    if len(held) == 0:
        raise RunError(f"{client} has no held-out records that the model can take.")
    local.model.write(start)
    with local.model.competing(None if told.learn is None else told.learn.seen):
        found = evaluate(local.model, held, tokens=local.config.run.evaluate_tokens)
        if local.config.tta.method is not None:
            own = local.usable(sequence.records_of_seen(local.data(local.train_data, client), told, client))
            found |= test_time.score(
                local.config, local.model, client, received, held, own, local.store, told.round, local.halves
            )
    return found


def names(config: Config) -> list[str]:
    """The scores that a client of this config has."""
    measured = load_objective(config.model.task).metrics(defaultdict(int), 0)
    adapted = ["tta_source_accuracy", "tta_accuracy"] if config.tta.method is not None else []
    return [*measured, *adapted]
