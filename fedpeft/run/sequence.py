"""A federated run over a sequence of tasks: rounds, and between tasks the heads and the rows of the accuracy matrix.

    for each task:  sketch of the clients' gradients, where the body wants one;  the body begins the task
                    its rounds, as in any run
                    sums for the head, from every client;  the head is fitted;  right answers on every task's test set

What a finished task leaves (the head's sums, its row) is part of the server's state, so a resumed run goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedpeft.clients.sequence import unit
from fedpeft.continual import matrix
from fedpeft.continual.body import only
from fedpeft.continual.head import Head
from fedpeft.data.encode import Encoded
from fedpeft.run.world import World
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.sequence import exchange
from fedpeft.strategies.sequence.base import KEEP
from fedpeft.strategies.sequence.build import fits, head
from fedpeft.strategies.sequence.sequence import Learning, learning_of

ROWS, SUMS = f"{KEEP}rows", f"{KEEP}sums|"
Record = Callable[[dict[str, Any]], None]
Ask = Callable[[int, str, str, AdapterState, dict[str, tuple[int, ...]]], exchange.Answers]  # round, what, view, ...


def run(here: World, server: ServerState, play: Callable[[ServerState, int], ServerState], ask: Ask, record: Record,
        after_round: Callable[[ServerState], None]) -> ServerState:
    """Run what is left of the sequence.

    Args:
        play: the rounds from a state to the end of one, by number.
        ask: clients for sums, as `exchange.sums` from its argument `number` on.
    """
    learning = required(here.strategy)
    while not complete(here, server):
        done = len(server.numbers.get(ROWS, []))
        if learning.begun(server) < done:
            server = begin(here, ask, learning, server, done)
        server = play(server, (done + 1) * learning.curriculum.rounds)
        server = close(here, ask, learning, server, done, record)
        after_round(server)
    return server


def unfinished(server: ServerState) -> Callable[[dict[str, Any]], bool]:
    """Which events of a record are of a task that the state does not hold as finished: they will come again."""
    done = len(server.numbers.get(ROWS, []))
    return lambda event: event["event"] in ("sums", "sums_missing", "task") and event["task"] >= done \
        and event.get("sums") != "sketch"


def complete(here: World, server: ServerState) -> bool:
    """Whether every task has been learned and counted."""
    return len(server.numbers.get(ROWS, [])) == len(required(here.strategy).curriculum.groups)


def begin(here: World, ask: Ask, learning: Learning, server: ServerState, task: int) -> ServerState:
    """Ask for a sketch where the body wants one, and begin the task."""
    found: dict[str, Tensor] = {}
    if learning.body.sketches:
        section, sites = learning.body.config, server.adapter
        form: dict[str, tuple[int, ...]] = {
            site: (sites[f"{site}/A"].shape[1] if section.side == "in" else len(sites[f"{site}/B"]), section.r2)
            for site in sites.lora_sites()}
        answers = ask(server.round + 1, "sketch", "online", sites, form)
        found = exchange.sketch(answers, here.config.strategy.weighting == "uniform")
    return learning.begin(server, task, found)


def close(here: World, ask: Ask, learning: Learning, server: ServerState, task: int, record: Record) -> ServerState:
    """Fit the head on all clients' sums, and count right answers on every task's test records."""
    if fits(here.config):
        views = learning.body.views(server)
        memory = dict(server.memory)
        nothing = unfitted(here).statistics(torch.zeros(0, here.local.model.base.width), torch.zeros(0).long())
        form = {key: tuple(value.shape) for key, value in nothing.items()}
        for view, adapter in views.items():
            answers = ask(server.round, "head", view, adapter, form)
            for key, value in exchange.head_sums(answers).items():
                # A view that is new has had the features of the first one until now, and so its sums.
                old = memory.get(f"{SUMS}{view}|{key}", server.memory.get(f"{SUMS}online|{key}"))
                memory[f"{SUMS}{view}|{key}"] = value if old is None else old + value
        server = replace(server, memory=memory)
    right, count = counts(here, learning, server, task)
    rows = [*server.numbers.get(ROWS, []), right]
    record({"event": "task", "round": server.round, "task": task, "classes": learning.curriculum.classes(task),
            "right": right, "count": count})
    return replace(server, numbers={**server.numbers, ROWS: rows})


def score(here: World, server: ServerState) -> dict[str, float]:
    """Accuracy over the test records of all classes seen so far, by the trained head: others are fitted later."""
    learning = required(here.strategy)
    seen = learning.curriculum.seen(learning.curriculum.task(max(server.round, 1)))
    data = here.test_encoded
    mine = torch.isin(data.labels, torch.tensor(seen)).nonzero().flatten().numpy()
    if len(mine) == 0:
        return {"accuracy": float("nan"), "loss": float("nan"), "test_records": 0, "classes": len(seen)}
    right, loss = 0, 0.0
    for scores, labels in scored(here, learning, server, data.view(mine), seen, None):
        right += int((scores.argmax(-1) == labels).sum())
        if len(learning.body.views(server)) == 1:
            loss += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
    single = len(learning.body.views(server)) == 1  # an ensemble's scores are no distribution
    return {"accuracy": right / len(mine), "loss": loss / len(mine) if single else float("nan"),
            "test_records": len(mine), "classes": len(seen)}


def counts(here: World, learning: Learning, server: ServerState, task: int) -> tuple[list[int], list[int]]:
    """Right answers, and records, on every task's test set; classes seen so far compete."""
    seen, data = learning.curriculum.seen(task), here.test_encoded
    heads = fitted(here, learning, server, seen)
    right, count = [], []
    for other in range(len(learning.curriculum.groups)):
        part = data.view(learning.curriculum.of(data.labels.numpy(), other))
        right.append(sum(int((scores.argmax(-1) == labels).sum())
                         for scores, labels in scored(here, learning, server, part, seen, heads)))
        count.append(len(part))
    return right, count


def fitted(here: World, learning: Learning, server: ServerState, seen: list[int]) -> dict[str, Head] | None:
    """The head of each view from the sums in the state; None where the trained head answers."""
    if not fits(here.config):
        return None
    heads = {}
    for view in learning.body.views(server):
        made = unfitted(here)
        prefix = f"{SUMS}{view}|"
        made.update({key.removeprefix(prefix): value for key, value in server.memory.items()
                     if key.startswith(prefix)}, seen)
        heads[view] = made
    return heads


def unfitted(here: World) -> Head:
    """The config's head, before it has seen a record."""
    return head(here.config, len(here.train.label_names), here.local.model.base.width)


def scored(here: World, learning: Learning, server: ServerState, data: Encoded, seen: list[int],
           heads: dict[str, Head] | None) -> list[tuple[Tensor, Tensor]]:
    """Scores [N, C] and labels [N] by batches."""
    model, by_view = here.local.model, {}
    for view, adapter in learning.body.views(server).items():
        model.write(adapter)
        by_view[view] = [(_answer(here, heads, view, found, logits, seen), labels)
                         for found, logits, labels in model.features(data)]
    first = next(iter(by_view.values()))
    return [(learning.body.combine({view: parts[number][0] for view, parts in by_view.items()}), labels)
            for number, (_, labels) in enumerate(first)]


def _answer(here: World, heads: dict[str, Head] | None, view: str, found: Tensor, logits: Tensor, seen: list[int]
            ) -> Tensor:
    if heads is None:
        return only(logits, seen)
    private = here.config.continual.statistics_noise is not None
    return heads[view].scores(unit(found) if private else found, None)


def section(here: World, server: ServerState) -> dict[str, Any] | None:
    """What the summary says of the sequence: the matrix of right answers, test counts, and all metrics from both."""
    learning = learning_of(here.strategy)
    if learning is None:
        return None
    right = server.numbers.get(ROWS, [])
    labels = here.test_encoded.labels.numpy()
    count = [len(learning.curriculum.of(labels, task)) for task in range(len(learning.curriculum.groups))]
    return {"body": here.config.continual.body, "head": here.config.continual.head,
            "tasks": [[here.train.label_names[label] for label in learning.curriculum.classes(task)]
                      for task in range(len(learning.curriculum.groups))],
            "right": right, "count": count,
            "metrics": matrix.summary(right, count) if len(right) == len(count) else None}


def required(strategy: FederatedStrategy) -> Learning:
    found = learning_of(strategy)
    assert found is not None
    return found

