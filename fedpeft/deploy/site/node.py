"""A site's resident node: asks the coordinator for messages, has the worker answer them, and brings the answers back.

It speaks Flower's Fleet protocol, as Flower's own node does, and never looks into a message or an answer: these are
bytes on the site's disk, where the worker reads and writes them. Neither torch nor any model is in this process.

A call is made again until it is answered, for as long as the site runs, whatever came instead. A message is confirmed
when its answer has been taken: what is killed in between is asked for and pushed again, and the worker answers the
same request alike.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

from fedpeft.deploy import flower
from fedpeft.deploy.processes import Child
from fedpeft.deploy.settings import Site
from fedpeft.deploy.site.link import Failure, Link
from fedpeft.deploy.site.owed import Owed, read_owed
from fedpeft.deploy.site.spare import release_freed
from fedpeft.errors import RunError
from fedpeft.files import explain_error, write_bytes

log = logging.getLogger("fedpeft")
POLL_S, WAITED_S = 0.5, 1.0  # a coordinator that answers an empty pull sooner is not asked again at once
WITHIN_S = {"PullMessages": 30.0, "PushObject": 300.0, "PullObject": 300.0}  # pulls wait up to 20 s at the coordinator
OTHERS_WITHIN_S, LEAVE_WITHIN_S = 20.0, 3.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # between tries
TELL_S, NOTE_S = 60.0, 10.0  # between lines about the same trouble; between writings of the status
REFUSED_S = 120.0  # after that a coordinator that answers, and with an error each time, knows nothing of the message
WORKER_S = 60.0  # for a worker that is being started again
BEGINNINGS = 3  # a message that was begun so often without an answer has killed this site, and is not begun again
AT_ONCE = 4  # calls
READY, ANSWERED, FAILED = b"ready", b"answered", b"failed"  # what a worker says
PIPE_S = 0.05
LONGEST_TTL_S = 7 * 86_400.0
UNTOLD = "the site could not take part; its own log says why."


class Gone(Exception):
    """Nobody wants the answer any more: the run has ended, or the message has expired."""


class Leaving(Exception):
    """The site stops; what it owes stays on its disk."""


class Node:
    """One site's side of the Fleet API.

    Args:
        ask: has the worker answer what is owed, into its folder; raises RunError with what the coordinator may know.
        registers: without authentication a site registers itself.
    """

    def __init__(self, site: Site, link: Link, ask: Callable[[Owed], None], registers: bool = False) -> None:
        self.site, self.link, self.ask, self.registers = site, link, ask, registers
        self.key, self.node = flower.public_bytes(link.key), flower.Node()
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self.last: list[str] = []  # what was pulled last: a coordinator that keeps count sees what got lost on its way
        self.trouble, self.told, self.noted, self.failed, self.spare = "", 0.0, 0.0, False, False
        self.state: dict[str, Any] = {"state": "starting", "server": site.settings.server, "answered": None}

    def insist(self, method: str, until: float = float("inf"), **fields: Any) -> Any:
        """The answer to a call, which is made again until there is one.

        Raises:
            Gone: the run has ended, or the coordinator has refused the call for long, or `until` (of time.monotonic)
                has passed.
            Leaving: the site stops.
        """
        pause, refused = FIRST_PAUSE_S, float("inf")
        while not self.stopping.is_set():
            request = flower.request(method, self.node, **fields)
            try:
                answer = self.link.call(method, request, WITHIN_S.get(method, OTHERS_WITHIN_S))
            except Failure as failure:
                if self.stopping.is_set():  # the connection was closed under this call
                    raise Leaving from failure
                refused = float("inf") if failure.lost else min(refused, time.monotonic())
                patience = REFUSED_S if until < float("inf") else float("inf")
                run_ended = failure.number == flower.RUN_ENDED and until < float("inf")
                if run_ended or time.monotonic() > min(until, refused + patience):
                    raise Gone(failure.sentence(self.site.settings.server)) from failure
                if failure.number == flower.KEY_IN_USE and method == "RegisterNode":
                    return None  # by this site, before it was started again
                self.tell(failure)
                self.stopping.wait(pause * random.uniform(0.5, 1.0))
                pause = min(LONGEST_PAUSE_S, 2 * pause)
                if failure.stranger and method not in ("ActivateNode", "RegisterNode"):
                    self.activate()  # it may have been let in anew, under another number
            else:
                self.hear()
                return answer
        raise Leaving

    def tell(self, failure: Failure) -> None:
        """Say what is wrong once, then once a minute."""
        log.debug("%s", failure)
        server, known = self.site.settings.server, self.trouble
        if failure.cause(server) != known or time.monotonic() - self.told > TELL_S:
            log.warning("%s%s", "still: " if failure.cause(server) == known else "", failure.sentence(server))
            self.trouble, self.told = failure.cause(server), time.monotonic()
            self.note(state="away", trouble=failure.sentence(server))

    def hear(self) -> None:
        """Note that a call was answered: the site is alive."""
        if self.trouble:
            log.info("%s answers again.", self.site.settings.server)
            self.trouble = ""
        elif time.monotonic() - self.noted < NOTE_S:
            return
        self.note(state="connected", trouble=None, answered=datetime.now(UTC).isoformat(timespec="seconds"))

    def note(self, **values: Any) -> None:
        """Write down how it goes, for `fedpeft site status`."""
        with self.lock:
            if self.state["state"] == "stopped":  # what a thread was still at does not count
                return
            self.state |= values
            self.noted = time.monotonic()
            try:
                write_bytes(self.site.path / "status.json", json.dumps(self.state).encode())
            except OSError as error:
                log.warning("%s", explain_error(error))

    def run(self) -> None:
        """Take part until `stopping` is set."""
        with self.guarded():
            self.activate()
            threading.Thread(target=self.beat, daemon=True).start()
            for owed in read_owed(self.site.path / "owed"):
                self.finish(owed)
            while not self.failed:
                self.pull()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What one of its threads does; whatever ends one ends the node, and so the process, which is started again."""
        try:
            yield
        except Leaving:
            return
        except Exception as error:
            self.failed = True
            log.error("the node ended: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))

    def activate(self) -> None:
        """Come online."""
        if self.registers:
            self.insist("RegisterNode", public_key=self.key)
        answer = self.insist("ActivateNode", public_key=self.key, heartbeat_interval=flower.HEARTBEAT_S)
        self.node = flower.Node(node_id=answer.node_id)
        log.info("site %s is connected to %s.", self.site.settings.name, self.site.settings.server)

    def beat(self) -> None:
        """Say every now and then that the site is there, also while it trains."""
        with self.guarded():
            while not self.stopping.wait(flower.HEARTBEAT_S * random.uniform(0.5, 0.7)):
                if not self.insist("SendNodeHeartbeat", heartbeat_interval=flower.HEARTBEAT_S).success:
                    self.activate()

    def leave(self) -> None:
        """Go offline, if the coordinator can still be told."""
        self.stopping.set()
        if self.node.node_id:
            request = flower.request("DeactivateNode", self.node, node_id=self.node.node_id)
            with contextlib.suppress(Failure):
                self.link.call("DeactivateNode", request, LEAVE_WITHIN_S)
        self.link.close()
        self.note(state="stopped")

    def pull(self) -> None:
        """Ask for a message, and answer it if there is one."""
        begun = time.monotonic()
        pulled = self.insist("PullMessages", message_ids=self.last)
        if not pulled.messages_list:
            if self.spare:
                release_freed()
                self.spare = False
            if time.monotonic() - begun < WAITED_S:
                self.stopping.wait(POLL_S * random.uniform(0.8, 1.2))
            return
        self.spare = True
        self.last = [pulled.messages_list[0].metadata.message_id]
        try:
            owed = Owed.take(self.site.path / "owed", pulled)
        except OSError as error:
            log.error("a message could not be kept: %s", explain_error(error))
            with contextlib.suppress(Gone):
                until = deadline_of(pulled.messages_list[0].metadata)
                self.push(*flower.deflated(flower.failure(pulled, UNTOLD)), until)
        except (ValueError, IndexError) as error:
            log.error("a message is not one of Flower's, and is not answered: %s", error)
        else:
            self.finish(owed)

    def finish(self, owed: Owed) -> None:
        """Answer what is owed as far as that is still to be done, and bring the answer back."""
        data = owed.pulled.messages_list[0].metadata
        until = deadline_of(data)
        try:
            if owed.answered() or self.answer(owed, until):
                self.push(*owed.reply(), until, bool(owed.along))
            self.insist("ConfirmMessageReceived", until, run_id=data.run_id, message_object_id=owed.path.name)
        except Gone as error:
            log.info("a message needs no answer any more: %s", error)
        except Leaving:
            with contextlib.suppress(OSError):  # a disk that cannot be written then hides no stop
                owed.forget_beginnings()  # a site that is stopped was not killed by the message
            raise
        owed.settle()

    def answer(self, owed: Owed, until: float) -> bool:
        """Fetch the message's content and have the worker answer it; False if an error was all that could be sent."""
        try:
            if owed.begin() > BEGINNINGS:
                raise RunError(f"the site ended {BEGINNINGS} times in the middle of this message.")
            with ThreadPoolExecutor(AT_ONCE) as pool:
                owed.put_objects(self.fetch_all(pool, owed, until))
            self.ask(owed)
            return True
        except (OSError, RunError) as error:
            if self.stopping.is_set():
                raise Leaving from error
            said = explain_error(error) if isinstance(error, OSError) else str(error)
            log.error("a message could not be answered: %s", said)
            reason = UNTOLD if isinstance(error, OSError) else said
        self.push(*flower.deflated(flower.failure(owed.pulled, reason)), until)
        return False

    def fetch_all(self, pool: ThreadPoolExecutor, owed: Owed, until: float) -> Iterator[bytes]:
        """A message's objects in the order of their names; no more are fetched ahead than are fetched at once."""
        for start in range(0, len(owed.names), AT_ONCE):
            yield from pool.map(lambda name: self.fetch(owed, name, until), owed.names[start : start + AT_ONCE])

    def fetch(self, owed: Owed, name: str, until: float) -> bytes:
        """One object of a message, as soon as the coordinator has it, unless it came with the message."""
        if name in owed.along:
            return owed.along[name]
        run = owed.pulled.messages_list[0].metadata.run_id
        while True:
            answer = self.insist("PullObject", until, run_id=run, object_id=name)
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found or time.monotonic() > until:
                raise Gone("the coordinator has dropped it.")
            self.stopping.wait(POLL_S)

    def push(
        self, request: flower.PushMessagesRequest, objects: flower.Objects, until: float, along: bool = False
    ) -> None:
        """Bring an answer and all of its objects to the coordinator; `along` if it takes them in one call."""
        reply, tree = request.messages_list[0], request.message_object_trees[0]
        names = set(flower.object_ids(tree))
        if along:
            flower.send_along(reply, {name: objects(name) for name in names})

        def bring(name: str) -> bool:
            fields = {"run_id": reply.metadata.run_id, "object_id": name, "object_content": objects(name)}
            return bool(self.insist("PushObject", until, session_id=taken.session_id, **fields).stored)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            while True:
                taken = self.insist("PushMessages", until, messages_list=[reply], message_object_trees=[tree])
                if not names.issuperset(taken.objects_to_push):
                    raise Gone("the coordinator asks for what is not in the answer.")
                if all(pool.map(bring, taken.objects_to_push)):
                    return
                if time.monotonic() > until:
                    raise Gone("the coordinator does not take its answer.")
                self.stopping.wait(POLL_S)  # its session at the coordinator has expired: what is missing goes again


class Worker:
    """The site's worker, which answers one message after another over a pipe, and is started again when it ends."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.ready: Connection | None = None

    def pipe(self, until: float) -> Connection:
        """The pipe to a worker that has said that it is ready.

        Raises:
            EOFError: there is none by then.
        """
        while time.monotonic() < until:
            pipe, process = self.child.pipe, self.child.process
            if pipe and process and process.poll() is None:
                with contextlib.suppress(EOFError, OSError):  # it ended before it was ready
                    if pipe is self.ready or (pipe.poll(PIPE_S) and pipe.recv_bytes() == READY):
                        self.ready = pipe
                        return pipe
            time.sleep(PIPE_S)
        raise EOFError("no worker is ready.")

    def ask(self, owed: Owed) -> None:
        """Have it answer what is owed.

        Raises:
            RunError: it ended meanwhile, did not come up, or has no answer.
        """
        try:
            pipe = self.pipe(time.monotonic() + WORKER_S)
            pipe.send_bytes(str(owed.path).encode())
            answered = pipe.recv_bytes() == ANSWERED
        except (EOFError, OSError) as error:
            self.ready = None
            raise RunError("the site's worker ended; it is started again.") from error
        if not answered:
            raise RunError(UNTOLD)


def deadline_of(message: Any) -> float:
    """Of time.monotonic: when a message ends. Its time to live is a coordinator's number: inf and NaN are none."""
    return time.monotonic() + (min(message.ttl, LONGEST_TTL_S) if message.ttl >= 0 else 0.0)
