"""A killed run goes on and ends as if nothing had happened; of a damaged checkpoint the one before is used."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.errors import InputError
from fedpeft.record import checkpoint
from fedpeft.simulations import run as runs
from support.sample import few

CONFIG = {"strategy.wrap": ["scaffold"], "client.optimizer": "sgd", "client.lr": 0.1}


def adapter(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))}


def child(function, *arguments, **keywords) -> multiprocessing.Process:
    """A forked process: everything is imported already, so that a run starts at once."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=keywords)
    process.start()
    return process


@pytest.mark.parametrize("wanted", few([4, 10], [4]))
def test_sigkill_at_random_moments_changes_nothing(wanted, tiny, tmp_path):
    whole, broken, config = tmp_path / "whole", tmp_path / "broken", {**CONFIG, "run.rounds": 7 * wanted}
    tiny("whole", config)
    rng, kills, rounds = random.Random(0), 0, []
    log = broken / "metrics.jsonl"
    process = child(tiny, "broken", config)
    while True:
        before = log.stat().st_size if log.exists() else 0
        if kills < wanted:
            # Let it get somewhere, then strike at a moment that has nothing to do with the rounds.
            while process.is_alive() and (log.stat().st_size if log.exists() else 0) == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        server = checkpoint.latest(broken / "checkpoints")
        rounds.append(server.round if server else 0)
        process = child(runs.resume, broken)
    assert kills == wanted, f"the run ended after {kills} kills, rounds {rounds}; give it more rounds"
    assert rounds == sorted(rounds)
    assert adapter(whole) == adapter(broken)
    events = [
        [
            {key: value for key, value in json.loads(line).items() if key not in ("time", "seconds")}
            for line in (run / "metrics.jsonl").open()
        ]
        for run in (whole, broken)
    ]
    assert events[0] == events[1]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tiny, tmp_path, file, damage, caplog):
    tiny("whole")
    tiny("run")
    target = tmp_path / "run" / "checkpoints" / "round-000003" / file
    data = target.read_bytes()
    if damage == "truncate":
        target.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        middle = data.index(b"0.") if file == "state.json" and b"0." in data else len(data) // 2
        target.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        target.unlink()
    with pytest.raises(InputError, match="round-000003"):
        checkpoint.read(target.parent)
    caplog.clear()
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").round == 2
    assert "round-000003" in caplog.text
    runs.resume(tmp_path / "run")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_was(tiny, tmp_path):
    tiny("run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        path.write_text("{")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="No other checkpoint is left"):
        runs.resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log


def test_resume_of_a_finished_run_only_reports_again(tiny, tmp_path):
    first = tiny("run")
    before = adapter(tmp_path / "run")
    again = runs.resume(tmp_path / "run")
    assert adapter(tmp_path / "run") == before
    assert again["accuracy_by_round"] == first["accuracy_by_round"]


def test_ctrl_c_leaves_a_resumable_run(tiny, interrupted, tmp_path):
    tiny("whole")

    interrupted("run")
    runs.resume(tmp_path / "run")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no resolved\.yaml"):
        runs.resume(tmp_path)


def test_client_state_is_that_of_the_round_before(tiny, tmp_path):
    tiny("run", {"strategy": "fedsa", "data.holdout": 0.25})
    files = sorted((tmp_path / "run" / "clients" / "client-000").glob("*.safetensors"))
    assert [path.stem for path in files] == ["round-000001", "round-000002", "round-000003"]
    assert all(any(key.endswith("/B") for key in load_file(path)) for path in files)


def test_optimizers_that_are_kept_go_on_where_they_were(tiny, interrupted, tmp_path):
    """Who sat a round out goes on from the state of its last one; a resumed run from that of the round before."""
    config = {"client.keep_optimizer": True, "run.clients_per_round": 2, "run.rounds": 4}
    tiny("whole", config)

    interrupted("run", config)
    runs.resume(tmp_path / "run")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    tiny("anew", {**config, "client.keep_optimizer": False})
    assert adapter(tmp_path / "anew") != adapter(tmp_path / "whole")
    for folder in (tmp_path / "whole" / "clients").iterdir():
        counts = [int(load_file(path)["optimizer:step"]) for path in sorted(folder.glob("round-*.safetensors"))]
        assert counts == [counts[0] * (1 + number) for number in range(len(counts))]


def test_controls_of_the_factor_that_rests_are_kept(tiny, tmp_path):
    config = {"strategy": "rolora", "strategy.wrap": ["scaffold"], "client.optimizer": "sgd", "client.lr": 0.1}
    tiny("run", config)  # three rounds: B, A, B
    states = [load_file(path) for path in sorted((tmp_path / "run" / "clients" / "client-000").glob("*.safetensors"))]
    factors = [{key[-1] for key in state if key.startswith("control:vit")} for state in states]
    assert factors == [{"B"}, {"A", "B"}, {"A", "B"}]
    assert all(torch.equal(value, states[2][key]) for key, value in states[1].items() if key.endswith("/A"))
    assert any(value.abs().max() > 0 for key, value in states[2].items() if key.endswith("/A"))
