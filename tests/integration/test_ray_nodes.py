"""`run.engine=ray` on a cluster of nodes with unequal cores, which Ray's own helper simulates on this machine."""

import threading
import time
from pathlib import Path

import pytest

from fedpeft.errors import RunError
from fedpeft.simulations import ray_engine

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROUNDS = 3
SHORT = {"run.rounds": ROUNDS, "run.workers": 2, "client.local_steps": 2, "client.local_epochs": None}
LONG = {**SHORT, "client.local_steps": 150}  # seconds a share: a node that dies then, dies in its middle


class Nodes:
    """A head without cores, a node of one core and a node of two: of two actors each has one, and one core is left."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.one = self.cluster.add_node(num_cpus=1)
        self.two = self.cluster.add_node(num_cpus=2)
        self.cluster.wait_for_nodes()


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else actors would wait for all other work of the machine
    made = Nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.cluster.address)
    yield made
    ray.shutdown()
    made.cluster.shutdown()


def after_round(number, act):
    """A listener that acts as round `number` ends."""
    return lambda event: act() if event["event"] == "round" and event["round"] == number else None


def tensors(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").rglob("*.safetensors"))}


def test_shares_of_a_node_that_died_between_rounds_are_trained_elsewhere(tiny, tmp_path, nodes):
    tiny("here", {**SHORT, "run.engine": "cohort"})
    kill = after_round(1, lambda: nodes.cluster.remove_node(nodes.one, allow_graceful=False))
    found = tiny("ray", {**SHORT, "run.engine": "ray"}, on_event=kill)
    assert found["quarantined"] == [] and found["rounds"] == ROUNDS
    assert tensors(tmp_path / "ray") == tensors(tmp_path / "here")


def test_a_node_that_dies_at_work_loses_nothing_and_one_that_joins_is_used(tiny, tmp_path, nodes, monkeypatch):
    tiny("here", {**LONG, "run.engine": "cohort"})
    lost: list[str] = []
    gone = ray_engine.is_gone
    monkeypatch.setattr(ray_engine, "is_gone", lambda node: gone(node) and not lost.append(node))

    def act(event):
        if event["event"] != "round":
            return
        if event["round"] == 1:
            threading.Timer(0.5, nodes.cluster.remove_node, (nodes.two,), {"allow_graceful": False}).start()
        elif event["round"] == 2:  # one core is left, which has an actor; the other waits for a node
            nodes.cluster.add_node(num_cpus=2)
            wait_until(lambda: (ray.cluster_resources()["CPU"], ray.available_resources().get("CPU")) == (3, 1))

    found = tiny("ray", {**LONG, "run.engine": "ray"}, on_event=act)
    assert lost, "the node died after the run had ended: nothing was shown"
    assert found["quarantined"] == [] and found["rounds"] == ROUNDS
    assert tensors(tmp_path / "ray") == tensors(tmp_path / "here")


def wait_until(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_more_workers_than_cores_are_refused(tiny, nodes):
    with pytest.raises(RunError, match=r"run.workers=4: the Ray cluster has 3 cores"):
        tiny("ray", {**SHORT, "run.engine": "ray", "run.workers": 4})
