"""Every name that Flower keeps private and that we use is imported in one of a few files, and is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from fedpeft.deploy.coordinator.fleet import FleetApi
from fedpeft.deploy.flower import METHODS

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "flwr",
    "flwr.app",
    "flwr.clientapp",
    "flwr.clientapp.typing",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.simulation",
}
PLACES = (
    "fedpeft/flower.py",
    "fedpeft/deploy/flower.py",
    "fedpeft/deploy/coordinator/flower.py",
    "fedpeft/deploy/coordinator/fleet.py",
    "simulations/benchmarks/stock_runs.py",
)
# Not imported by name: what is read, called or set of what is imported.
ATTRIBUTES = (
    ("flwr.app", "Metadata.ttl"),
    ("flwr.supercore.run", "Run.create_empty"),
    ("flwr.supercore.task_identity", "TaskIdentity._run_id"),
    ("flwr.supercore.task_identity", "TaskIdentity._node_id"),
    ("flwr.supercore.task_identity", "TaskIdentity._task_id"),
    ("flwr.supercore.control", "ControlHttpClient.from_server_address"),
    ("flwr.supercore.control", "ControlHttpClient.ListNodes"),
    ("flwr.supercore.control", "ControlHttpClient.ListRuns"),
    ("flwr.supercore.control", "ControlHttpClient.RegisterNode"),
    ("flwr.supercore.control", "ControlHttpClient.UnregisterNode"),
    ("flwr.supercore.control", "ControlHttpClient.StartRun"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.AcquireTask"),
    ("flwr.server.superlink.linkstate", "SqlLinkState.get_node_id_by_public_key"),
    ("flwr.server.superlink.linkstate", "SqlLinkState.get_node_info"),
    ("flwr.server.superlink.linkstate", "SqlLinkState.object_store"),
)


def private(path: Path) -> set[tuple[str, str]]:
    """Module and name of all that a file imports of Flower beyond its public interface, also inside functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {
        (node.module, alias.name)
        for node in nodes
        if node.module and node.module.split(".")[0] == "flwr" and node.module not in PUBLIC
        for alias in node.names
    }


NAMES = sorted({*ATTRIBUTES, *(name for place in PLACES for name in private(ROOT / place))})


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda text: text)
def test_flower_has_what_we_use_of_its_private_parts(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)


def test_each_method_of_the_fleet_api_has_its_function_with_the_parts_that_we_have():
    for name in METHODS:
        wanted = inspect.signature(FleetApi.handler(name)).parameters
        assert next(iter(wanted)) == "request" and {*wanted} <= {"request", "state", "store", "enable_supernode_auth"}
    assert len(METHODS) == 12


def test_nothing_else_imports_flower_s_private_parts():
    folders = ("fedpeft", "strategies", "clients", "simulations")
    files = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert not [name for name in files - {*PLACES} if private(ROOT / name)]
    assert len(NAMES) > 40


def test_a_look_at_flower_s_messages_sees_what_its_pull_would_take(tmp_path):
    """One look for all nodes, of Flower's own table; what is delivered or has expired is not there for either."""
    api, now = FleetApi(tmp_path / "state.db", insecure=True), time.time()
    assert api.nodes_with_messages() == set()
    rows = {2**64 - 5: ("", now), 7: ("", now), 8: ("2026-11-29T00:00:00+00:00", now), 9: ("", now - 100)}
    with closing(sqlite3.connect(api.database)) as state, state:
        for node, (delivered, created) in rows.items():
            signed = node - 2**64 if node >= 2**63 else node
            state.execute(
                "INSERT INTO message_ins (message_id, dst_node_id, delivered_at, created_at, ttl) "
                "VALUES (?, ?, ?, ?, 50)",
                (str(node), signed, delivered, created),
            )
    assert api.nodes_with_messages() == {2**64 - 5, 7}
    for node in rows:  # Flower takes them, and finds that they are of no run
        assert api.state.get_message_ins(node, 1) == []
    assert api.nodes_with_messages() == set()
    api.database.unlink()
    assert api.nodes_with_messages() == set()
