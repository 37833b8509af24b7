"""Models that were trained without a federation, as rows beside a run: every client alone, and one on all records.

Both start where the run starts and train the roles that it trains, by its own optimizer, rates, batches, seeds
and draws (augmentation, hidden tokens), for all of its rounds and without noise. In `local` nothing is ever averaged:
each client's model is scored on the common test set (the row is their mean) and, where clients hold records out, on its
own. `central` is one client that has all clients' records: as many passes over them, or `clients` times as many steps.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedpeft import progress, seeds
from fedpeft.clients.inputs import draw_anew
from fedpeft.clients.rates import Clock
from fedpeft.clients.train import evaluate, train
from fedpeft.record.measured import mean_over_clients
from fedpeft.simulations.baselines import attempt_fit

if TYPE_CHECKING:
    from fedpeft.config import ClientConfig
    from fedpeft.data.encode import Encoded
    from fedpeft.run.world import World


def trained_baselines(world: World) -> dict[str, Any]:
    """The rows that `run.trained_baselines` names: `local` with `local_worst`, `central`; of the clients' held-out
    records `clients_local` and `clients_central`. One that cannot be trained is None, with its reason.
    """
    rows = {"local": local, "central": central}
    found: dict[str, Any] = {}
    for name in world.config.run.trained_baselines:
        found |= attempt_fit(name, lambda name=name: rows[name](world))  # type: ignore[misc]
    return found


def local(world: World) -> dict[str, Any]:
    """Every client's own model: mean and worst accuracy on the test set, and on the held-out records of each."""
    shares, on_test, own = world.local.train_data, {}, []
    for number, (client, data) in enumerate(shares.items()):
        progress.step("clients", number, len(shares))
        train_alone(world, client, data, world.config.client)
        on_test[client] = evaluated(world, world.test_encoded)["accuracy"]
        own += [evaluated(world, world.local.holdout[client])] if world.config.data.holdout else []
    return {"local": fmean(on_test.values()), "local_worst": min(on_test.values()), **_over_clients("local", own)}


def central(world: World) -> dict[str, Any]:
    """One model of all clients' records: its accuracy on the test set, and on all held-out records."""
    shares, client = world.local.train_data, world.config.client
    steps = None if client.local_steps is None else client.local_steps * len(shares)
    pooled = world.train_encoded.view(np.concatenate([share.rows for share in shares.values()]))
    train_alone(world, next(iter(shares)), pooled, replace(client, local_steps=steps))
    held = world.local.holdout.values() if world.config.data.holdout else ()
    own = [evaluated(world, data) for data in held]
    return {"central": evaluated(world, world.test_encoded)["accuracy"], **_over_clients("central", own)}


def train_alone(world: World, client: str, data: Encoded, config: ClientConfig) -> None:
    """Leave the model as it is after all rounds on these records, with the seeds of this client."""
    run, model = world.config.run, world.local.model
    server = world.strategy.before_round(world.start)
    model.write(server.adapter)
    moments: dict[str, Tensor] | None = {} if config.keep_optimizer else None
    for number in range(1, run.rounds + 1):
        seed = seeds.derive(run.seed, "round", number, "client", client)
        roles = world.strategy.trained(replace(server, round=number - 1))
        shown = draw_anew(world.config, data, seed)
        thin = model.thinning(server.adapter, seed)
        train(model, shown, roles, config, seed, clock=Clock(number, run.rounds), moments=moments, thin=thin)


def evaluated(world: World, data: Encoded) -> dict[str, float]:
    """What is measured of the model as it is."""
    return evaluate(world.local.model, data, tokens=world.config.run.evaluate_tokens)


def _over_clients(name: str, results: list[dict[str, float]]) -> dict[str, float]:
    means = mean_over_clients([(result, result["num-examples"]) for result in results])
    return {f"clients_{name}": means["accuracy"]} if "accuracy" in means else {}
