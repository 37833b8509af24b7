"""Flower's own node beside ours: it comes by HTTP, with a stock ClientApp that uses peft."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.superlink.grid.http_grid import HttpGrid
from peft import get_peft_model_state_dict

from fedpeft.deploy import address, settings
from fedpeft.deploy.coordinator import daemon
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.processes import end_children
from fedpeft.flower import identify
from fedpeft.simulations.benchmarks import stock_runs
from fedpeft.strategies import FedSVD
from support import stock_app
from support.deployed import LABELS, TRAIN, Deployment, free_ports, until, write_records

PROJECT = """
[project]
name = "stock"
version = "1.0.0"
description = "x"
license = {text = "x"}
dependencies = []
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock.app:server"
clientapp = "stock.app:client"
[tool.flwr.app.config]
"""


def beat(client):
    """Or Flower gives the task up."""
    with contextlib.suppress(Exception):
        while client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
            time.sleep(5)


def start_stock_node(made, env):
    """Flower's own node, as site `stock` of a deployment."""
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        *("--superlink", f"localhost:{made.http_port}", "--root-certificates", str(made.coordinator / "ca.crt")),
        *("--auth-supernode-private-key", str(made.root / "stock" / "site.key")),
        *("--port", str(free_ports(1)[0]), "--node-config", "partition-id=0 num-partitions=1"),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**env, "PATH": path, "FLWR_HOME": str(made.root / "flwr")}
    with (made.root / "stock.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_fedpeft_goes_on_without_a_stock_node_that_it_asks(tmp_path):
    """Which would be waited for, as it is connected: no round of this run has a deadline."""
    made = Deployment(tmp_path)
    for seed, name in enumerate(("ours", "stock")):
        write_records(tmp_path / f"{name}.csv", 30, seed)
        made.add_site(name, tmp_path / f"{name}.csv")
    made.start("coordinator")
    made.ready()
    made.start("ours")
    node = start_stock_node(made, settings.environment(made.coordinator))
    try:
        run = made.submit({**TRAIN, "data": {"labels": LABELS}}, "run.rounds=2")
        made.wait(run, 300)
        assert [event["clients"] for event in made.rounds(run)] == [["ours"]] * 2
        assert all("asks for an app" in event["quarantined"]["stock"] for event in made.rounds(run))
        assert node.poll() is None
        assert "not in `RUNNING` status" in (tmp_path / "stock.log").read_text()
    finally:
        node.terminate()
        node.wait(20)
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stock_node_takes_part_by_http_beside_one_of_ours(tmp_path):
    """Ours is connected too; it runs no app that comes from elsewhere, and says so."""
    made = Deployment(tmp_path)
    write_records(tmp_path / "own.csv", 20, 0)
    for name in ("ours", "stock"):
        made.add_site(name, tmp_path / "own.csv")
    server = settings.server(made.coordinator)
    env = settings.environment(made.coordinator)
    fleet = daemon.fleet_of(server, False, env)
    fleet.start()
    node = None
    try:
        until(lambda: all(address.answers(*place) for place in daemon.ports(server)), "the ports")
        control = Control(server, insecure=False)
        control.register_missing()
        made.start("ours")
        node = start_stock_node(made, env)
        until(lambda: [one.status for one in control.nodes()] == ["online"] * 2, "both nodes", 120)
        app = Path(stock_app.__file__).read_bytes()
        files = {"pyproject.toml": PROJECT.encode(), "stock/__init__.py": b"", "stock/app.py": app}
        stock_runs.start_run(control.client, files)
        ca = (made.coordinator / "ca.crt").read_bytes()
        executor = stock_runs.connect_executor(server.control, ca, (made.coordinator / "secret").read_bytes())
        token = until(lambda: stock_runs.take_token(executor), "the run's task")
        grid = HttpGrid(server.control, False, ca, token=token)
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        identify(given.run.run_id, given.context.node_id, given.task_id)
        grid.set_run(run_from_proto(given.run))
        threading.Thread(target=beat, args=(grid._runtime_client,), daemon=True).start()
        start = ArrayRecord(get_peft_model_state_dict(stock_app.build()))
        result = FedSVD().start(grid, start, num_rounds=1, timeout=400)
    finally:
        if node is not None:
            node.terminate()
            node.wait(20)
        made.close()
        end_children([fleet])
        print((tmp_path / "stock.log").read_text()[-3000:])
    moved = result.arrays.to_torch_state_dict()
    before = start.to_torch_state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in moved.items() if "lora_B" in name)
    assert "does not say what run" in made.log("ours")
