"""The audit judges a round's ledger, reply and masks from outside (`watched`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedpeft.clients.optimizers.base import make_layout, make_optimizer, set_rate, settle
from fedpeft.config import ClientConfig, Config
from fedpeft.privacy.audit import Check
from fedpeft.privacy.plan import Plan
from fedpeft.run.audit.watched import Seen
from fedpeft.state import AdapterState

FOLLOWS = 1e-3  # of how far an update moves: rounding of two optimizers' steps


def judge_rounds(seen: Sequence[Seen], plans: dict[str, Plan], config: Config) -> list[Check]:
    """Checks of many rounds."""
    taken = sum(len(one.steps) for one in seen)
    reserved = sum(entry.steps for one in seen for entry in one.entries)
    late = sum(one.name not in {entry.request for entry in one.entries} for one in seen)
    again = [one.again for one in seen if one.again is not None]
    twice = sum(
        len(other.steps) + abs(len(other.entries) - 1) + (other.update.sha256() != one.update.sha256())
        for one, other in ((one, one.again) for one in seen)
        if other is not None
    )
    return [
        Check("ledger", float(reserved), float(taken), float(taken), "steps reserved; allowed: noisy steps taken"),
        Check(
            "ledger entries",
            float(sum(not _is_entered(one, plans[one.client]) for one in seen)),
            0.0,
            0.0,
            f"of {len(seen)} rounds, those whose rate, noise or steps are not in it as they were",
        ),
        Check(
            "ledger comes first",
            float(late),
            0.0,
            0.0,
            f"of {len(seen)} rounds, those whose update was handed out before the ledger had it",
        ),
        Check(
            "replies are kept",
            float(sum(not _is_same_update(one) for one in seen)),
            0.0,
            0.0,
            f"of {len(seen)} rounds, those whose reply is not what a repeated request would get",
        ),
        Check("asked again", float(twice), 0.0, 0.0, f"steps, entries and changes by {len(again)} repeated requests"),
        Check(
            "update",
            max((_stray_of(one, config.client) for one in seen), default=0.0),
            0.0,
            FOLLOWS,
            "distance of an update from the same start and noised steps taken by another optimizer, over its length",
        ),
        Check(
            "what leaves",
            float(max(_count_surplus(one, config) for one in seen)),
            0.0,
            0.0,
            "tensors and metrics beside what noised steps determine",
        ),
        Check(
            "masks are fresh", float(_find_repeated(seen)), 0.0, 0.0, "seeds of dropout's masks that were there before"
        ),
    ]


def _is_entered(one: Seen, plan: Plan) -> bool:
    return [entry.release for entry in one.entries] == [(plan.sample_rate, plan.noise_multiplier, len(one.steps))]


def _is_same_update(one: Seen) -> bool:
    return one.kept is not None and replace(one.kept, sites=one.update.sites).sha256() == one.update.sha256()


def _stray_of(one: Seen, client: ClientConfig) -> float:
    """How far an update is from what the optimizer's steps lead to, from the start that the request asks for."""
    if not one.steps:
        return math.inf
    start = one.start.select(one.told.trains).tensors
    weights = nn.Parameter(_flatten_state(start, one.steps[0].before)[None])
    optimizer = make_optimizer([weights], client, make_layout(one.visit.model, start, one.start.tensors))
    begin = weights.detach().clone()
    for step, rate in zip(one.steps, one.visit.clock.rates(client, len(one.steps)), strict=True):
        if step.released.shape != weights.shape[1:]:
            return math.inf
        weights.grad = step.released.clone()[None]
        set_rate(optimizer, rate)
        optimizer.step()
    settle(optimizer)
    parts = [
        one.start.replace(
            dict(
                zip(start, value.detach().cpu().flatten().split([part.numel() for part in start.values()]), strict=True)
            )
        )
        for value in (begin, weights)
    ]
    return _relative_distance(
        one, {key: (parts[0][key].view_as(value), parts[1][key].view_as(value)) for key, value in start.items()}
    )


def _relative_distance(one: Seen, ends: dict[str, tuple[Tensor, Tensor]]) -> float:
    trained = AdapterState({key: after for key, (_, after) in ends.items()}, one.start.sites)
    visit = replace(one.visit, steps=len(one.steps))
    expected = {
        name: (torch.zeros_like(value), value)
        for half in one.halves
        for name, value in half.finish(visit, trained)[0].items()
    }
    apart, length = 0.0, 0.0
    for key, value in (*one.update.tensors.items(), *one.update.extra.items()):
        before, after = ends.get(key) or expected.get(key) or (one.start.tensors.get(key),) * 2
        if before is None or after is None or before.shape != value.shape:
            continue  # what should not be there at all is counted as such
        apart += float((value.double() - after.double()).square().sum())
        length += float((after.double() - before.double()).square().sum())
    return math.sqrt(apart / max(length, 1e-30)) if apart else 0.0


def _flatten_state(start: dict[str, Tensor], like: Tensor) -> Tensor:
    return torch.cat([value.flatten() for value in start.values()]).to(like)


def _count_surplus(one: Seen, config: Config) -> int:
    expected = set(one.start.select(one.told.uploads).tensors)
    metrics = 0 if config.privacy.release_metrics else len(set(one.metrics) - {"num-examples"})
    weight = 0 if config.privacy.release_metrics else int(one.metrics.get("num-examples") != 1.0)
    beside = set(one.update.extra) ^ (set(one.received.extra) if any(half.sends for half in one.halves) else set())
    return len(set(one.update.tensors) ^ expected) + len(beside) + metrics + weight


def _find_repeated(seen: Sequence[Seen]) -> int:
    """A cohort's clients have their masks in common; else each client's round has its own."""
    groups: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for one in seen:
        key = (one.run, one.number) if one.engine == "cohort" else (one.run, one.number, one.client)
        groups[key] |= {step.mask for step in one.steps if step.mask is not None}
    return sum(len(masks) for masks in groups.values()) - len(set().union(*groups.values()))
