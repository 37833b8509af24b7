"""The server's part of the four stages of one round of secure aggregation (see `secagg`).

    0 key exchange   client -> two public keys, new every round: for masks, and for what clients tell each other
    1 key shares     its neighbours' public keys -> shares of its secret mask key and its seed, sealed for each of them
    2 masked upload  the round's task, and the shares that it holds from now on -> its change in fixed point, masked
    3 unmask         who uploaded and who did not -> shares of the seeds of those that did, of the keys of the others

A client that does not answer, or wrongly, is out of the later stages. One that uploaded stays in the sum; the masks of
one that did not are in its neighbours' uploads, from stage 1 on, and are removed by its key. Where too few are left for
the quorum no mask is removed, as the sum would count for nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.state import AdapterState, RoundDropped, RoundFailed, Rules, StillMasked
from fedpeft.state_file import StateFile
from fedpeft.strategies import asking, opening, wire
from fedpeft.strategies.secagg import masking

if TYPE_CHECKING:
    from fedpeft.strategies.secagg.terms import Terms

NAMES = ("key exchange", "key shares", "masked upload", "unmask")
ACTIONS = ("secagg_keys", "secagg_shares", "secagg_upload", "secagg_unmask")
KINDS = (f"query.{ACTIONS[0]}", f"query.{ACTIONS[1]}", f"train.{ACTIONS[2]}", f"query.{ACTIONS[3]}")
RECORD = "secagg"
T = TypeVar("T")


class Stages:
    """One round.

    Attributes:
        nodes: node id of every client asked.
        lost: stage and reason of each client that fell out.
        bytes_up, bytes_down: moved so far.
    """

    def __init__(self, grid: Grid, nodes: dict[str, int], plan: Terms, number: int, rules: Rules) -> None:
        self.grid, self.nodes, self.plan = grid, nodes, plan
        self.number, self.rules = number, rules
        self.lost: dict[str, tuple[int, str]] = {}
        self.bytes_up = self.bytes_down = 0

    def run(self, contents: dict[str, RecordDict], size: int) -> tuple[masking.Words, list[str]]:
        """The sum modulo 2^32 of the clients' vectors of `size` values, and the clients that are in it.

        Args:
            contents: what each client would be sent in the clear.

        Raises:
            RoundFailed: too few clients were left in a stage; RoundDropped once updates may have been sent, StillMasked
                as long as no client was asked to help remove a mask.
        """
        graph = neighbour_circle(list(contents), self.plan.neighbours)
        keys = self.ask(
            0,
            {client: {} for client in contents},
            lambda client, reply: (field(reply, "mask", masking.KEY_BYTES), field(reply, "box", masking.KEY_BYTES)),
        )
        # Who fell out before shares were dealt put no mask into anybody's upload, so nothing of it has to be removed.
        near = {client: [other for other in graph[client] if other in keys] for client in keys}
        sealed = self.ask(
            1,
            {
                client: {
                    "names": near[client],
                    "masks": [keys[other][0] for other in near[client]],
                    "boxes": [keys[other][1] for other in near[client]],
                }
                for client in keys
            },
            lambda client, reply: dict(zip(near[client], listed(reply, "sealed"), strict=True)),
        )
        near = {client: [other for other in near[client] if other in sealed] for client in sealed}
        held = {client: [sealed[other][client] for other in near[client]] for client in sealed}
        file = StateFile(self.rules.folder)
        vectors = self.ask(
            2,
            {client: {"names": near[client], "sealed": held[client]} for client in sealed},
            lambda client, reply: AdapterState({RECORD: torch.from_numpy(vector(reply, size).view(np.int32))}),
            contents,
            file.put,
        )
        uploaded = {client: [client, *(other for other in near[client] if other in vectors)] for client in vectors}
        silent = {client: [other for other in near[client] if other not in vectors] for client in vectors}
        # A client that uploaded late is silent to all: its seed is never asked for, so its update stays hidden.
        shares = self.ask(
            3,
            {client: {"uploaded": uploaded[client], "silent": silent[client]} for client in vectors},
            lambda client, reply: dict(zip(uploaded[client] + silent[client], listed(reply, "shares"), strict=True)),
        )
        total = np.zeros(size, dtype=masking.WORD)
        for client, masked in vectors.items():
            words = file.get(masked)[RECORD].numpy().view(masking.WORD)
            total += words - masking.stream(self.secret(client, shares), size)
        for client in sorted({other for others in silent.values() for other in others}):
            secret = self.secret(client, shares)
            for other in (other for other in near[client] if other in vectors):
                mask = masking.stream(masking.agree(secret, keys[other][0], "mask"), size)
                # The undone half of a pair: what `other` had added, where its name comes first, or subtracted.
                total = total - mask if other < client else total + mask
        return total, list(vectors)

    def ask(
        self,
        stage: int,
        asked: dict[str, dict[str, Any]],
        read: Callable[[str, RecordDict], T],
        contents: dict[str, RecordDict] | None = None,
        keep: Callable[[T], T] = lambda answer: answer,
    ) -> dict[str, T]:
        """What each client answers; who does not, or wrongly, is lost.

        Args:
            keep: what stays of an answer, before the next is read.

        Raises:
            RoundFailed: too few are left.
        """
        messages = {
            client: RecordDict(
                {**(contents[client] if contents else {}), RECORD: ConfigRecord({**fields, "round": self.number})}
            )
            for client, fields in asked.items()
        }
        self.bytes_down += sum(map(payload, messages.values()))
        names = {self.nodes[client]: client for client in messages}

        def opened(node: int, reply: Message | None) -> tuple[T, int]:
            content = wire.opened(reply)
            # Whatever is wrong with a reply, a record too few or a list too long, loses its client and no other.
            with opening.blame_message("reply", wire.BadReply):
                answer, size = read(names[node], content), payload(content)
            return keep(answer), size

        sent = {node: messages[client] for node, client in names.items()}
        found = asking.ask_nodes(self.grid, KINDS[stage], sent, self.rules.deadline_s, opened)
        answers: dict[str, T] = {}
        for node, client in names.items():
            answer = found[node]
            if isinstance(answer, wire.BadReply):
                self.lost[client] = stage, str(answer)
            else:
                answers[client] = answer[0]
                self.bytes_up += answer[1]
        quorum = math.ceil(self.rules.quorum * len(self.nodes)) if stage < len(NAMES) - 1 else 0
        if len(answers) < (needed := max(self.plan.fewest, quorum)):
            key = "secagg.threshold" if needed == self.plan.threshold else "secagg.min_clients"
            key = key if needed == self.plan.fewest else f"run.quorum={self.rules.quorum}"
            raise self.failed(stage, f"{len(answers)} of {len(self.nodes)} clients are left, but {key} needs {needed}")
        return answers

    def secret(self, client: str, shares: dict[str, dict[str, bytes]]) -> bytes:
        """The seed or the key of `client`, from the shares that others gave away."""
        given = [held[client] for held in shares.values() if client in held]
        try:
            return masking.combine(given, self.plan.threshold)
        except ValueError as error:
            raise self.failed(3, f"the masks of {client} cannot be removed: {error}") from error

    def failed(self, stage: int, what: str) -> RoundFailed:
        """The error of a stage, with each lost client's reason; from stage 2 on it drops the round for good."""
        reasons = "; ".join(f"{client}: {reason}" for client, reason in self.without_upload([]).items())
        where = f"round {self.number}: secure aggregation, stage {stage} ({NAMES[stage]})"
        # Before stage 2 nothing of an update is on the way, so the same round may be tried again.
        kind = (RoundFailed, RoundFailed, StillMasked, RoundDropped)[stage]
        return kind(f"{where}: {what}. {reasons}".rstrip())

    def without_upload(self, uploaded: list[str]) -> dict[str, str]:
        """Stage and reason of each lost client that is not among `uploaded`."""
        return {
            client: f"stage {stage} ({NAMES[stage]}): {reason}"
            for client, (stage, reason) in sorted(self.lost.items())
            if client not in uploaded
        }

    def report(self, uploaded: list[str]) -> dict[str, Any]:
        """What the event of the round says."""
        dropped = {
            name: sorted(client for client, (stage, _) in self.lost.items() if stage == index)
            for index, name in enumerate(NAMES)
        }
        return {
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "secagg": {
                "uploaded": len(uploaded),
                "dropped": {name: who for name, who in dropped.items() if who},
                "neighbours": self.plan.neighbours,
                "threshold": self.plan.threshold,
            },
        }


def neighbour_circle(clients: list[str], count: int) -> dict[str, list[str]]:
    """The neighbours of each client, sorted: the `count` nearest on a circle in random order, or all others."""
    order = list(clients)
    secrets.SystemRandom().shuffle(order)
    steps = [step for far in range(1, count // 2 + 1) for step in (-far, far)]
    # Steps on both sides would meet on a circle that is too small.
    if count >= len(order) - 1:
        steps = list(range(1, len(order)))
    return {
        client: sorted({order[(place + step) % len(order)] for step in steps} - {client})
        for place, client in enumerate(order)
    }


def field(reply: RecordDict, key: str, length: int) -> bytes:
    """Bytes of this length in a reply."""
    value = reply.config_records[RECORD][key]
    if not isinstance(value, bytes) or len(value) != length:
        raise wire.BadReply(f"{key} is not {length} bytes")
    return value


def listed(reply: RecordDict, key: str) -> list[bytes]:
    """The byte strings of a list in a reply; entries of other types are left out.

    Raises:
        BadReply: it is no list.
    """
    values = reply.config_records[RECORD][key]
    if not isinstance(values, list):
        raise wire.BadReply(f"{key} is not a list")
    return [value for value in values if isinstance(value, bytes)]


def vector(reply: RecordDict, size: int) -> masking.Words:
    """The masked upload."""
    uploaded = reply.array_records["arrays"]["adapter"]
    return opening.array(uploaded, str(np.dtype(masking.WORD)), (size,), "masked upload").astype(masking.WORD)


def payload(content: RecordDict) -> int:
    """Bytes of arrays, keys and shares in a message; names and manifests are not counted, as in the clear."""
    arrays = sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for record in content.array_records.values()
        for array in record.values()
    )
    listings = [
        value if isinstance(value, list) else [value]
        for record in content.config_records.values()
        for value in record.values()
    ]
    return arrays + sum(len(item) for values in listings for item in values if isinstance(item, bytes))
