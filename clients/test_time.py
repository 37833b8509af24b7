"""Test-time adaptation at a client: its model meets a stream of the client's own, with and without the method.

The stream is made of the client's held-out records: images go through corruptions (`fedpeft.data.corruptions`), a text
for a language model is cut before its last token, which is then the label. Order, corruption and noise derive from the
seed and the client's name, so the stream is the same at every evaluation and accuracies of rounds can be compared. A
method that asks for source data is given the client's training records. In a sequence of tasks both are those of the
classes seen so far, and the trained classifier is what is adapted.

With `tta.keep` the method goes on from what it had learned at the evaluation before, on the model of now. What it took
from source data is taken again. It must not adapt what the rounds train: the old values would undo the new round's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import registry, seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.data.corruptions import CLEAN, CORRUPTIONS, corrupt_image
from fedpeft.data.drift import TestStream
from fedpeft.data.encode import Encoded
from fedpeft.data.split import client_name
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from fedpeft.record import lead
from fedpeft.record.measured import mean_over_clients
from fedpeft.state import AdapterState
from fedpeft.strategies.client import ClientHalf
from fedpeft.tta.deployed import Deployed, deploy
from fedpeft.tta.method import TTAMethod, make
from fedpeft.tta.parts.gradient import GradientMethod
from fedpeft.tta.play import run_stream

PER_CLIENT, SEQUENCE = "per_client", "sequence"


def score(
    config: Config,
    model: Adapted,
    client: str,
    received: AdapterState,
    held: Encoded,
    train: Encoded,
    store: Store,
    number: int,
    halves: Sequence[ClientHalf] = (),
) -> dict[str, float]:
    """Accuracy on the client's stream of the model as written, without and with the method of `tta`."""
    deployed = deploy(model)
    given = stream(config, client, held)
    method = build(config, model, deployed, client, received, train, halves)
    old = store.load_state(client, number) if config.tta.keep else None
    if old is not None:
        method.load(_update_state(method.state(), old))
    adapted = run_stream(method, given, deployed)
    if config.tta.keep:
        store.save_state(client, number, method.state())
    return {
        "tta_source_accuracy": source_accuracy(deployed, given),
        "tta_accuracy": 1 - round(adapted["error"] * given.rows) / given.rows,
    }


def build(
    config: Config,
    model: Adapted,
    deployed: Deployed,
    client: str,
    received: AdapterState,
    train: Encoded,
    halves: Sequence[ClientHalf] = (),
) -> TTAMethod:
    """The client's method, ready for its stream; `halves` give it what the federation learned for it."""
    method = _make_named(config, deployed, seeds.derive(config.run.seed, "tta", client, "method"))
    equipped = any(half.equip(method, model, deployed, received, train) for half in halves)
    if not equipped and method.needs_source != "none":
        method.prepare(train)
    return method


def source_accuracy(deployed: Deployed, given: TestStream) -> float:
    """Accuracy of the model as it is."""
    source = make("source", deployed)
    labels = torch.cat([source.predict(batch).argmax(-1).cpu() for batch in given.batches()])
    return float((labels == given.labels).double().mean())


def stream(config: Config, client: str, held: Encoded) -> TestStream:
    """The client's stream: `tta.batch_size` rows a batch; batches end where a corruption ends."""
    data = load_objective(config.model.task).stream(held)
    inputs, labels, domains, parts = [], [], [], []
    for number, name in enumerate(corruptions(config, client)):
        rows = seeds.numpy_generator(config.run.seed, "tta", client, "order", number).permutation(len(data))
        chosen = data.view(rows)
        draws = seeds.numpy_generator(config.run.seed, "tta", client, "noise", number)
        inputs.append(corrupted(chosen.inputs, name, config.tta.severity, draws))
        labels.append(chosen.labels)
        domains += [name if name == CLEAN else f"{name}-{config.tta.severity}"] * len(data)
        first = number * len(data)
        parts += [
            slice(first + start, min(first + start + config.tta.batch_size, first + len(data)))
            for start in range(0, len(data), config.tta.batch_size)
        ]
    joined = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
    return TestStream(client, joined, torch.cat(labels), domains, parts)


def corruptions(config: Config, client: str) -> list[str]:
    """What the client's images go through, one after another. `per_client` deals all nine before one comes twice."""
    chosen, seed = config.tta.corruption, config.run.seed
    if chosen == SEQUENCE:
        order = seeds.numpy_generator(seed, "tta", client, "corruptions").permutation(len(CORRUPTIONS))
        return [list(CORRUPTIONS)[place] for place in order]
    if chosen == PER_CLIENT:
        names = [client_name(index) for index in range(config.data.clients or 0)]
        order = seeds.numpy_generator(seed, "tta", "corruptions").permutation(len(CORRUPTIONS))
        # A real site has a name of its own, and no number.
        place = names.index(client) if client in names else seeds.derive(seed, "tta", client)
        return [list(CORRUPTIONS)[order[place % len(CORRUPTIONS)]]]
    return [chosen]


def corrupted(inputs: dict[str, Tensor], name: str, severity: int, draws: np.random.Generator) -> dict[str, Tensor]:
    """Images [N, C, H, W] in [0, 1] under a corruption, channel by channel; `clean` leaves all as it is."""
    if name == CLEAN:
        return inputs
    images = inputs["pixel_values"].numpy()
    made = np.stack(
        [np.stack([corrupt_image(channel, name, severity, draws) for channel in image]) for image in images]
    )
    return {**inputs, "pixel_values": torch.from_numpy(made.astype(np.float32))}


def require(config: Config, model: Adapted) -> None:
    """Refuse a method that cannot work on this model, before anything is trained.

    Raises:
        InputError: from the method itself, or images that do not go in as they are, or `tta.keep` with what trains.
    """
    tta = config.tta
    if tta.method is None:
        return
    deployed = deploy(model)
    method = _make_named(config, deployed, 0)
    if tta.corruption != CLEAN and model.base.processor is not None:
        raise InputError(
            f"tta.corruption={tta.corruption}: {config.model.name} normalises its images; corruptions "
            "work on images in [0, 1] that go in as they are. Set tta.corruption=clean."
        )
    trained = {id(parameter) for parameter in model.parameters.values()}
    both = [name for name in method.holds() if id(deployed.tensor(name)) in trained] if tta.keep else []
    if both:
        way = ", or tta.adapt=norm_affine" if isinstance(method, GradientMethod) else ""
        raise InputError(
            f"tta.keep=true: {tta.method} keeps {both[0]}, which the rounds train: what was kept would "
            f"undo the new round's values. Set tta.keep=false{way}."
        )


def check(config: Config) -> None:
    """Refuse a `tta` section that cannot work, before anything is loaded."""
    tta = config.tta
    if tta.method is None:
        return
    objective = load_objective(config.model.task)
    if not objective.classes and not (objective.causal and objective.labelled == "none"):
        raise InputError(
            f"tta.method={tta.method}: a method adapts the scores of one answer for each record, a class or the next "
            f"token, and model.task={config.model.task} has none. Set tta.method=null."
        )
    if config.data.holdout == 0:
        raise InputError(
            f"tta.method={tta.method}: a client's stream is made of its held-out records, and "
            "data.holdout=0 holds none out. Set data.holdout (for example 0.3)."
        )
    allowed = [*CORRUPTIONS, PER_CLIENT, SEQUENCE, CLEAN]
    if tta.corruption not in allowed:
        raise InputError(registry.unknown("tta.corruption", tta.corruption, allowed))
    if tta.corruption != CLEAN and objective.records != "image":
        raise InputError(
            f"tta.corruption={tta.corruption}: corruptions are for images, not for model.task="
            f"{config.model.task}. Set tta.corruption=clean: the stream is then the client's own texts."
        )
    partner = registry.load("tta", tta.method, "tta.method").pairs_with
    if partner is not None and partner not in config.strategy.names:
        raise InputError(
            f"tta.method={tta.method}: the federation has to learn what it needs. Set strategy.wrap=[{partner}]."
        )


def describe(config: Config, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the summary says of the last evaluation; None without a method."""
    last = next((event for event in reversed(events) if event["event"] == "clients_evaluated"), None)
    if config.tta.method is None or last is None:
        return None
    passes = len(CORRUPTIONS) if config.tta.corruption == SEQUENCE else 1  # of the held-out records
    clients = {
        client: {
            "stream": SEQUENCE if config.tta.corruption == SEQUENCE else corruptions(config, client)[0],
            "records": int(result["num-examples"]),
            "rows": int(result["num-examples"]) * passes,
            "accuracy": result["accuracy"],
            "source_accuracy": result["tta_source_accuracy"],
            "tta_accuracy": result["tta_accuracy"],
        }
        for client, result in last["clients"].items()
        if "tta_accuracy" in result
    }
    if not clients:
        return None
    keys = ("accuracy", "source_accuracy", "tta_accuracy")
    means = mean_over_clients([({key: row[key] for key in keys}, row["records"]) for row in clients.values()])
    found = {
        "method": config.tta.method,
        "severity": config.tta.severity,
        "round": last["round"],
        **means,
        "clients": clients,
    }
    return {**found, **lead.gains(found)}


def _make_named(config: Config, deployed: Deployed, seed: int) -> TTAMethod:
    assert config.tta.method is not None
    return make(config.tta.method, deployed, config.tta.options, seed)


def _update_state(now: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """An old state with what `prepare` found now."""
    state = {**old, "prepared": now["prepared"], "ready": now["ready"]}
    return {**state, "base": _update_state(now["base"], old["base"])} if "base" in old else state
