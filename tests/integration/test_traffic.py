"""run.max_traffic_mb ends a run before the round that would pass it, resumed or not, and says so."""

from __future__ import annotations

import json
import shutil

import pytest

from fedpeft import config as configs
from fedpeft import simulate
from fedpeft.errors import InputError
from fedpeft.simulations.run import resume

TINY = {
    "strategy": "fedit",
    "data.limit": 60,
    "data.clients": 3,
    "run.clients_per_round": 2,
    "client.local_steps": 1,
    "client.local_epochs": None,
    "run.baselines": False,
    "run.rounds": 6,
    "run.evaluate_every": 4,
    "run.keep_checkpoints": None,
}


def events(run, kind):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stops by its traffic, and the bytes of one of its rounds."""
    out = tmp_path_factory.mktemp("runs") / "run"
    first = simulate("quickstart", {**TINY, "run.rounds": 1}, out=out.with_name("first"))
    a_round = first["bytes_up"] + first["bytes_down"]
    assert a_round == 2 * 2 * 4 * first["trainable_parameters"]  # there and back, two clients, four bytes a value
    summary = simulate("quickstart", {**TINY, "run.max_traffic_mb": 3.5 * a_round / 1e6}, out=out)
    return out, summary, a_round


def test_a_run_stops_before_the_round_that_would_pass_the_limit(whole):
    run, summary, a_round = whole
    assert summary["rounds"] == 3 and summary["bytes_up"] + summary["bytes_down"] == 3 * a_round
    assert summary["traffic"] == {
        "limit_mb": 3.5 * a_round / 1e6,
        "moved_mb": 3 * a_round / 1e6,
        "stopped": True,
        "rounds": 6,
    }
    assert "The run stopped after round 3 of 6" in summary["headline"]
    assert f"another round would pass run.max_traffic_mb={3.5 * a_round / 1e6:g}" in (run / "report.html").read_text()
    assert summary["final"]["round"] == 3, "the last round is evaluated, whatever run.evaluate_every says"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_limit_that_is_met_exactly_lets_the_round_be_played(whole, tmp_path):
    _, _, a_round = whole
    summary = simulate(
        "quickstart", {**TINY, "run.rounds": 3, "run.max_traffic_mb": 2 * a_round / 1e6}, out=tmp_path / "r"
    )
    assert summary["rounds"] == 2
    summary = simulate(
        "quickstart", {**TINY, "run.rounds": 2, "run.max_traffic_mb": 2 * a_round / 1e6}, out=tmp_path / "s"
    )
    assert summary["rounds"] == 2 and not summary["traffic"]["stopped"] and "stopped" not in summary["headline"]


def test_a_resumed_run_stops_at_the_same_round(whole, tmp_path):
    run, summary, _ = whole
    shutil.copytree(run, tmp_path / "run")
    for later in ("round-000002", "round-000003"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later)
    assert resume(tmp_path / "run")["traffic"] == summary["traffic"]
    assert [event["round"] for event in events(tmp_path / "run", "round")] == [1, 2, 3]
    again = resume(tmp_path / "run")
    assert again["rounds"] == 3, "a run that has stopped is complete"


def test_a_limit_below_one_round_is_refused_with_its_size(whole, tmp_path):
    _, _, a_round = whole
    with pytest.raises(InputError, match=rf"a single round moves about {a_round / 1e6:.3g} MB over 2 clients"):
        simulate("quickstart", {**TINY, "run.max_traffic_mb": 0.5 * a_round / 1e6}, out=tmp_path / "run")


def test_a_run_over_tasks_takes_no_limit():
    with pytest.raises(InputError, match=r"run\.max_traffic_mb=1: with continual\.body=\w+ a run that stops early"):
        configs.load("continual", ["run.max_traffic_mb=1"])


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.name": "paca"},
        {"strategy": "fed_sb", "adapter.name": "lora_sb", "adapter.r": 3},
        {"strategy": "flora"},
    ],
)
def test_validate_counts_the_bytes_that_a_run_then_moves(fedpeft, changes, tmp_path):
    changes = {**TINY, **changes, "run.rounds": 1}
    run = simulate("quickstart", changes, out=tmp_path / "run")
    written = [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
    said = fedpeft("validate", "quickstart", *written, "--traffic", "--json").json["traffic"]
    assert (run["bytes_up"], run["bytes_down"]) == (2 * said["up"], 2 * said["down"])
    assert 0 < said["up_head"] < said["up"] and said["clients"] == 2
    assert said["round_mb"] == said["run_mb"] == 2 * (said["up"] + said["down"]) / 1e6
    assert f"sends {said['up']:,} bytes" in fedpeft("validate", "quickstart", *written, "--traffic").out
