"""Flower's Grid as a run sees it: sites by their registered names, the run's record on every message, late replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedpeft.deploy import parcel
from fedpeft.deploy.coordinator.flower import error_reply
from fedpeft.deploy.envelope import Envelope
from fedpeft.deploy.keys import pem
from fedpeft.flower import ErrorCode, OwnGrid
from fedpeft.foreign import shown
from fedpeft.strategies.wire import Packed

log = logging.getLogger("fedpeft")
LATE_S = 5.0  # between looks for late replies
FROM_SITES = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.CLIENT_APP_CRASHED)
Record = Callable[[dict[str, Any]], None]


class SiteGrid(OwnGrid):
    """A Grid over real sites.

    Args:
        deadline_s: of a round. A message lives for two deadlines: a site that was away does not work through all that
            was asked meanwhile, and one that is late is heard, if only to say so.
        record: receives an event for every late reply.
        wait: returns when one of the messages that it is given was answered, or after a while.
        ready: returns when answers may be read.
    """

    def __init__(
        self,
        grid: Grid,
        cover: Envelope,
        deadline_s: float | None,
        record: Record,
        wait: Callable[[list[str]], None],
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(grid.run)
        self.grid, self.cover, self.deadline_s, self.record, self.wait = grid, cover, deadline_s, record, wait
        self.ready = ready
        self.names: dict[int, str] = {}
        self.sent: dict[str, int] = {}
        self.late: dict[str, tuple[int, float]] = {}
        self.looked = 0.0
        self.transfer_s = {"push_s": 0.0, "pull_s": 0.0}

    def get_nodes(self) -> Iterable[Any]:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            message.content = parcel.pack_content(message.content)
            self.cover.put(message, self.names.get(node, ""))
            if self.deadline_s is not None:
                message.metadata.ttl = 2 * self.deadline_s
        begun = time.monotonic()
        names = list(self.grid.push_messages(messages))
        self.transfer_s["push_s"] += time.monotonic() - begun
        self.sent |= {name: message.metadata.dst_node_id for name, message in zip(names, messages, strict=True) if name}
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        self.ready()
        self.look_for_late()
        names = list(message_ids)
        self.wait(names)
        begun = time.monotonic()
        for reply in map(unpacked, self.grid.pull_messages(names)):
            self.transfer_s["pull_s"] += time.monotonic() - begun
            self.sent.pop(reply.metadata.reply_to_message_id, None)
            yield reply
            begun = time.monotonic()  # what its reader did with it is no transfer

    def transferred_s(self) -> dict[str, float]:
        """Seconds of pushing messages and of pulling replies since the last call."""
        spent = {key: round(value, 3) for key, value in self.transfer_s.items()}
        self.transfer_s = dict.fromkeys(self.transfer_s, 0.0)
        return spent

    def cancel(self, message_ids: Iterable[str]) -> None:
        """The deadline has passed: what still comes in is late."""
        until = time.monotonic() + 2 * (self.deadline_s or 0.0)
        self.late |= {name: (self.sent.pop(name), until) for name in message_ids}

    def look_for_late(self) -> None:
        """Take late replies off the SuperLink, and say whose they were."""
        if not self.late or time.monotonic() - self.looked < LATE_S:
            return
        self.looked = time.monotonic()
        for reply in self.grid.pull_messages(list(self.late)):
            node, _ = self.late.pop(reply.metadata.reply_to_message_id)
            if reply.has_error() and reply.error.code not in FROM_SITES:
                continue  # Flower's word that the message has expired
            site = self.names.get(node, str(node))
            what = "reported an error" if reply.has_error() else "sent its update"
            log.warning("%s %s after the deadline; it is dropped.", site, what)
            said = shown(reply.error.reason) if reply.has_error() else None
            self.record({"event": "late", "client": site, "error": said})
        # Those whose message has expired are given up, or the list would grow with every round.
        self.late = {name: (node, until) for name, (node, until) in self.late.items() if self.looked < until}


def unpacked(reply: Message) -> Message:
    """A reply with what a site packed; an error where that cannot be opened."""
    if not reply.has_content():
        return reply
    try:
        reply.content = parcel.unpack_content(reply.content)
    except Exception as error:  # of bytes that somebody else made, whatever is wrong with them
        return error_reply(reply.metadata, Error(ErrorCode.UNKNOWN, shown(f"unreadable reply: {error!r}")))
    return reply


class Roster(Packed):
    """Packed messages to sites by their registered names; who is connected is asked anew for every round.

    Args:
        registered: name -> public key of the sites that may take part; None asks each node for its name.
        waiting: told what is waited for, and None when it is there.
    """

    def __init__(
        self, grid: SiteGrid, registered: Callable[[], dict[str, str]] | None, waiting: Callable[[str | None], None]
    ) -> None:
        self.sites, self.registered, self.waiting = grid, registered, waiting

    def roster(self, grid: Grid, expected: int | None) -> dict[str, int]:
        """Name -> node of every connected site, once at least `expected` are; there is no limit to the wait."""
        said = ""
        while len(found := self.connected()) < (expected or 1):
            text = f"{len(found)} of {expected or 1} sites are connected{self.named_missing(found)}"
            if text != said:
                log.info("waiting: %s", text)
                self.waiting(text)
                said = text
            time.sleep(1.0)
        self.waiting(None)
        return found

    def named_missing(self, found: dict[str, int]) -> str:
        """The sites that may take part and are not there, as the end of a sentence."""
        missing = sorted(set(self.registered()) - set(found)) if self.registered else []
        return f"; not {', '.join(missing)}" if missing else ""

    def connected(self) -> dict[str, int]:
        """Name -> node of the sites that are online and may take part, which the grid then knows by name too."""
        nodes = list(self.sites.get_nodes())
        if self.registered is None:
            found = super().roster(self.sites, 1) if nodes else {}
        else:
            allowed = {name: pem(line) for name, line in self.registered().items()}
            # Key and name: a node whose key was replaced meanwhile may still be connected.
            found = {node.name: node.node_id for node in nodes if allowed.get(node.name) == node.public_key}
        self.sites.names = {node: name for name, node in found.items()}
        return found
