"""examples/flower_app: its server and client on our grid, and by Flower's own command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

import fedpeft
from fedpeft.simulations.grid import LocalGrid

FOLDER = Path(fedpeft.__file__).parents[1] / "examples" / "flower_app"
MODULES = ("digits_app", "digits_app.task", "digits_app.client", "digits_app.server")


@pytest.fixture
def app(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    task, client, server = (importlib.import_module(name) for name in MODULES[1:])
    yield SimpleNamespace(task=task, client=client.app, main=server.main)
    for name in MODULES:
        sys.modules.pop(name, None)


def config(**changed):
    return tomllib.loads((FOLDER / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"] | changed


@pytest.mark.parametrize(("strategy", "still"), [("fedsvd", ()), ("ffa_lora", ("lora_A",)), ("fedadam", ())])
def test_any_strategy_trains_what_it_says_and_leaves_an_adapter(app, tmp_path, capsys, strategy, still):
    grid = LocalGrid(lambda: app.client, {node + 2: {"partition-id": node, "num-partitions": 40} for node in range(3)})
    told = config(rounds=2, strategy=strategy, out=str(tmp_path / "adapter"), **{"local-steps": 2})
    app.main(grid, SimpleNamespace(run_config=told))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said if line.startswith("round")] == ["round 0", "round 1", "round 2"]
    start = get_peft_model_state_dict(app.task.build())
    loaded = PeftModel.from_pretrained(app.task.build().unload(), tmp_path / "adapter")
    ended = get_peft_model_state_dict(loaded)
    assert ended.keys() == start.keys()
    for name, value in ended.items():
        assert torch.equal(value, start[name]) == any(part in name for part in still), name


def test_no_record_is_with_two_clients_or_with_a_client_and_the_server(app):
    parts = [app.task.records(part, 3)[0] for part in range(3)] + [app.task.test_records()[0]]
    assert sum(map(len, parts)) == len(app.task._digits()[0])
    whole = torch.cat(parts).flatten(1)
    assert len(whole.unique(dim=0)) == len(whole)


@pytest.mark.slow
def test_flwr_run_runs_it(tmp_path):
    """As its README has it, in an environment of its own; the local SuperLink that Flower starts is ended."""
    env = os.environ | {"FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    told = f'rounds=3 out="{tmp_path / "adapter"}"'
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(FOLDER), "--stream", "--run-config", told]
    try:
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    finally:
        subprocess.run(["pkill", "-f", f"flower-superlink.*{tmp_path}"], check=False)
    print(done.stdout[-3000:], done.stderr[-2000:])
    rounds = [line for line in done.stdout.splitlines() if line.startswith("round ") and " accuracy " in line]
    assert done.returncode == 0 and len(rounds) == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
