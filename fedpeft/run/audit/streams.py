"""Noise, samples and masks under `privacy.randomness=os`, as sites draw them whatever a simulation's config says.

The same round is run twice in this process and in two others that are forked from it, so that whatever a generator of
this program's own holds, both go on from. Nothing may come twice.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedpeft.clients.guard import Guard
from fedpeft.errors import RunError
from fedpeft.privacy.audit import Check
from fedpeft.privacy.audit_noise import find_alike
from fedpeft.privacy.tails import alarm_limit, worst_of
from fedpeft.run.audit.rounds_seen import Rounds, Way
from fedpeft.run.world import World

T = TypeVar("T")
PATIENCE_S, SAMPLES = 120.0, 4096


def checks(here: World, clients: list[str], engines: list[str], folder: Path) -> list[Check]:
    """Whether clients, engines, processes and runs draw noise, samples and masks from streams of their own.

    Raises:
        RunError: a forked process did not answer.
    """
    config = replace(here.config, privacy=replace(here.config.privacy, randomness="os"))
    rounds = Rounds(replace(here, config=config), clients, engines, folder)
    still, drawing = Way("still", clients, 1, {"sample_rate": 0.0}), Way("drawing", clients, 1, {})

    def told(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise and samples, a row for each engine and client, [rows, values]."""
        seen = [one for engine in engines for one in rounds.run(engine, still, number, config.run.seed)[0]]
        guard = Guard(config, folder / "source", "audit")
        # At a half each record's draw tells most of its stream.
        plan = replace(rounds.plans[clients[0]], sample_rate=0.5)
        samples = -np.ones((len(clients), SAMPLES), dtype=np.float32)
        for row, client in zip(samples, clients, strict=True):
            row[plan.sample(SAMPLES, guard.source(client, 1))] = 1.0
        return np.stack([rounds.noise_of(one, still).numpy().ravel() for one in seen]), samples

    # A forked process cannot use a device that its parent has opened.
    on_cpu = next(iter(here.local.model.parameters.values())).device.type == "cpu"
    answers = [told(0), told(1), *((in_child(told, number) if on_cpu else told(number)) for number in (2, 3))]
    if any(answer is None for answer in answers):
        raise RunError("a forked process did not answer; the audit cannot compare streams.")
    seen = [rounds.run(engine, drawing, number, config.run.seed)[0] for engine in engines for number in (4, 5)]
    masks = [{step.mask for one in run for step in one.steps if step.mask is not None} for run in seen]
    where = "two processes and this one twice" if on_cpu else "this process four times (no forks beside a device)"
    found = [
        _compare_parts(name, [answer[place] for answer in answers if answer], where)
        for place, name in enumerate(("streams of noise", "streams of samples"))
    ]
    repeated = sum(map(len, masks)) - len(set().union(*masks))
    return [
        *found,
        Check(
            "streams of masks",
            float(repeated),
            0.0,
            0.0,
            "seeds of dropout's masks that came twice, with privacy.randomness=os",
        ),
    ]


def _compare_parts(name: str, parts: list[np.ndarray], where: str) -> Check:
    rows = torch.from_numpy(np.concatenate(parts))
    value, pairs = find_alike(rows)
    return Check(
        name,
        worst_of([value]),
        -alarm_limit(pairs),
        alarm_limit(pairs),
        f"inner product of two of {len(rows)}, with privacy.randomness=os, in {where}; in standard errors",
    )


def in_child(work: Callable[[int], T], number: int) -> T | None:
    """What `work(number)` returns in a forked process; None if it does not answer."""
    # Not spawned: it has to go on from the state of every generator that is here.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, work, number))
    child.start()
    # This end too, or a child that dies would be waited for instead of read as an end of file.
    sender.close()
    try:
        found: T | None = receiver.recv() if receiver.poll(PATIENCE_S) else None
    except EOFError:
        found = None
    if found is None:
        child.kill()
    child.join()
    return found


def _send_result(sender: Connection, work: Callable[[int], T], number: int) -> None:
    torch.set_num_threads(1)  # threads are not inherited
    sender.send(work(number))
