"""The client's part of secure aggregation: four stages, each once and in order (see `strategies.secagg`).

Threshold, clip and bits are the client's own config, never the server's word. What it needs from stage to stage is in
the Flower context's state, which goes back to it with each message; a new round's stage 0 writes over it, and stage 3
deletes it, so that a second question finds nothing to give away. All secrets are the operating system's randomness.

A client refuses to train twice under one mask, to upload in the clear while its config asks for secure aggregation, to
give shares of both secrets of one client, and to give any while fewer than `secagg.min_clients` have uploaded.

It gives shares for one set of clients for one start state and round, and what that set was is on its disk before they
leave: sums over two sets of the same updates would tell the difference. The same set again is the same sum, so that a
round that was broken off can be done again. With `secagg.neighbours` below all others the set is what it sees of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.data.split import is_name
from fedpeft.errors import RunError
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.secagg import masking
from fedpeft.strategies.secagg.stages import ACTIONS, NAMES, RECORD
from fedpeft.strategies.secagg.terms import Terms, zero_reference

log = logging.getLogger("fedpeft")
UPLOAD = f"train.{ACTIONS[2]}"
Request = Callable[[Message], tuple[AdapterState, Instructions]]
Train = Callable[[Context, AdapterState, Instructions], AdapterState]
Asked = dict[str, Any]
FORMS = ((), ("names", "masks", "boxes"), ("names", "sealed"), ("uploaded", "silent"))  # lists that a stage gets
BYTES = ("masks", "boxes", "sealed")


def register(
    app: ClientApp,
    config: Callable[[], Config],
    name: Callable[[Context], str],
    request: Request,
    train: Train,
    store: Callable[[], Store],
    mods: list[Mod],
) -> None:
    """Let a ClientApp answer the four stages; `train` gives the update that it would send in the clear to a request."""

    def answer(stage: int, message: Message, context: Context, respond: Callable[[Member], RecordDict]) -> Message:
        own = config()
        if not own.secagg.enabled:
            raise RunError("this client's config has secagg.enabled=false.")
        plan = Terms.of(own)
        asked = require_form(stage, message.content.config_records.get(RECORD), plan.clients)
        member = Member(context, name(context), stage, asked, plan, store())
        return Message(respond(member), reply_to=message)

    @app.query(ACTIONS[0])
    def keys(message: Message, context: Context) -> Message:
        return answer(0, message, context, Member.advertise)

    @app.query(ACTIONS[1])
    def shares(message: Message, context: Context) -> Message:
        return answer(1, message, context, Member.share)

    @app.train(ACTIONS[2], mods=mods)
    def upload(message: Message, context: Context) -> Message:
        received, told = request(message)
        return answer(
            2,
            message,
            context,
            lambda member: member.upload(
                lambda: zero_reference(received, told.uploads),
                lambda: train(context, received, told),
                told.round,
                received.sha256(),
            ),
        )

    @app.query(ACTIONS[3])
    def unmask(message: Message, context: Context) -> Message:
        return answer(3, message, context, Member.reveal)


def require_form(stage: int, record: ConfigRecord | None, clients: int) -> Asked:
    """What a stage was asked, if it has that stage's keys and types.

    Args:
        clients: of a round; no list is longer.

    Raises:
        RunError: names the key.
    """
    where = f"secure aggregation, stage {stage} ({NAMES[stage]})"
    if record is None:
        raise RunError(f"{where}: the message has no record {RECORD}.")
    lists, lengths = FORMS[stage], []
    for key in lists:
        kind = bytes if key in BYTES else str
        value: Any = record.get(key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise RunError(f"{where}: {key} must be a list of {kind.__name__}.")
        if len(value) > clients:
            raise RunError(f"{where}: {key} has {len(value)} entries; a round has at most {clients} clients.")
        if kind is str and not all(map(is_name, value)):
            raise RunError(f"{where}: {key} has something that is no name of a client.")
        if key in ("masks", "boxes") and any(len(item) != masking.KEY_BYTES for item in value):
            raise RunError(f"{where}: {key} must be keys of {masking.KEY_BYTES} bytes.")
        lengths.append(len(value))
    if type(record.get("round")) is not int or (stage < 3 and len(set(lengths)) > 1):
        raise RunError(f"{where}: a round's number, and {', '.join(lists) or 'nothing'} of one length, are needed.")
    return {key: record[key] for key in ("round", *lists)}


def refuse_clear(config: Config) -> None:
    """Raise RunError if this client sends updates under masks only."""
    if config.secagg.enabled:
        raise RunError("this client's config has secagg.enabled=true: it sends no update in the clear.")


class Member:
    """One client in one stage: `asked` is what the server sent, `state` what the stage before left.

    Raises:
        RunError: the stage is not the next one of this round.
    """

    def __init__(self, context: Context, name: str, stage: int, asked: Asked, plan: Terms, store: Store) -> None:
        self.context, self.name, self.asked, self.plan, self.store = context, name, asked, plan, store
        self.round = int(asked["round"])
        self.state: Asked = {}
        if stage:
            self.state = {**context.state.config_records.get(RECORD, ConfigRecord())}
            if (self.state.get("stage"), self.state.get("round")) != (stage - 1, self.round):
                raise RunError(
                    f"round {self.round}, stage {stage} ({NAMES[stage]}): not due here; it follows stage "
                    f"{stage - 1} of the same round, once."
                )

    def advertise(self) -> RecordDict:
        """Stage 0: two new key pairs."""
        (mask_secret, mask), (box_secret, box) = masking.keypair(), masking.keypair()
        self.leave(stage=0, mask_secret=mask_secret, box_secret=box_secret, mask=mask, box=box)
        return RecordDict({RECORD: ConfigRecord({"mask": mask, "box": box})})

    def share(self) -> RecordDict:
        """Stage 1: shares of the mask key and of a new seed, sealed for each neighbour; the first ones are its own."""
        names, masks, boxes = (list(self.asked[key]) for key in ("names", "masks", "boxes"))
        self.enough(len(names) + 1, "have keys")
        if len(names) > self.plan.neighbours:
            raise RunError(f"{len(names)} neighbours, but secagg.neighbours allows {self.plan.neighbours}.")
        public = [self.state["mask"], self.state["box"], *masks, *boxes]
        # Whoever came twice would hold two shares of one secret and count twice towards the threshold.
        if len({self.name, *names}) != len(names) + 1 or len(set(public)) != 2 * (len(names) + 1):
            raise RunError("two neighbours have the same name or public key.")
        seed, number = os.urandom(masking.KEY_BYTES), len(names) + 1
        seeds = masking.split(seed, self.plan.threshold, number)
        secrets = masking.split(self.state["mask_secret"], self.plan.threshold, number)
        try:
            keys = [masking.agree(self.state["box_secret"], box, "box") for box in boxes]
            # Tried now: in stage 2 a key that is none would come to light after training.
            for mask in masks:
                masking.agree(self.state["mask_secret"], mask, "mask")
        except ValueError as error:
            raise RunError("a neighbour's public key is none.") from error
        sealed = [
            masking.seal(key, one + other, self.label(self.name, name))
            for name, key, one, other in zip(names, keys, seeds[1:], secrets[1:], strict=True)
        ]
        self.leave(
            stage=1,
            mask_secret=self.state["mask_secret"],
            seed=seed,
            names=names,
            masks=masks,
            keys=keys,
            seed_share=seeds[0],
            secret_share=secrets[0],
        )
        return RecordDict({RECORD: ConfigRecord({"sealed": sealed})})

    def upload(
        self, start: Callable[[], AdapterState], train: Callable[[], AdapterState], number: int, state: str
    ) -> RecordDict:
        """Stage 2: train, and send the change from `start` in fixed point under all masks; `state` names the start."""
        names, sealed = list(self.asked["names"]), list(self.asked["sealed"])
        self.enough(len(set(names)) + 1, "have sent shares")
        for given in self.given(state):
            if not given <= {self.name, *names}:
                raise self.another_set(given, {self.name, *names})
        if number != self.round:
            raise RunError(f"the task is of round {number}, the keys of round {self.round}.")
        keys = dict(zip(self.state["names"], self.state["keys"], strict=True))
        masks = dict(zip(self.state["names"], self.state["masks"], strict=True))
        seeds, secrets = [self.state["seed_share"]], [self.state["secret_share"]]
        for name, box in zip(names, sealed, strict=True):
            if name not in keys:
                raise RunError(f"shares of {name}, which is no neighbour.")
            try:
                opened = masking.unseal(keys[name], box, self.label(name, self.name))
            except ValueError as error:
                raise RunError(f"the shares from {name}: {error}.") from error
            seeds.append(opened[: masking.SHARE_BYTES])
            secrets.append(opened[masking.SHARE_BYTES :])
        update = train()  # which checks what was received
        words = self.quantised(start(), update)
        words = words + masking.stream(self.state["seed"], words.size)
        for name in names:
            mask = masking.stream(masking.agree(self.state["mask_secret"], masks[name], "mask"), words.size)
            # Of each pair the first by name adds and the other subtracts, so the mask is not in their sum.
            words = words + mask if self.name < name else words - mask
        # Its own keys and seed are not carried on: stage 3 gives away shares of others, and of its seed.
        self.leave(stage=2, start=state, names=[self.name, *names], seed_shares=seeds, secret_shares=secrets)
        return RecordDict({"arrays": ArrayRecord({"adapter": Array(words)}), RECORD: ConfigRecord({})})

    def reveal(self) -> RecordDict:
        """Stage 3: shares of the seeds of those that uploaded, of the mask keys of those that fell silent."""
        uploaded, silent = list(self.asked["uploaded"]), list(self.asked["silent"])
        seeds = dict(zip(self.state["names"], self.state["seed_shares"], strict=True))
        secrets = dict(zip(self.state["names"], self.state["secret_shares"], strict=True))
        both = sorted(set(uploaded) & set(silent))
        if both:
            raise RunError(f"asked for both secrets of {', '.join(both)}: that would unmask its update.")
        strangers = sorted({*uploaded, *silent} - set(seeds))
        if strangers:
            raise RunError(f"asked for shares of {', '.join(strangers)}, which are not held here.")
        if self.name not in uploaded:
            raise RunError("asked for shares, though its own upload is not in the sum.")
        self.enough(len(set(uploaded)), "have uploaded")
        for given in self.given(self.state["start"]):
            if given != set(uploaded):
                raise self.another_set(given, set(uploaded))
        # Before the shares leave: a kill in between may cost the round, but no second set can be asked for.
        self.store.save_sum(self.name, self.round, self.state["start"], sorted(set(uploaded)))
        del self.context.state[RECORD]
        shares = [*(seeds[name] for name in uploaded), *(secrets[name] for name in silent)]
        return RecordDict({RECORD: ConfigRecord({"shares": shares})})

    def given(self, start: str) -> list[set[str]]:
        """The sets of clients for whose sum from this start state shares are given away."""
        return [set(entry["clients"]) for entry in self.store.sums(self.name, self.round) if entry["start"] == start]

    def another_set(self, given: set[str], asked: set[str]) -> RunError:
        """The error where shares for a sum over other clients from the same start state were given before."""
        apart = ", ".join(sorted(given ^ asked))
        return RunError(
            f"round {self.round}: shares for a sum from this start state were given before, and {apart} "
            "would be in one of the two sums only, which tells what is between them. Go on with a new "
            "round."
        )

    def enough(self, count: int, what: str) -> None:
        """Raise RunError unless `count`, the client itself among them, is as many as must be there."""
        if count < self.plan.fewest:
            key = "threshold" if self.plan.fewest == self.plan.threshold else "min_clients"
            raise RunError(f"{count} of this client and its neighbours {what}; secagg.{key} needs {self.plan.fewest}.")

    def quantised(self, start: AdapterState, update: AdapterState) -> masking.Words:
        """The change of every coordinate in fixed point. How many were clipped is logged here and goes nowhere else."""
        start.require_same_form(update, "update")
        changes = [
            (after.cpu().double() - before.cpu().double()).reshape(-1)
            for after, before in zip(update.payload, start.payload, strict=True)
        ]
        # In float64 and as one vector: every client must put the same coordinate into the same place of the sum.
        change = torch.cat(changes).numpy()
        if not np.isfinite(change).all():
            raise RunError("its update has NaN or inf; it is not sent.")
        words, clipped = masking.quantise(change, self.plan.clip, self.plan.bits)
        if clipped:
            log.warning(
                "round %d: %s: %d of %d changes were cut to secagg.clip=%g",
                self.round,
                self.name,
                clipped,
                change.size,
                self.plan.clip,
            )
        return words

    def label(self, sender: str, receiver: str) -> str:
        """What the sealed shares from one client to another are bound to: round, sender and receiver."""
        # JSON, as names joined by a separator could be read in two ways.
        return json.dumps([self.round, sender, receiver])

    def leave(self, **state: Any) -> None:
        """Keep this, and nothing else, for the next stage."""
        self.context.state[RECORD] = ConfigRecord({**state, "round": self.round})
