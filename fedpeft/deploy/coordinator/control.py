"""The coordinator's side of Flower's Control API, on loopback: which sites may come, and which are connected.

Flower's open-source SuperLink has no user accounts: who reaches this port may submit runs. It is bound to 127.0.0.1,
and what is submitted is never executed: nobody takes it from the SuperLink.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from fedpeft.deploy.coordinator.flower import (
    ListNodesRequest,
    NodeInfo,
    NodeStatus,
    RegisterNodeRequest,
    UnregisterNodeRequest,
    control_client,
)
from fedpeft.deploy.settings import Server
from fedpeft.errors import RunError

log = logging.getLogger("fedpeft")
RETRY_S = 0.1  # while the SuperLink is being started


class Control:
    """A connection to the running coordinator."""

    def __init__(self, server: Server, insecure: bool) -> None:
        self.server = server
        root = None if insecure else (server.path / "ca.crt").read_bytes()
        self.client = control_client(server.control, root)

    def nodes(self) -> list[NodeInfo]:
        """The SuperLink's nodes that have not been unregistered, online or not."""
        answer = self.client.ListNodes(ListNodesRequest())
        return [node for node in answer.nodes_info if node.status != NodeStatus.UNREGISTERED]

    def online(self) -> list[NodeInfo]:
        """The nodes that count as connected, as soon as the SuperLink answers."""
        while True:
            try:
                return [node for node in self.nodes() if node.status == NodeStatus.ONLINE]
            except httpx.TransportError as error:
                log.debug("the SuperLink does not answer: %s", error)
                time.sleep(RETRY_S)

    def register(self, name: str, key: bytes) -> None:
        """Let the holder of this public key, in PEM, connect under the name."""
        self.client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: int) -> None:
        """Shut a node out; the SuperLink keeps it, as unregistered."""
        self.client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def register_missing(self) -> None:
        """Make the SuperLink's sites those of the folder."""
        nodes, wanted = self.nodes(), set(self.server.site_keys().items())
        for node in nodes:
            # Key and name together: a site that made a new key is another one to the SuperLink.
            if node.public_key and node.name and (node.name, node.public_key) not in wanted:
                self.unregister(node.node_id)
        known = {(node.name, node.public_key) for node in nodes}
        for name, key in sorted(wanted - known):
            self.register(name, key)

    def close(self) -> None:
        """Close the HTTP connection; the coordinator goes on."""
        self.client.close()


@contextmanager
def connect_once(server: Server, insecure: bool) -> Iterator[Control]:
    """A connection for one command.

    Raises:
        RunError: the coordinator does not answer.
    """
    control = Control(server, insecure)
    try:
        yield control
    except httpx.HTTPError as error:
        raise RunError(
            f"the coordinator does not answer on {server.control}: {error}. Is `fedpeft server start "
            f"{server.path}` running?"
        ) from error
    finally:
        control.close()
