"""fedpeft strategies in a stock Flower app, and stock Flower strategies on our grid."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from fedpeft.errors import InputError
from fedpeft.simulations.grid import LocalGrid
from fedpeft.strategies import prepare_client
from support.guides import COMMANDS

SOURCE = Path(__file__).parents[1] / "support" / "stock_app.py"
SIMULATE = """

from flwr.simulation import run_simulation
from safetensors.torch import save_file

resources = {{"client_resources": {{"num_cpus": 1}}, "init_args": {{"num_cpus": 2}}}}
run_simulation(server, client, num_supernodes=3, backend_config=resources)
save_file(dict(RESULT[0].arrays.to_torch_state_dict()), {out!r})
"""


@pytest.fixture
def app():
    spec = importlib.util.spec_from_file_location("stock_app", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid(app, nodes: int = 3) -> LocalGrid:
    return LocalGrid(
        lambda: app.client, {node + 2: {"partition-id": node, "num-partitions": nodes} for node in range(nodes)}
    )


def check_fedsvd(app, arrays) -> None:
    start = get_peft_model_state_dict(app.build())
    assert arrays.keys() == start.keys()
    moved = 0
    for name, A in arrays.items():
        if "lora_A" in name:
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)
            first = start[name]
            inside = first.T @ torch.linalg.pinv(first.T)
            torch.testing.assert_close(A @ inside, A, atol=1e-4, rtol=0)  # the row space is that of the first A
            moved += float(arrays[name.replace("lora_A", "lora_B")].norm())
    assert moved > 1e-3


def test_the_app_is_short():
    assert len([line for line in SOURCE.read_text().splitlines() if line.strip()]) <= 40


@pytest.mark.timeout(900)
def test_fedsvd_runs_under_flowers_own_simulation(app, tmp_path):
    """In a process of its own: where Ray hangs and is cut off, it takes its process with it."""
    code = SOURCE.read_text() + SIMULATE.format(out=str(tmp_path / "arrays.safetensors"))
    for _ in range(2):  # beside other clusters that start, Ray does not always come up
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], start_new_session=True, cwd=tmp_path)
        try:
            assert child.wait(400) == 0
            break
        except subprocess.TimeoutExpired:
            print("Flower's simulation hung")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    check_fedsvd(app, load_file(tmp_path / "arrays.safetensors"))


def test_the_app_of_the_docs_runs_as_it_stands_there(app, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"<!-- this app is run by the tests -->\n```python no-run\n(.*?)```", COMMANDS.read_text(), re.S
    )
    names: dict = {}
    exec(compile(code, "commands.md", "exec"), names)  # as a reader would run it
    names["server"](grid(types.SimpleNamespace(client=names["client"])), None)
    check_fedsvd(app, torch.load(tmp_path / "adapter.pt"))
    assert "was trained" not in caplog.text


def message_of(app, trains):
    arrays = ArrayRecord(get_peft_model_state_dict(app.build()))
    return types.SimpleNamespace(content=RecordDict({"arrays": arrays, "config": ConfigRecord({"trains": trains})}))


def test_a_prepared_client_trains_what_the_round_trains_and_nothing_else(app):
    model, other = app.build(), app.build()
    for value in model.parameters():
        value.data.add_(1.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for trains, wanted in ((["B", "head"], {"lora_B", "classifier"}), (["A"], {"lora_A"})):  # RoLoRA's turn
        trained = {id(value) for value in prepare_client(model, message_of(app, trains))}
        names = {name for name, value in model.named_parameters() if id(value) in trained}
        assert names == {name for name, value in model.named_parameters() if value.requires_grad}
        assert {kind for kind in ("lora_A", "lora_B", "classifier") for name in names if kind in name} == wanted
        assert all(any(kind in name for kind in wanted) for name in names)
    sent = get_peft_model_state_dict(other)
    assert all(torch.equal(value, sent[name]) for name, value in get_peft_model_state_dict(model).items())
    frozen = "base_model.model.vit.embeddings.cls_token"
    assert torch.equal(dict(model.named_parameters())[frozen], before[frozen])


def test_what_does_not_fit_a_client_is_refused_by_name(app):
    message = message_of(app, ["B", "head"])
    with pytest.raises(InputError, match="no `arrays` with a config `trains`"):
        prepare_client(app.build(), types.SimpleNamespace(content=RecordDict({})))
    model = app.build()
    model.base_model.model.vit.embeddings.cls_token.requires_grad_(True)
    with pytest.raises(InputError, match=r"trains \S+cls_token, which is not sent"):
        prepare_client(model, message)
    with pytest.raises(InputError, match=r"the model has no \S+lora_"):
        prepare_client(torch.nn.Linear(2, 2).requires_grad_(False), message)


def test_the_same_app_runs_on_our_grid(app):
    app.main(grid(app), None)
    check_fedsvd(app, app.RESULT[0].arrays.to_torch_state_dict())


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_a_stock_strategy_runs_on_our_grid(app, strategy):
    start = ArrayRecord(get_peft_model_state_dict(app.build()))
    result = strategy(fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3).start(
        grid(app), start, num_rounds=2
    )
    arrays, before = result.arrays.to_torch_state_dict(), start.to_torch_state_dict()
    for name, value in arrays.items():
        moved = float((value - before[name]).abs().max())
        assert moved < 1e-6 if "lora_A" in name else moved > 1e-6, name


def test_flowers_own_wrapper_goes_around_a_strategy(app):
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as Clipping

    from fedpeft.strategies import FFALoRA

    def run(strategy, rounds):
        return strategy.start(grid(app), start, num_rounds=rounds).arrays.to_torch_state_dict()

    start = ArrayRecord(get_peft_model_state_dict(app.build()))
    plain = run(FFALoRA(), 2)
    # Without noise and with a bound that nothing reaches, the wrapper changes nothing.
    wrapped = run(Clipping(FFALoRA(), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=3), 2)
    for name, value in plain.items():
        torch.testing.assert_close(wrapped[name], value, atol=1e-6, rtol=0)
    # With a tight bound the mean update of a round has at most that norm.
    clipped = run(Clipping(FFALoRA(), noise_multiplier=0.0, clipping_norm=0.01, num_sampled_clients=3), 1)
    moved = torch.cat([(clipped[name] - value).flatten() for name, value in start.to_torch_state_dict().items()]).norm()
    assert 1e-4 < moved <= 0.01 + 1e-6
