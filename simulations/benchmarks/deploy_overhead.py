"""Rounds are timed beside their training: a deployment on loopback, and stock Flower with a tensor per parameter.

    python -m fedpeft.simulations.benchmarks.deploy_overhead OUT [--stock]

Two sites, TLS, authentication, an adapter of about 1 MB, one local step, the model resident. Stock Flower is its own
SuperLink and SuperNodes as they come (subprocess isolation), with an app that imports torch, as a PyTorch app does,
adds one to 128 tensors of together 1 MB and sends them back: how many times as long that takes is less a matter of what
else the machine does than the seconds are. Writes OUT/overhead.json.
"""

from __future__ import annotations

import csv
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpeft.deploy import settings
from fedpeft.deploy.address import answers
from fedpeft.deploy.coordinator import server as commands
from fedpeft.deploy.coordinator.flower import Control
from fedpeft.deploy.site import site
from fedpeft.simulations.benchmarks import stock_runs

SITES = ("one", "two")
ROUNDS = 12
STOCK_ROUNDS = 3
TENSORS, BYTES = 128, 1_000_000
CONFIG: dict[str, Any] = {
    "model": {"name": "tiny-bert", "task": "sequence-classification"},
    "adapter": {"name": "lora", "r": 130, "alpha": 130, "target_modules": ["all-linear"]},
    "data": {"labels": ["no", "yes"]},
    "strategy": {"name": "fedit"},
    "client": {"optimizer": "sgd", "lr": 0.01, "local_steps": 1, "local_epochs": None, "batch_size": 4},
    "run": {"rounds": ROUNDS},
}
PROJECT = f"""
[project]
name = "stock"
version = "1.0.0"
description = "One tensor per parameter."
license = {{text = "Apache-2.0"}}
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
rounds = {STOCK_ROUNDS}
"""
CLIENT = """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    state = {key: value + 1 for key, value in message.content["arrays"].to_torch_state_dict().items()}
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
"""
SERVER = f"""
import time
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
class Timed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        self.begun = time.monotonic()
        return super().configure_train(server_round, arrays, config, grid)
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        with open("ROUNDS", "a") as file:
            file.write(f"{{time.monotonic() - self.begun:.2f}}\\n")
        return result
app = ServerApp()
@app.main()
def main(grid, context):
    rng = np.random.default_rng(0)
    size = {BYTES} // 4 // {TENSORS}
    arrays = {{f"layer.{{i}}": Array(rng.standard_normal(size, dtype=np.float32)) for i in range({TENSORS})}}
    Timed(min_available_nodes=2, min_train_nodes=2, fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds={STOCK_ROUNDS})
"""


def main(out: Path, stock: bool) -> dict[str, Any]:
    """Measure, write OUT/overhead.json."""
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"bytes": BYTES, "sites": len(SITES), "ours": ours(out / "ours")}
    if stock:
        result["stock"] = stock_flower(out / "stock")
        result["times_as_long"] = round(result["stock"]["median_s"] / result["ours"]["median"]["round_s"], 1)
    (out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def prepared(root: Path, text: str = "word", model: str = "tiny-bert") -> Path:
    """A coordinator's folder and two sites' that it knows, of 16 records each that begin with `text`."""
    coordinator = root / "coordinator"
    port = free_port()
    commands.init(coordinator, "localhost", port, free_port(), "127.0.0.1")
    for name in SITES:
        with (root / f"{name}.csv").open("w", newline="") as file:
            rows = [[f"{text} {index}", "yes" if index % 2 else "no"] for index in range(16)]
            csv.writer(file).writerows([["text", "label"], *rows])
        data = str(root / f"{name}.csv")
        site.init(root / name, name, f"localhost:{port}", coordinator / "ca.crt", data, model)
        (root / name / "policy.yaml").write_text("unit: none\nunbounded: [max_epsilon, max_rounds, records]\n")
        commands.add_site(coordinator, name, str(root / name / "site.pub"))
    return coordinator


def ours(root: Path) -> dict[str, Any]:
    """Rounds of a deployment; the first, in which the sites load the model, is left out."""
    root.mkdir()
    coordinator = prepared(root)
    config = root / "overhead.yaml"
    config.write_text(json.dumps(CONFIG))
    cli = [sys.executable, "-m", "fedpeft.cli.main"]
    starts = {"coordinator": ["server", "start", str(coordinator)]}
    starts |= {name: ["site", "start", str(root / name)] for name in SITES}
    with running(root, {name: [*cli, *command] for name, command in starts.items()}):
        while commands.state(settings.server(coordinator)) is None:
            time.sleep(0.2)
        name = commands.run(coordinator, str(config), [])["run"]
        commands.wait(coordinator, name, lambda event: None)
    run = coordinator / "runs" / name
    rounds = [event for event in commands.events_of(run) if event["event"] == "round"][1:]
    workers = [
        float(found)
        for name in SITES
        for found in re.findall(r"train: answered in ([\d.]+) s", (root / f"{name}.log").read_text())[1:]
    ]
    shown = {"round_s": [event["seconds"] for event in rounds]}
    shown |= {key: [event[key] for event in rounds] for key in ("push_s", "pull_s")}
    parts = {key: statistics.median(values) for key, values in {**shown, "worker_s": workers}.items()}
    rest = parts["round_s"] - parts["push_s"] - parts["pull_s"] - parts["worker_s"]
    return {
        "bytes_up": rounds[-1]["bytes_up"] // len(SITES),
        "rounds_s": shown["round_s"],
        "median": parts,
        "polling_and_fleet_s": round(rest, 3),
        "process_starts": 0,
    }


def free_port() -> int:
    """A TCP port on loopback that is free now; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower_programs(root: Path, coordinator: Path, server: Any) -> dict[str, list[str]]:
    """The command lines of Flower's own SuperLink and SuperNodes, by name."""
    tls = [
        "--ssl-ca-certfile",
        f"{coordinator}/ca.crt",
        "--ssl-certfile",
        f"{coordinator}/server.crt",
        "--ssl-keyfile",
        f"{coordinator}/server.key",
    ]
    programs = Path(sys.executable).parent
    starts = {
        "superlink": [
            f"{programs}/flower-superlink",
            *tls,
            "--enable-supernode-auth",
            "--host",
            "127.0.0.1",
            "--port",
            str(server.settings.control_port),
            "--database",
            f"{coordinator}/state.db",
        ]
    }
    starts |= {
        name: [
            f"{programs}/flower-supernode",
            "--superlink",
            f"localhost:{server.settings.control_port}",
            "--root-certificates",
            f"{coordinator}/ca.crt",
            "--auth-supernode-private-key",
            f"{root / name}/site.key",
            "--port",
            str(free_port()),
        ]
        for name in SITES
    }
    return starts


def stock_flower(root: Path) -> dict[str, Any]:
    """Rounds of Flower's own programs as they come."""
    root.mkdir()
    coordinator = prepared(root)
    server = settings.server(coordinator)
    starts = flower_programs(root, coordinator, server)
    link = {"superlink": starts.pop("superlink")}
    with running(root, link):
        while not answers("127.0.0.1", server.settings.control_port):
            time.sleep(0.2)
        control = Control(server, insecure=False)
        control.register_missing()
        with running(root, starts):
            server_code = SERVER.replace("ROUNDS", str(root / "rounds"))
            files = {
                "pyproject.toml": PROJECT.encode(),
                "stock/__init__.py": b"",
                "stock/client.py": CLIENT.encode(),
                "stock/server.py": server_code.encode(),
            }
            number = stock_runs.start_run(control.client, files)
            while not stock_runs.is_finished(control.client, number):
                time.sleep(1)
    rounds = [float(line) for line in (root / "rounds").read_text().split()]
    return {"tensors": TENSORS, "rounds_s": rounds, "median_s": statistics.median(rounds)}


@contextmanager
def running(root: Path, starts: dict[str, list[str]]) -> Iterator[None]:
    """Programs that run meanwhile, each with a log."""
    env = settings.environment(root)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    processes = []
    for name, command in starts.items():
        with (root / f"{name}.log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True))
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    found = main(Path(sys.argv[1]).absolute(), "--stock" in sys.argv)
    print(json.dumps(found, indent=2))
