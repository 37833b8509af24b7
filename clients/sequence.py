"""A client's part in learning a sequence of tasks: which of its records a round trains, and the sums that heads need.

Which classes a round is about a client reads off its own config; a server that says something else is refused. Of its
own records it takes those; where the body replays, every batch is half new and half old, an old record drawn by its
task (all earlier tasks alike) and then within the task. What was shown stays on the client's disk; sums over records go
out only where the config's head or body asks for them, under DP clipped and noised, and in the ledger.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.guard import hash_request, name_release
from fedpeft.clients.spending import Spending, hide_spending
from fedpeft.config import ClientConfig
from fedpeft.continual.head import Head
from fedpeft.data.encode import Encoded
from fedpeft.errors import RunError
from fedpeft.privacy.ledger import TASK
from fedpeft.privacy.mechanism import add_noise, clipped_sum
from fedpeft.privacy.noise import Randomness
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions, Lesson
from fedpeft.strategies.sequence.build import head_needs_sums, make_head
from fedpeft.strategies.sequence.sequence import TaskSequence

if TYPE_CHECKING:
    from fedpeft.clients.local import Local

log = logging.getLogger("fedpeft")
JOINED = "task:joined"  # kept at the client: tasks that it took part in
BOUND = math.sqrt(3.0)  # norm of (one-hot, feature, feature x feature) at unit norm: what LDA sums for a record


def require_own_task(sequence: TaskSequence | None, told: Instructions) -> None:
    """Raise RunError unless the round is about what it is about by the client's own config.

    That decides which records are read and whose account pays, so it is not the server's to say.
    """
    lesson = None if sequence is None else sequence.make_lesson(sequence.curriculum.task(max(told.round, 1)))
    if told.learn != lesson:
        raise RunError(
            f"round {told.round}: the server's task ({_describe_lesson(told.learn)}) is not that of this client's "
            f"config ({_describe_lesson(lesson)})."
        )


def _describe_lesson(lesson: Lesson | None) -> str:
    return "no sequence of tasks" if lesson is None else f"task {lesson.task}, classes {list(lesson.classes)}"


def competing_classes(told: Instructions) -> tuple[int, ...] | None:
    """Classes that compete in the loss of a round; None is all."""
    return None if told.learn is None else told.learn.compete


def account_of_task(client: str, told: Instructions) -> str:
    """The name of a client's ledger in a round.

    Each task has its own: a record takes part in the rounds of its own task only, so what tasks cost does not add up.
    """
    return client if told.learn is None else f"{client}{TASK}{told.learn.task}"


def records_of_task(data: Encoded, told: Instructions, client: str) -> Encoded:
    """The client's records of the round's task, or all where there is no sequence.

    Raises:
        RunError: it has none.
    """
    return data if told.learn is None else _require_some(select_task(data, told), told.learn, client)


def records_of_seen(data: Encoded, told: Instructions, client: str) -> Encoded:
    """The same of all classes seen so far."""
    return data if told.learn is None else _require_some(_of_classes(data, told.learn.seen), told.learn, client)


def select_task(data: Encoded, told: Instructions) -> Encoded:
    """The records of the round's task, which may be none, or all where there is no sequence."""
    return data if told.learn is None else _of_classes(data, told.learn.classes)


def _require_some(chosen: Encoded, lesson: Lesson, client: str) -> Encoded:
    if len(chosen) == 0:
        raise RunError(f"{client} has no records of task {lesson.task}, so it sits this round out.")
    return chosen


def _of_classes(data: Encoded, classes: tuple[int, ...]) -> Encoded:
    return data.view(np.flatnonzero(np.isin(data.labels.numpy(), classes)))


def mix_replay(data: Encoded, told: Instructions, config: ClientConfig, seed: int) -> Encoded | None:
    """The rows of a round's batches in order, each batch half new and half old; None where nothing is replayed.

    An odd batch has one more new record. New records come in shuffled passes.
    """
    learn = told.learn
    if learn is None or not learn.replay or learn.task == 0:
        return None
    labels, rng = data.labels.numpy(), seeds.numpy_generator(seed, "replay")
    new = np.flatnonzero(np.isin(labels, learn.classes))
    # By task: each earlier task has the same share of a batch, however many records it left.
    old = [found for group in learn.groups[:-1] if len(found := np.flatnonzero(np.isin(labels, group)))]
    if not old:
        log.info("task %s: a client has no records of earlier tasks, so it replays none", learn.task)
        return None
    size = config.batch_size
    steps = config.local_steps or -(-len(new) // size) * (config.local_epochs or 1)
    fresh = -(-size // 2)
    passes = [rng.permutation(new) for _ in range(-(-steps * fresh // len(new)))]
    # Enough whole passes for all steps, so that every new record is seen before one comes again.
    line = iter(np.concatenate(passes))
    order = []
    for _ in range(steps):
        order += [next(line) for _ in range(fresh)]
        order += [rng.choice(old[rng.integers(len(old))]) for _ in range(size - fresh)]
    return data.view(np.array(order))


def mark_task(kept: dict[str, Tensor], told: Instructions, client: str) -> tuple[dict[str, Tensor], int]:
    """What a client keeps to know the tasks that it took part in, and how many it missed before; it says so."""
    learn = told.learn
    if learn is None:
        return {}, 0
    before = set(kept[JOINED].tolist()) if JOINED in kept else set()
    now = learn.task
    missed = sorted(set(range(now)) - before)
    if missed and now not in before:
        log.info("%s missed task %s; it goes on with what the server has", client, ", ".join(map(str, missed)))
    return {JOINED: torch.tensor(sorted(before | {now}))}, len(missed)


def answer_sums(
    local: Local, client: str, received: AdapterState, told: Instructions
) -> tuple[AdapterState, dict[str, float]]:
    """Sums over a task's records for the config's head at the received model, or a sketch for its body.

    Which of them the server asks for with `told.sums`; whether it may, the client's own config says.

    Raises:
        RunError: the config has no such head or body, or no records of the task.
    """
    config, model = local.config, local.model
    private, sketched = local.guard.private, told.sums != "head"
    if sketched and (private or local.sequence is None or told.sums not in local.sequence.body.sketches):
        raise RunError(f"continual.body={config.continual.body}: this client's config sends no such sketches.")
    if not sketched and (config.continual.body is None or not head_needs_sums(config)):
        raise RunError(f"continual.head={config.continual.head}: this client's config fits no head on its records.")
    start, _ = local.compose(client, received, told, before=told.round)
    if private:
        return answer_sums_privately(local, client, received, start, told)
    data = local.records(client, told)
    model.write(start)
    weight = {"num-examples": float(len(data))}
    if sketched:
        assert local.sequence is not None
        with model.competing(competing_classes(told)):
            return AdapterState({}, extra=local.sequence.body.make_sketch(model, data)), weight
    sums = head_sums(model, make_head(config, model.base.classes, model.base.width), data)
    return AdapterState({}, extra=sums), weight


def answer_sums_privately(
    local: Local, client: str, received: AdapterState, start: AdapterState, told: Instructions
) -> tuple[AdapterState, dict[str, float]]:
    """The sums for a head, noised, once on the disk and in the ledger; a failure costs what they would have."""
    guard, store, model, number = local.guard, local.store, local.model, told.round
    noise = float(local.config.continual.statistics_noise or 0)
    # A name of its own: under the client's the store keeps the update of the same round.
    spending = Spending(
        client,
        f"{client}+sums-{told.view}",
        number,
        account_of_task(client, told),
        hash_request(received, told),
        sums=noise,
    )
    answered = store.reply(spending.kept, number, spending.request)
    with hide_spending(guard, store, spending):
        plan = spending.plan = guard.plan(client, lambda: len(local.records(client, told)))
        assert plan is not None
        if answered is None:
            guard.afford(spending.account, number, spending.request, plan, noise)
            model.write(start)
            made = make_head(local.config, model.base.classes, model.base.width)
            source = guard.source(client, number, f"sums {told.view}")
            found = private_head_sums(model, made, local.records(client, told), noise, source)
            answered = AdapterState({}, extra=found), guard.allowed(client, {})
            # On the disk before it is counted: after a kill the same noise goes out, not a second draw.
            store.save_reply(spending.kept, number, spending.request, *answered)
        elif not answered[0].payload:
            spending.fail(guard)
        update, metrics = answered
        guard.spend(spending.account, number, name_release(spending.request, update), plan, noise)  # then it may leave
        return update, guard.allowed(client, metrics)


def head_sums(model: Adapted, head: Head, data: Encoded) -> dict[str, Tensor]:
    """Sums of a head's statistics over records, in float64."""
    total: dict[str, Tensor] = {}
    for features, _, labels in model.features(data):
        for key, value in head.statistics(features, labels).items():
            total[key] = total[key] + value if key in total else value
    return total


def private_head_sums(model: Adapted, head: Head, data: Encoded, noise: float, source: Randomness) -> dict[str, Tensor]:
    """The same sums under the Gaussian mechanism.

    Features are scaled to norm 1, and a record's statistics, all tensors together, are clipped to norm BOUND: adding or
    removing a record moves the sums by at most that, and the noise has standard deviation `noise` x BOUND.
    """
    # The shapes, also where the client has no record: then noise alone goes out.
    nothing = head.statistics(torch.zeros(0, head.width), torch.zeros(0, dtype=torch.int64))
    total = _flatten_statistics(nothing)
    for features, _, labels in model.features(data):
        for row in range(len(labels)):  # one at a time: statistics of wide features are large
            statistics = head.statistics(scale_to_unit(features[row : row + 1]), labels[row : row + 1])
            total += clipped_sum(_flatten_statistics(statistics)[None], BOUND)
    sizes = [value.numel() for value in nothing.values()]
    noised = add_noise(total, noise, BOUND, source).split(sizes)
    return {key: part.view(value.shape) for (key, value), part in zip(nothing.items(), noised, strict=True)}


def _flatten_statistics(statistics: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in statistics.values()])


def scale_to_unit(features: Tensor) -> Tensor:
    """Features scaled to norm 1."""
    return torch.nn.functional.normalize(features, dim=1)
