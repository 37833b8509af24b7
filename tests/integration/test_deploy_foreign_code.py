"""A coordinator that was taken over sends an app with code: no site ever runs it."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedpeft import config as configs
from fedpeft.deploy import address, settings
from fedpeft.deploy.coordinator import daemon
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.envelope import Envelope
from fedpeft.deploy.processes import end_children
from fedpeft.simulations.benchmarks import stock_runs
from support.deployed import LABELS, TRAIN, Deployment, until, write_records

PROJECT = """
[project]
name = "evil"
version = "1.0.0"
description = "x"
license = {text = "x"}
dependencies = []
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil.app:app"
clientapp = "evil.app:app"
[tool.flwr.app.config]
"""
STOCK = """
import sys
from pathlib import Path
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
fab = Path(sys.argv[1]).read_bytes()
install_from_fab(fab, skip_prompt=True)
import hashlib
get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)(
    "evil/evil", "1.0.0", hashlib.sha256(fab).hexdigest())
"""


@pytest.fixture
def taken_over(tmp_path):
    """A SuperLink with nobody of ours behind it, and a site that trusts it."""
    made = Deployment(tmp_path)
    write_records(tmp_path / "own.csv", 20, 0)
    made.add_site("clinic", tmp_path / "own.csv")
    server = settings.server(made.coordinator)
    fleet = daemon.fleet_of(server, False, settings.environment(made.coordinator))
    fleet.start()
    control = Control(server, insecure=False)
    try:
        until(lambda: all(address.answers(*place) for place in daemon.ports(server)), "the SuperLink")
        control.register_missing()
        made.start("clinic")
        yield made, server, control
    finally:
        made.close()
        end_children([fleet])


def test_the_app_that_a_coordinator_sends_is_never_run(taken_over, tmp_path, monkeypatch):
    made, server, control = taken_over
    marker = tmp_path / "was-here"
    code = f"open({str(marker)!r}, 'w').close()\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    files = {"pyproject.toml": PROJECT.encode(), "evil/__init__.py": code.encode(), "evil/app.py": code.encode()}
    (tmp_path / "evil.fab").write_bytes(build_fab_from_files(files)[0])
    home = {**settings.environment(tmp_path / "elsewhere")}
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "evil.fab")], env=home, check=True, timeout=60)
    assert marker.exists()  # Flower's own client does run it
    marker.unlink()

    stock_runs.start_run(control.client, files)
    ca = (made.coordinator / "ca.crt").read_bytes()
    executor = stock_runs.connect_executor(server.control, ca, (made.coordinator / "secret").read_bytes())
    grid = HttpGrid(server.control, False, ca, token=stock_runs.take_token(executor))
    given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    grid.set_run(run_from_proto(given.run))
    identity = {"_run_id": given.run.run_id, "_node_id": given.context.node_id, "_task_id": given.task_id}
    for name, value in identity.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    (node,) = until(lambda: list(grid.get_node_ids()), "the site")

    tree = configs.to_tree(configs.load(TRAIN))
    tree["strategy"]["name"] = "evil.app:app"
    bare = Message(RecordDict({"config": ConfigRecord({"task": "{}"})}), node, "train")
    named = Message(RecordDict({"config": ConfigRecord({"task": '{"round": 1}'})}), node, "train")
    Envelope("run-1", yaml.safe_dump(tree), tuple(LABELS), "").put(named, "clinic")
    said = [reply.error.reason for message in (bare, named) for reply in grid.send_and_receive([message], timeout=90)]
    assert len(said) == 2 and "does not say what run" in said[0] and "strategy.name" in said[1]
    assert not marker.exists()
    assert not list((tmp_path / "clinic").rglob("evil*")), "the app was unpacked at the site"


def test_nobody_without_the_secret_is_given_work(taken_over):
    """Another user of the coordinator's machine reaches the port, but is handed no task."""
    _, server, control = taken_over
    stock_runs.start_run(control.client, {"pyproject.toml": PROJECT.encode(), "evil/__init__.py": b""})
    stranger = stock_runs.connect_executor(server.control, (server.path / "ca.crt").read_bytes(), b"guessed")
    with pytest.raises(httpx.HTTPStatusError) as refused:
        stock_runs.take_token(stranger)
    assert refused.value.response.status_code == 401
