"""fedpeft's strategies in a stock Flower app: `start()` with an array per tensor under peft's names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpeft import registry
from fedpeft.errors import RunError
from fedpeft.strategies.rules.fedit import FedIT
from support.scripted import Reply, ScriptedGrid

pytestmark = pytest.mark.usefixtures("flower_run")

NAMES = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.zeros(3, 2)}


def initial_arrays() -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in NAMES.items()})


def stock(step: dict[str, float], count: int = 10) -> Reply:
    """A stock client: loads arrays by name, adds step[factor], returns all of them."""

    def reply(message: Message) -> RecordDict:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        moved = {name: Array(value + np.float32(step.get(name.split(".")[-2], 0.0))) for name, value in arrays.items()}
        return RecordDict(
            {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": count, "train_loss": 2.0})}
        )

    return reply


def test_start_runs_in_a_stock_flower_app():
    clients = {"1": stock({"lora_A": 1.0, "lora_B": 1.0}, 10), "2": stock({"lora_A": 4.0, "lora_B": 4.0}, 30)}
    grid = ScriptedGrid(clients, {"1": 1, "2": 2})
    seen = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((number, float(arrays["base_model.model.q.lora_B.weight"].numpy()[0, 0])))
        return MetricRecord({"accuracy": 0.1 * number})

    result = FedIT().start(
        grid, initial_arrays(), num_rounds=2, timeout=5, train_config=ConfigRecord({"lr": 0.1}), evaluate_fn=evaluate
    )
    assert seen == [(0, 0.0), (1, 3.25), (2, 6.5)]
    assert set(result.arrays) == set(NAMES)
    np.testing.assert_allclose(
        result.arrays["base_model.model.q.lora_A.weight"].numpy(), np.full((2, 4), 7.5), rtol=1e-6
    )
    assert result.train_metrics_clientapp[2]["train_loss"] == 2.0
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == pytest.approx(0.2)
    config = grid.sent["1"][1].content["config"]
    assert config["server-round"] == 2 and config["lr"] == 0.1


class FrozenA(FedIT):
    """B only."""

    trains = ("B", "head")


def test_start_quarantines_a_client_that_trained_a_frozen_factor(caplog):
    clients = {"1": stock({"lora_B": 1.0}), "2": stock({"lora_A": 1.0, "lora_B": 9.0})}
    result = FrozenA().start(ScriptedGrid(clients, {"1": 1, "2": 2}), initial_arrays(), num_rounds=1, timeout=5)
    assert np.array_equal(result.arrays["base_model.model.q.lora_A.weight"].numpy(), np.ones((2, 4), np.float32))
    assert np.array_equal(result.arrays["base_model.model.q.lora_B.weight"].numpy(), np.ones((3, 2), np.float32))
    assert "lora_A.weight was trained, but clients train only B" in caplog.text


def test_start_quarantines_unreadable_and_unknown_arrays():
    def junk(message: Message) -> RecordDict:
        reply = stock({"lora_B": 1.0})(message)
        broken = Array("float32", (3, 2), "numpy.ndarray", b"junk")
        reply["arrays"] = ArrayRecord({**reply["arrays"], "base_model.model.q.lora_B.weight": broken})
        return reply

    def unknown(message: Message) -> RecordDict:
        reply = stock({"lora_B": 1.0})(message)
        reply["arrays"] = ArrayRecord({**reply["arrays"], "other.weight": Array(np.ones(1))})
        return reply

    clients = {"1": stock({"lora_B": 1.0}), "2": junk, "3": unknown}
    grid = ScriptedGrid(clients, {"1": 1, "2": 2, "3": 3})
    config = ConfigRecord({"min-available-nodes": 3})
    with pytest.raises(RunError, match=r"1 good replies of 3.*2: .*; 3: unexpected array other\.weight"):
        FrozenA().start(grid, initial_arrays(), num_rounds=1, timeout=5, train_config=config)


@pytest.mark.parametrize("wrapper", ["fedprox", "scaffold", "atp"])
def test_a_method_whose_clients_do_more_than_train_is_refused(wrapper):
    strategy = registry.load("strategies", wrapper)()
    grid = ScriptedGrid({"1": stock({})}, {"1": 1})
    with pytest.raises(RunError, match="needs its half at the clients"):
        strategy.start(grid, initial_arrays(), num_rounds=1, timeout=5)


@pytest.mark.parametrize("attribute", [{"changes_base": True}, {"keeps": ("B",)}])
def test_start_refuses_what_named_weights_cannot_say(attribute):
    strategy = type("Other", (FedIT,), attribute)()
    with pytest.raises(RunError, match="stock Flower app cannot apply it"):
        strategy.start(ScriptedGrid({"1": stock({})}), initial_arrays(), num_rounds=1)


def test_a_round_cannot_be_closed_before_it_is_opened():
    with pytest.raises(RunError, match="before configure_train"):
        FedIT().aggregate_train(1, [])
