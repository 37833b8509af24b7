"""Flower's SuperLink, and its Fleet API on the same state: private as all in `coordinator.flower`, a second to import.

What sites call is answered by Flower's own functions in the process that they reach, on the state that the SuperLink
has too: over HTTP a call costs a multiple of that.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import re
import sqlite3
import sys
import time
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.cli.flower_superlink import flower_superlink
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from fedpeft.deploy.coordinator.flower import Refusal, read_request

log = logging.getLogger("fedpeft")
# Of Flower's own tables, as its pull of one node takes from them.
WAITING = "SELECT DISTINCT dst_node_id FROM message_ins WHERE delivered_at = '' AND created_at + ttl > ?"
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
NO_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def run_superlink(*arguments: str) -> None:
    """Be Flower's SuperLink, with the options of its command line."""
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def disk_trouble(error: Exception, database: Path) -> OSError | None:
    """What the disk said where an error of Flower's state is the disk's; one that is only busy is to be tried again."""
    cause = getattr(error, "orig", None)  # SQLAlchemy's, of SQLite's
    code = cause.sqlite_errorcode & 0xFF if isinstance(cause, sqlite3.OperationalError) else -1
    if code in LOCKED:
        return OSError(errno.EAGAIN, "busy", str(database))
    full = code == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if full else errno.EIO, str(cause), str(database)) if code in NO_DISK else None


class FleetApi:
    """Flower's Fleet API: its own functions, called in this process.

    Flower's HTTP server compares the caller's key with the node that a call is of. There is no such server in between,
    so that is done here; signatures are looked at by the caller.
    """

    def __init__(self, database: Path, insecure: bool) -> None:
        self.database, self.insecure, self.state = database, insecure, self.opened(database)
        self.parts = {
            "state": self.state,
            "store": self.state.object_store,
            "enable_supernode_auth": not insecure,
        }

    @staticmethod
    def opened(database: Path) -> SqlLinkState:
        """Flower's runs, nodes and messages on the disk; a SuperLink has made the file."""
        store = ObjectStoreFactory(str(database))
        return cast(SqlLinkState, LinkStateFactory(str(database), NoOpFederationManager(), store).state())

    @staticmethod
    def handler(method: str) -> Any:
        """Flower's function behind a method."""
        return getattr(fleet_handlers, re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower())

    def call(self, method: str, body: bytes, key: bytes) -> bytes:
        """The answer to a call of who holds this key.

        Raises:
            Refusal: by Flower, with its number, or there is no answer.
        """
        asked = read_request(method, body)
        handler = self.handler(method)
        wanted = inspect.signature(handler).parameters
        try:
            self.require_own(asked, key)
            answer = handler(asked, **{name: part for name, part in self.parts.items() if name in wanted})
        except FlowerError as error:
            said = API_ERROR_MAP[error.code]
            raise Refusal(said.http_status_code, json.dumps(error.to_json(said.public_message))) from error
        except Refusal:
            raise
        except Exception as error:
            if trouble := disk_trouble(error, self.database):
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"the coordinator's disk: {trouble.strerror}.") from error
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the coordinator cannot answer this call.") from error
        return bytes(answer.SerializeToString())

    def require_own(self, asked: Any, key: bytes) -> None:
        """Refuse a call of another node than the key's."""
        fields = asked.DESCRIPTOR.fields_by_name
        if self.insecure:
            return
        if "public_key" in fields:
            if asked.public_key != key:
                raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid node: the key is not the caller's.")
            return
        named = {(asked.node if "node" in fields else asked).node_id}
        if "messages_list" in fields:
            named |= {message.metadata.src_node_id for message in asked.messages_list}
        if named != {self.node_of(key)}:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid node ID.")

    def node_of(self, key: bytes) -> int | None:
        """Flower's number of the node with this key."""
        return self.state.get_node_id_by_public_key(key)

    def nodes_with_messages(self) -> set[int]:
        """The nodes for which Flower has a message that it has not handed out; none while it cannot be asked."""
        try:
            with closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True)) as state:
                return {node % 2**64 for (node,) in state.execute(WAITING, (time.time(),))}
        except sqlite3.Error as error:
            log.debug("no look at Flower's messages: %s", error)
            return set()

    def online(self, key: bytes) -> int | None:
        """Flower's number of a node that counts as connected; None if the key has none."""
        node = self.node_of(key)
        found = [] if node is None else self.state.get_node_info(node_ids=[node], statuses=[NodeStatus.ONLINE])
        return node if found else None
