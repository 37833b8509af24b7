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

from fedpeft.clients.sequence import scale_to_unit
from fedpeft.continual import matrix
from fedpeft.continual.body import only_classes
from fedpeft.continual.head import Head
from fedpeft.data.encode import Encoded
from fedpeft.run.world import World
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.sequence import exchange
from fedpeft.strategies.sequence.base import KEEP, NEW, PAST, add_tensors
from fedpeft.strategies.sequence.build import head_needs_sums, make_head
from fedpeft.strategies.sequence.sequence import TASK, TaskSequence, find_sequence

ROWS, SUMS = f"{KEEP}rows", f"{KEEP}sums|"
Record = Callable[[dict[str, Any]], None]
Ask = Callable[[int, str, str, AdapterState, dict[str, tuple[int, ...]]], exchange.Answers]  # round, what, view, ...


def run(
    world: World,
    server: ServerState,
    play: Callable[[ServerState, int], ServerState],
    ask: Ask,
    record: Record,
    after_round: Callable[[ServerState], None],
) -> ServerState:
    """Run what is left of the sequence.

    Args:
        play: the rounds from a state to the end of one, by number.
        ask: clients for sums, as `exchange.ask_for_sums` from its argument `number` on.
    """
    sequence = require_sequence(world.strategy)
    while not is_complete(world, server):
        done = len(server.numbers.get(ROWS, []))
        if sequence.begun(server) < done:
            server = begin_task(world, ask, sequence, server, done)
        server = play(server, (done + 1) * sequence.curriculum.rounds)
        server = close_task(world, ask, sequence, server, done, record)
        # A second checkpoint of the same round: a kill before it asks for the sums again, one after it does not.
        after_round(server)
    return server


def find_unfinished(server: ServerState) -> Callable[[dict[str, Any]], bool]:
    """Which events of a record the state does not know: they will come again.

    Those after a task's rounds, until the task is finished; sketches of a task's records that are for the next one,
    until that has begun. A sketch for the task itself stays: it is recorded under its first round, as rounds are.
    """
    done, begun = len(server.numbers.get(ROWS, [])), server.numbers.get(TASK, -1)

    def again(event: dict[str, Any]) -> bool:
        if event["event"] not in ("sums", "sums_missing", "task") or event.get("sums") == NEW:
            return False
        return bool(event["task"] >= (begun if event.get("sums") == PAST else done))

    return again


def is_complete(world: World, server: ServerState) -> bool:
    """Whether every task has been learned and counted."""
    return len(server.numbers.get(ROWS, [])) == len(require_sequence(world.strategy).curriculum.groups)


def begin_task(world: World, ask: Ask, sequence: TaskSequence, server: ServerState, task: int) -> ServerState:
    """Ask for the sketches that the body wants, and begin the task."""
    body, sketches = sequence.body, {}
    for what in body.sketches:
        if what == PAST and task == 0:
            continue
        round_number = server.round if what == PAST else server.round + 1  # says whose records: those of its task
        answers = ask(round_number, what, "online", server.adapter, body.describe_sketch(server.adapter))
        # As the round's own aggregate weighs clients.
        uniform = world.config.strategy.weighting == "uniform"
        sketches[what] = body.merge_sketches(
            [tensors for tensors, _ in answers], [1.0 if uniform else weight for _, weight in answers]
        )
    return sequence.begin(server, task, sketches)


def close_task(
    world: World, ask: Ask, sequence: TaskSequence, server: ServerState, task: int, record: Record
) -> ServerState:
    """End the task, fit the head on all clients' sums, and count right answers on every task's test records."""
    server = sequence.body.end(server, task)
    if head_needs_sums(world.config):
        views = sequence.body.views(server)
        memory = dict(server.memory)
        nothing = new_head(world).statistics(torch.zeros(0, world.local.model.base.width), torch.zeros(0).long())
        form = {key: tuple(value.shape) for key, value in nothing.items()}
        for view, adapter in views.items():
            answers = ask(server.round, "head", view, adapter, form)
            for key, value in add_tensors(tensors for tensors, _ in answers).items():
                # A view that is new has had the features of the first one until now, and so its sums.
                old = memory.get(f"{SUMS}{view}|{key}", server.memory.get(f"{SUMS}online|{key}"))
                memory[f"{SUMS}{view}|{key}"] = value if old is None else old + value
        server = replace(server, memory=memory)
    right, count = count_right(world, sequence, server, task)
    rows = [*server.numbers.get(ROWS, []), right]
    record(
        {
            "event": "task",
            "round": server.round,
            "task": task,
            "classes": sequence.curriculum.classes(task),
            "right": right,
            "count": count,
        }
    )
    # The row says that the task is closed, so it comes last: what was begun without it is done again.
    return replace(server, numbers={**server.numbers, ROWS: rows})


def score(world: World, server: ServerState) -> dict[str, float]:
    """Accuracy over the test records of all classes seen so far, by the trained head: others are fitted later."""
    sequence = require_sequence(world.strategy)
    seen = sequence.curriculum.seen(sequence.curriculum.task(max(server.round, 1)))
    data = world.test_encoded
    mine = torch.isin(data.labels, torch.tensor(seen)).nonzero().flatten().numpy()
    if len(mine) == 0:
        return {"accuracy": float("nan"), "loss": float("nan"), "test_records": 0, "classes": len(seen)}
    right, loss = 0, 0.0
    # An ensemble's scores are no distribution. Asked once: views of a merging body are merged and folded at every look.
    single = len(sequence.body.views(server)) == 1
    for scores, labels in score_batches(world, sequence, server, data.view(mine), seen, None):
        right += int((scores.argmax(-1) == labels).sum())
        if single:
            loss += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
    return {
        "accuracy": right / len(mine),
        "loss": loss / len(mine) if single else float("nan"),
        "test_records": len(mine),
        "classes": len(seen),
    }


def count_right(world: World, sequence: TaskSequence, server: ServerState, task: int) -> tuple[list[int], list[int]]:
    """Right answers, and records, on every task's test set; classes seen so far compete."""
    seen, data = sequence.curriculum.seen(task), world.test_encoded
    heads = fit_heads(world, sequence, server, seen)
    right, count = [], []
    for other in range(len(sequence.curriculum.groups)):
        part = data.view(sequence.curriculum.of(data.labels.numpy(), other))
        right.append(
            sum(
                int((scores.argmax(-1) == labels).sum())
                for scores, labels in score_batches(world, sequence, server, part, seen, heads)
            )
        )
        count.append(len(part))
    return right, count


def fit_heads(world: World, sequence: TaskSequence, server: ServerState, seen: list[int]) -> dict[str, Head] | None:
    """The head of each view from the sums in the state; None where the trained head answers."""
    if not head_needs_sums(world.config):
        return None
    heads = {}
    for view in sequence.body.views(server):
        made = new_head(world)
        prefix = f"{SUMS}{view}|"
        made.update(
            {key.removeprefix(prefix): value for key, value in server.memory.items() if key.startswith(prefix)}, seen
        )
        heads[view] = made
    return heads


def new_head(world: World) -> Head:
    """The config's head, before it has seen a record."""
    return make_head(world.config, len(world.train.label_names), world.local.model.base.width)


def score_batches(
    world: World,
    sequence: TaskSequence,
    server: ServerState,
    data: Encoded,
    seen: list[int],
    heads: dict[str, Head] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Scores [N, C] and labels [N] by batches."""
    model, by_view = world.local.model, {}
    # View by view and not batch by batch, so that each adapter is written into the model once.
    for view, adapter in sequence.body.views(server).items():
        model.write(adapter)
        by_view[view] = [
            (_answer_head(world, heads, view, found, logits, seen), labels)
            for found, logits, labels in model.features(data)
        ]
    first = next(iter(by_view.values()))
    return [
        (sequence.body.combine({view: parts[number][0] for view, parts in by_view.items()}), labels)
        for number, (_, labels) in enumerate(first)
    ]


def _answer_head(
    world: World, heads: dict[str, Head] | None, view: str, found: Tensor, logits: Tensor, seen: list[int]
) -> Tensor:
    if heads is None:
        return only_classes(logits, seen)
    private = world.config.continual.statistics_noise is not None
    # As the sums were taken, of which the head is fitted.
    return heads[view].scores(scale_to_unit(found) if private else found, None)


def summarise(world: World, server: ServerState) -> dict[str, Any] | None:
    """What the summary says of the sequence: the matrix of right answers, test counts, and all metrics from both."""
    sequence = find_sequence(world.strategy)
    if sequence is None:
        return None
    right = server.numbers.get(ROWS, [])
    labels = world.test_encoded.labels.numpy()
    count = [len(sequence.curriculum.of(labels, task)) for task in range(len(sequence.curriculum.groups))]
    return {
        "body": world.config.continual.body,
        "head": world.config.continual.head,
        "tasks": [
            [world.train.label_names[label] for label in sequence.curriculum.classes(task)]
            for task in range(len(sequence.curriculum.groups))
        ],
        "right": right,
        "count": count,
        "metrics": matrix.summary(right, count) if len(right) == len(count) else None,
    }


def require_sequence(strategy: FederatedStrategy) -> TaskSequence:
    """The sequence of a strategy that has one: for code that runs only where it does."""
    found = find_sequence(strategy)
    assert found is not None
    return found
