"""A site's resident worker: it has the base model, the data and the device, and answers one message at a time.

It stays, so that a message costs no import and no load. A run with another config has its model built anew; the data
are read when the first message that the policy allows is there, not before. What the worker runs is the installed
fedpeft. From the server come tensors, a task and a config (`envelope`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedpeft.clients import policy as policies
from fedpeft.clients.app import Local, client_app
from fedpeft.clients.policy import Policy, Refused
from fedpeft.clients.reference import with_reference
from fedpeft.config import Config
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.data.encode import Encoded, encode, explain_silence
from fedpeft.deploy import envelope, flower, parcel, settings
from fedpeft.deploy.build import bare
from fedpeft.deploy.envelope import Envelope
from fedpeft.deploy.settings import Site
from fedpeft.deploy.site.node import ANSWERED, FAILED, READY, UNTOLD
from fedpeft.deploy.site.owed import Owed
from fedpeft.deploy.site.site import LABELS, load_model
from fedpeft.deploy.site.spare import release_freed
from fedpeft.errors import InputError, RunError
from fedpeft.files import explain_error, write_bytes
from fedpeft.flower import ErrorCode
from fedpeft.foreign import BadMessage, read_json, shown
from fedpeft.models import agreement
from fedpeft.objectives.base import load_objective
from fedpeft.seeds import numpy_generator
from fedpeft.strategies import opening
from fedpeft.strategies.instructions import Instructions

log = logging.getLogger("fedpeft")
RUNS = 4  # at work at once
IDLE_S = 1.0  # without a message, after which memory that is free is given back
CACHES = 4  # of what the records become, which the coordinator has a say in: each is as large as the records


class Unreadable(Mapping[str, Encoded]):
    """Records that could not be read."""

    def __getitem__(self, client: str) -> Encoded:
        raise RunError(f"the records of {client} cannot be read.")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Resident:
    """The client of one site."""

    def __init__(self, site: Site) -> None:
        self.site, self.name = site, site.settings.name
        self.held: Envelope | None = None
        self.bounds: Policy | None = None
        self.local: Local | None = None
        self.app: ClientApp = client_app(self.current, lambda context: self.name)
        self.contexts: dict[int, Context] = {}

    def remembered(self, context: Context) -> Context:
        """The context of an earlier message of the same run, or else this one: stages of secure aggregation leave in it
        what the next one needs. Only in memory, as there are secrets in it, and of the newest runs alone.
        """
        kept = self.contexts.pop(context.run_id, context)
        self.contexts = {**dict(list(self.contexts.items())[1 - RUNS :]), context.run_id: kept}
        return kept

    def answer(self, message: Message, context: Context) -> Message:
        """The reply to a message. What went wrong at the site is told only where it says nothing of its data."""
        try:
            begun = time.monotonic()
            if message.metadata.message_type != "query":
                self.prepare(message)
            reply = self.app(message, context)
            log.info("%s: answered in %.3f s", message.metadata.message_type, time.monotonic() - begun)
            return reply
        except RunError as error:
            reason = shown(error)
            log.warning("refused or failed: %s", reason)
        except Exception as error:
            say(error, "a message could not be answered; the server is not told why")
            reason = UNTOLD
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def prepare(self, message: Message) -> None:
        """Check what is asked, and have the model of its run ready."""
        cover = envelope.opened(message.content, self.site)
        round_number = read_round(message)
        # Read for every message, so that a site can take back what it allowed without a restart.
        bounds = envelope.in_force(self.site)
        if bounds != self.bounds:
            # What was allowed stands in the site's log ahead of all that was done under it.
            policies.record(bounds)
            self.bounds = bounds
        config = envelope.admitted(cover, self.site, bounds, round_number)
        if cover != self.held:
            self.held, self.local = None, None  # the old model goes before the new one comes
            self.local = self.build(cover, config)
            # Records that cannot be read now may be readable at the next message.
            self.held = None if isinstance(self.local.train_data, Unreadable) else cover
        self.current().guard.policy.cache_clear()  # what the site allows now

    def build(self, cover: Envelope, config: Config) -> Local:
        """Model and data of a run.

        Under sample-level DP records that cannot be read are no answer of their own: they fail where they are used, as
        everything does then that may have to do with a record.

        Raises:
            RunError: the base model is another one than the coordinator's, or it mixes records.
        """
        log.info("run %s: loading model and data", cover.run)
        config.data.labels = list(cover.labels) if load_objective(config.model.task).headed else None
        here = bare(
            config,
            self.site.path / "state" / cover.run,
            list(cover.labels),
            self.site.path / "ledger",
            cover.account(config),
        )
        local = here.local
        # Before the data are read: with another base the updates would mean nothing.
        if envelope.base_fingerprint(local.model.base, config) != cover.base:
            log.error("run %s: %s is not the coordinator's base model", cover.run, config.model.name)
            raise RunError("the base model here is not the coordinator's.")  # where it lies is the site's own
        if config.data.labels:  # for `fedpeft site check`
            told = {"run": cover.run, "labels": config.data.labels}
            write_bytes(self.site.path / LABELS, json.dumps(told).encode())
        private = local.guard.private
        try:
            cache = Cache(self.site.path / "cache", most=CACHES)
            own, held = load_data(config, self.name, local.model.base.processor, cache)
            for part in (own, held):
                require_fit(local, part)
            own, held = (with_reference(config, local.model, part, cache) for part in (own, held))
        except Exception as error:
            if not private:
                raise
            say(error, f"run {cover.run}: the records cannot be read; the server is not told")
            local.train_data = local.holdout = Unreadable()
            return local
        local.train_data, local.holdout = {self.name: own}, {self.name: held}
        log.info("run %s: %d records to train on", cover.run, len(own))
        if private:
            try:
                local.require_apart(own)
            except InputError as error:
                raise Refused(str(error)) from error
        return local

    def current(self) -> Local:
        """The run that is prepared.

        Raises:
            RunError: none is.
        """
        if self.local is None:
            raise RunError("no run is prepared.")
        return self.local


def load_data(config: Config, name: str, processor: Any, cache: Cache | None = None) -> tuple[Encoded, Encoded]:
    """A site's records to train on, and those held out, in the order that a simulated client has them.

    Args:
        cache: where those of large files are kept; it holds what the records hold.

    Raises:
        InputError: they cannot be read.
    """
    records = source.whole(config.data.source, "data.source", config.data, config.model.task, cache=cache)
    if not len(records):
        raise InputError(f"data.source: {config.data.source} has no records.")
    encoded = encode(records, processor, config.model.task, config.model.max_length, cache=cache)
    teaching = encoded.teaching()
    if not len(teaching):
        raise InputError(f"data.source: {config.data.source}: {explain_silence(encoded)}.")
    order = numpy_generator(config.run.seed, "holdout", name).permutation(teaching)
    kept = int(len(order) * config.data.holdout)
    return encoded.view(order[kept:]), encoded.view(order[:kept])


def require_fit(local: Local, data: Encoded) -> None:
    """Raise InputError for records that the model cannot take; of a private site only its log says so, as one
    record must not decide whether it answers.
    """
    try:
        agreement.require_records(local.model.base, data, "data.source")
    except InputError as error:
        if not local.guard.private:
            raise
        log.error("the records do not fit the model; the server is not told: %s", error)


def read_round(message: Message) -> int:
    """The round that a message says it is of; 0 where it has no instructions, as most stages of secure aggregation.

    Raises:
        Refused: its instructions are malformed.
    """
    config = message.content.config_records.get("config")
    if not config or "task" not in config:
        return 0
    try:
        with opening.blame_message("task"):
            return Instructions.from_json(read_json(str(config["task"]), "the task", opening.TASK_BYTES)).round
    except BadMessage as error:
        raise Refused(f"refused: the server's message: {error}") from error


def answer(resident: Resident, owed: Owed) -> bytes:
    """Put the reply to a message into its folder; whether that was possible."""
    try:
        context, message = resident.remembered(flower.context_of(owed.pulled)), owed.inflated()
        packed = parcel.is_packed(message.content)
        message.content = parcel.unpack_content(message.content)
        reply = resident.answer(message, context)
        if packed and reply.has_content():
            reply.content = parcel.pack_content(reply.content)
        owed.put_reply(reply)
        return ANSWERED
    except Exception as error:  # of a message that was made to be no message, or of a disk that is full
        say(error, "a message could not be answered; the server is not told why")
        return FAILED


def say(error: Exception, what: str) -> None:
    """One line in the site's log; with --debug, where it happened too."""
    reason = explain_error(error) if isinstance(error, OSError) else str(error) or type(error).__name__
    kind = "" if isinstance(error, OSError | InputError | RunError) else f"{type(error).__name__}: "
    log.error("%s: %s%s", what, kind, shown(reason), exc_info=log.isEnabledFor(logging.DEBUG))


def main(folder: Path, pipe: str) -> None:
    """Answer what the node owes, until it ends.

    Args:
        pipe: number of the file that leads to the node; this process inherited it.
    """
    site, node = settings.site(folder), Connection(int(pipe))
    try:
        load_model(site)  # then its files are in memory, and a run's first round loads it in no time
    except Exception as error:
        say(error, "the model cannot be loaded, so this site does not take part; it is tried again")
        raise SystemExit(1) from None
    release_freed()  # that model is gone
    gc.freeze()  # what importing it has made stays, and is not looked through later
    resident = Resident(site)
    log.info("ready.")
    node.send_bytes(READY)
    with contextlib.suppress(EOFError, OSError):  # the node ended
        while True:
            owed = Owed(Path(node.recv_bytes().decode()))
            node.send_bytes(answer(resident, owed))
            if not node.poll(IDLE_S):
                release_freed()
