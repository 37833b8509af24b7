"""The coordinator's side of Flower's Control API, on loopback: sites, runs.

Flower's open-source SuperLink has no user accounts: who reaches this port may submit runs. It is bound to 127.0.0.1,
and what is submitted is never executed: the coordinator and the sites run the fedpeft that is installed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from fedpeft import __version__
from fedpeft.deploy.coordinator.flower import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    UnregisterNodeRequest,
    control_client,
    start_run_request,
)
from fedpeft.deploy.settings import Server
from fedpeft.errors import RunError

# Flower needs an app to start a run. This one has no code, and nobody would execute it if it had.
APP = f"""
[project]
name = "fedpeft-run"
version = "{__version__}"
description = "Names a run; its code is the installed fedpeft."
license = {{text = "Apache-2.0"}}
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "fedpeft"
[tool.flwr.app.components]
serverapp = "fedpeft:none"
clientapp = "fedpeft:none"
[tool.flwr.app.config]
run = ""
"""


@dataclass(frozen=True)
class RegisteredNode:
    """A site as the SuperLink knows it."""

    id: int
    name: str
    key: bytes
    status: str
    online_until: str


class Control:
    """A connection to the running coordinator."""

    def __init__(self, server: Server, insecure: bool) -> None:
        self.server = server
        root = None if insecure else (server.path / "ca.crt").read_bytes()
        self.client = control_client(server.control, root)

    def nodes(self) -> list[RegisteredNode]:
        """The SuperLink's nodes that have not been unregistered, online or not."""
        answer = self.client.ListNodes(ListNodesRequest())
        return [
            RegisteredNode(node.node_id, node.name, node.public_key, node.status, node.online_until)
            for node in answer.nodes_info
            if node.status != "unregistered"
        ]

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
            if node.key and node.name and (node.name, node.key) not in wanted:
                self.unregister(node.id)
        known = {(node.name, node.key) for node in nodes}
        for name, key in sorted(wanted - known):
            self.register(name, key)

    def start_run(self, name: str) -> int:
        """Have Flower start a run that carries this name and no code; Flower's number of it."""
        answer = self.client.StartRun(start_run_request({"pyproject.toml": APP.encode()}, {"run": name}))
        if not answer.run_id:
            raise RunError(f"{name}: the SuperLink did not start it; see logs/superlink.log.")
        return int(answer.run_id)

    def stop_run(self, number: int) -> None:
        """End a run; one that has ended or is not known is left alone."""
        try:
            self.client.StopRun(StopRunRequest(run_id=number))
        except httpx.HTTPStatusError:
            return

    def run_status(self, number: int) -> str:
        """Flower's word for how far a run is (pending, starting, running, finished); empty if it has no such run."""
        try:
            runs: Any = self.client.ListRuns(ListRunsRequest(run_id=number)).run_dict
        except httpx.HTTPStatusError:
            return ""
        return str(runs[number].status.status) if number in runs else ""

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
