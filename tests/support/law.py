"""The law of private clients as a check: what a client sends is a function of request, config, policy and ledger, plus
noised sums that are in the ledger. It is held by asking two sites that differ in one record the same things.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import hostile
from support.classified import ASKED, NEXT_TOKEN
from support.hostile import Site
from support.hostile_stages import converse

CLIENTS = (
    {},
    {"lr": 1e30},
    {"lr": 1e-30},
    {"local_steps": 1},
    {"optimizer": "adamw", "lr": 0.5},
    {"momentum": 1.0, "weight_decay": 1e20},
)
CLIPS = ({}, {"clip": 1e-6}, {"clip": 1e6}, {"noise_multiplier": 1e-3}, {"noise_multiplier": 1e3})
SUMMED = ("fedit", "fedsa", "prox", "rolora", "scaffold")  # strategies that need sums only
KEPT = ("tent", "em_prior", "t3a", "eata", "sar", "roid")  # methods that can go on from the evaluation before
KINDS = {"training": 8, "sums": 3, "scoring": 3, "test-time": 3, "stages": 4}  # kind of request -> its weight
NAMED = ("Refused", "RunError", "BudgetExhausted", "Failed")  # errors that may be told
Play = Callable[[Site], list[Any]]


def kinds(count: int, seed: int = 0) -> list[str]:
    """Kinds of requests, as often as they weigh."""
    return random.Random(seed).choices(list(KINDS), list(KINDS.values()), k=count)


def case(models: dict[str, Any], folder: Path, kind: str, seed: int) -> tuple[list[Site], Play]:
    """Two sites whose records differ in one, and what they are asked: as good as the seed makes it."""
    draw = random.Random(f"{kind} {seed}")
    base = draw.choice([name for name in sorted(hostile.RECORDS) if kind != "sums" or name != "llama"])
    strategy = draw.choice(
        {"sums": ["tasks"], "stages": SUMMED}.get(kind)
        or [name for name in sorted(hostile.STRATEGIES) if name != "tasks" or base != "llama"]
    )
    client = draw.choice(CLIENTS)
    if strategy == "scaffold":
        client = {**client, "optimizer": "sgd", "momentum": 0.0}
    scored = kind in ("scoring", "test-time")
    privacy = {**draw.choice(CLIPS), "release_metrics": (scored and draw.random() < 0.9) or draw.random() < 0.2}
    sections: dict[str, Any] = {"client": client, "privacy": privacy}
    if kind == "stages":
        sections["secagg"] = {"enabled": True, "clip": draw.choice((1.0, 1e-6, 1e6))}
    if kind == "test-time":
        method = draw.choice(NEXT_TOKEN if base == "llama" else ASKED)
        sections["tta"] = {
            "method": method,
            "batch_size": draw.choice((1, 4, 32)),
            "keep": method in KEPT and draw.random() < 0.5,
        }
    extreme, count = draw.choice(sorted(hostile.RECORDS[base])), 1 if draw.random() < 0.3 else hostile.COUNT
    sites = []
    for name, what in (("plain", None), ("other", extreme)):
        own, held = hostile.data(base, what), hostile.data(base, what, count if scored else hostile.COUNT)
        sites.append(Site(base, models[base], folder / f"{kind}-{seed}-{name}", strategy, own, held, **sections))
    return sites, _play(sites[0], kind, draw, seed)


def _play(site: Site, kind: str, draw: random.Random, seed: int) -> Play:
    message = {"training": "train", "sums": "query.sums", "stages": "train"}.get(kind, "evaluate")
    number = draw.randint(0, 3)
    sent = site.request(message, number)
    if kind == "stages":
        return lambda asked: converse(asked, sent, number, random.Random(seed))
    if draw.random() < (0.9 if kind == "training" else 0.6):
        sent = hostile.spoiled(*sent, draw)
    return lambda asked: [(message, asked.answer(message, *sent))]


def require(models: dict[str, Any], folder: Path, kind: str, seed: int) -> list[str]:
    """Ask both sites twice and compare all that they say, and their ledgers.

    Returns:
        The status of each answer.

    Raises:
        AssertionError: an answer depends on a record, names one, or is in no ledger.
    """
    sites, play = case(models, folder, kind, seed)
    one, other = ([(play(site), site.entries()) for _ in range(2)] for site in sites)
    assert one == other, (kind, seed)
    (answers, entries), (again, after) = one
    assert entries == after, f"{kind} {seed}: the same request again costs nothing"
    assert kind == "stages" or answers == again, (kind, seed)
    for message, (status, *said) in answers:
        if status == "error":
            assert any(f"{name}'>:<" in said[1] for name in NAMED), (kind, seed, said)
        if message in ("train", "query.sums", 2) and (status == "ok" or "Failed'>:<" in said[1]):
            assert entries, f"{kind} {seed}: what left is in the ledger"
    return [status for _, (status, *_) in answers]
