"""Rounds of secure aggregation that a hostile server plays with one private site: all four stages, and what it changes.

The other clients are real members of the protocol without records; all that is sent to the site is in the server's
hand.
"""

from __future__ import annotations

import random
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict

from fedpeft.clients.secagg import FORMS, Member
from fedpeft.strategies.secagg import masking
from fedpeft.strategies.secagg.stages import KINDS, RECORD
from fedpeft.strategies.secagg.terms import Terms
from support import instructed
from support.hostile import Site, spoiled

PEERS = ("b", "c", "d")
Fields = dict[str, Any]


def converse(site: Site, sent: tuple[Any, Any], number: int, draw: random.Random) -> list[Any]:
    """The answers to a round, and at times to another try of it: the same, over fewer clients, or of another state."""
    answers = Round(site, sent, number, draw, PEERS).play()
    if draw.random() < 0.4:
        received, told = sent
        again = draw.choice((sent, sent, (received.map(lambda value: value * 0.5), told)))
        answers += Round(site, again, number, draw, draw.choice((PEERS, PEERS[:2], PEERS[1:]))).play()
    return answers


class Round:
    """One try of a round. What the server draws depends on no answer, so that two sites are asked the same."""

    def __init__(
        self, site: Site, sent: tuple[Any, Any], number: int, draw: random.Random, peers: tuple[str, ...]
    ) -> None:
        self.site, self.sent, self.number, self.draw, self.peers = site, sent, number, draw, peers
        self.plan = Terms.of(site.config)
        self.contexts = {
            name: Context(run_id=1, node_id=9, node_config={}, state=RecordDict({}), run_config={}) for name in peers
        }
        self.answers: list[Any] = []

    def play(self) -> list[Any]:
        public = {name: self.member(name, 0).advertise()[RECORD] for name in self.peers}
        public["a"] = self.ask(0, {}) or {"mask": masking.keypair()[1], "box": masking.keypair()[1]}
        near = {name: [other for other in sorted(public) if other != name] for name in public}
        asked = {
            name: {
                "names": others,
                "masks": [public[other]["mask"] for other in others],
                "boxes": [public[other]["box"] for other in others],
            }
            for name, others in near.items()
        }
        sealed = [
            self.member(name, 1, asked[name]).share()[RECORD]["sealed"][near[name].index("a")] for name in self.peers
        ]
        self.ask(1, asked["a"])
        silent = [name for name in self.peers if self.draw.random() < 0.2][:1]
        self.ask(2, {"names": list(self.peers), "sealed": sealed})
        self.ask(3, {"uploaded": ["a", *(name for name in self.peers if name not in silent)], "silent": silent})
        return self.answers

    def member(self, name: str, stage: int, asked: Fields | None = None) -> Member:
        return Member(
            self.contexts[name], name, stage, {"round": self.number, **(asked or {})}, self.plan, self.site.local.store
        )

    def ask(self, stage: int, fields: Fields) -> Fields | None:
        """Ask for a stage, before it at times for one that is not due or with something wrong; what came of it."""
        draw, found = self.draw, None
        honest = {**fields, "round": self.number}
        tries = [(stage, honest, self.sent)]
        if draw.random() < 0.35:
            tries.insert(0, (stage, changed(dict(honest), stage, draw), self.sent))
        if draw.random() < 0.15:
            tries.insert(0, (draw.randrange(4), honest, self.sent))
        if stage == 2 and draw.random() < 0.4:
            tries.insert(0, (stage, honest, spoiled(*self.sent, draw)))
        for kind, asked, (received, told) in tries:
            parts = instructed.content(received, told) if kind == 2 else RecordDict({})
            reply = self.site.ask(KINDS[kind], RecordDict({**parts, RECORD: ConfigRecord(asked)}))
            self.answers.append((kind, self.site.seen(reply)))
            if not reply.has_error() and kind == stage:
                found = dict(reply.content.config_records[RECORD])
        return found


def changed(asked: Fields, stage: int, draw: random.Random) -> Fields:
    """The request with one thing wrong with it."""
    key = draw.choice(("round", *FORMS[stage] * 2))
    value = asked[key]
    if draw.random() < 0.1:
        del asked[key]
    elif key == "round":
        asked[key] = draw.choice((value + 1, value - 1, 0, -1, 2**40, "1", 1.0, True))
    elif draw.random() < 0.2:
        asked[key] = draw.choice(([], 1, "b", [1], ["a"], [b""], [b"\0" * masking.KEY_BYTES] * len(value)))
    elif key in ("masks", "boxes", "sealed") and value:
        place = draw.randrange(len(value))
        asked[key] = [*value]
        asked[key][place] = draw.choice(
            (
                value[place][:-1],
                bytes(len(value[place])),
                value[0],
                draw.randbytes(len(value[place])),
                value[place] + b"x",
            )
        )
    else:
        asked[key] = draw.choice(
            ([*value, "stranger"], value[:-1], value[::-1], [*value, *value[:1]], [*value, "a"], [*value[1:], "a"])
        )
    return asked
