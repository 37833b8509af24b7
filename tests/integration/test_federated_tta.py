"""Test-time adaptation in a federation: each client's numbers are those of the method played by hand on its stream."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.cli import console
from fedpeft.clients import test_time
from fedpeft.clients.train import evaluate
from fedpeft.data.corruptions import CORRUPTIONS, corrupt_image
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.objectives.causal_lm import CausalLM
from fedpeft.record import checkpoint
from fedpeft.run.world import World, load_world
from fedpeft.simulations import run as runs
from fedpeft.strategies.wrappers.atp import names_at, received_rates
from fedpeft.tta.deployed import deploy
from fedpeft.tta.method import make

HELD = {
    "data.holdout": 0.5,
    "run.rounds": 1,
    "client.local_steps": 4,
    "tta.batch_size": 6,
    "data.limit": 56,
    "data.test_fraction": 0.05,
    "data.clients": 2,
}
SEQUENCE = {**HELD, "tta.corruption": "sequence", "tta.severity": 4}


def again(folder: Path) -> tuple[World, Any]:
    return load_world(configs.load(folder / "resolved.yaml"), folder), checkpoint.latest(folder / "checkpoints")


def written(here: World, server: Any, client: str) -> Any:
    """The client's model as it was evaluated; what the client received."""
    received = here.strategy.broadcast(server, client)
    start, _ = here.local.compose(client, received, here.strategy.instructions(server), before=99)
    here.local.model.write(start)
    return received


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in (folder / "metrics.jsonl").open() if (event := json.loads(line))["event"] == kind]


def labels_right(probs: list[torch.Tensor], labels: torch.Tensor) -> float:
    return float((torch.cat(probs).argmax(-1) == labels).double().mean())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tent", {"tta.lr": 0.1}),
        ("lame", {"tta.k": 3, "tta.lambda": 2.0}),
        ("t3a", {}),
        ("eata", {"tta.lr": 0.05, "tta.margin": 3.0, "tta.redundancy": 2.0}),
    ],
)
def test_a_client_reports_what_the_method_gives_by_hand_on_its_stream(method, options, tiny, tmp_path):
    summary = tiny("run", {**SEQUENCE, "tta.method": method, **options})
    here, server = again(tmp_path / "run")
    reported = events(tmp_path / "run", "clients_evaluated")[-1]["clients"]
    assert len(reported) == 2
    moved = 0
    for client, result in reported.items():
        written(here, server, client)
        held, config = here.local.holdout[client], here.config
        given = test_time.stream(config, client, held)
        model = deploy(here.local.model)
        played = make(method, model, config.tta.options, runs_seed(config, client), here.local.train_data[client])
        adapted = labels_right([played.step(batch)[0] for batch in given.batches()], given.labels)
        everything = Encoded(given.inputs, given.labels)
        plain = evaluate(here.local.model, everything)["accuracy"]
        assert result["tta_accuracy"] == pytest.approx(adapted)
        assert result["tta_source_accuracy"] == pytest.approx(plain), "the source row is a plain evaluation"
        assert result["accuracy"] == pytest.approx(evaluate(here.local.model, held)["accuracy"])
        moved += result["tta_accuracy"] != result["tta_source_accuracy"]
    assert moved, "the method changes nothing here, so the test shows nothing"
    assert summary["tta"]["method"] == method and set(summary["tta"]["clients"]) == set(reported)
    last = events(tmp_path / "run", "round")[-1]
    count = {client: result["num-examples"] for client, result in reported.items()}
    mean = sum(result["tta_accuracy"] * count[client] for client, result in reported.items()) / sum(count.values())
    assert last["client_tta_accuracy"] == pytest.approx(mean) == pytest.approx(summary["tta"]["tta_accuracy"])


def runs_seed(config: configs.Config, client: str) -> int:
    from fedpeft import seeds

    return seeds.derive(config.run.seed, "tta", client, "method")


def test_the_stream_is_the_held_out_records_under_their_corruption(tiny, tmp_path):
    tiny("run", {**HELD, "data.clients": 4, "tta.method": "source", "tta.severity": 3})
    assert not list((tmp_path / "run").rglob("tta-*.pt")), "nothing is kept unless tta.keep says so"
    here, _ = again(tmp_path / "run")
    names = {client: test_time.corruptions(here.config, client) for client in here.local.holdout}
    assert len({name for (name,) in names.values()}) == 4, "each client has another one"
    other = dataclasses.replace(here.config, run=dataclasses.replace(here.config.run, seed=1))
    assert {client: test_time.corruptions(other, client) for client in names} != names
    client, held = "client-001", here.local.holdout["client-001"]
    given = test_time.stream(here.config, client, held)
    assert sorted(given.labels.tolist()) == sorted(held.labels.tolist())
    assert [len(batch["pixel_values"]) for batch in given.batches()] == [6] * (len(held) // 6) + [len(held) % 6][
        : len(held) % 6
    ]
    same = test_time.stream(here.config, client, held)
    assert torch.equal(given.inputs["pixel_values"], same.inputs["pixel_values"])
    # contrast and its like have no noise: the pixels can be found again among the originals
    quiet = dataclasses.replace(here.config, tta=dataclasses.replace(here.config.tta, corruption="contrast"))
    given = test_time.stream(quiet, client, held)
    wanted = np.stack(
        [
            corrupt_image(image[0].numpy(), "contrast", 3, np.random.default_rng(0))
            for image in held.inputs["pixel_values"]
        ]
    ).astype(np.float32)
    found = given.inputs["pixel_values"][:, 0].numpy()
    assert {row.tobytes() for row in wanted} == {row.tobytes() for row in found}
    assert not np.array_equal(wanted, found), "and shuffled"
    whole = dataclasses.replace(here.config, tta=dataclasses.replace(here.config.tta, corruption="sequence"))
    long = test_time.stream(whole, client, held)
    assert long.rows == 9 * len(held) and {name.partition("-")[0] for name in long.domains} == set(CORRUPTIONS)
    assert [long.domains[part.start] == long.domains[part.stop - 1] for part in long.parts] == [True] * len(long)


def test_what_is_kept_goes_on_and_a_resumed_run_is_the_same(tiny, interrupted, tmp_path):
    config = {**HELD, "run.rounds": 3, "tta.batch_size": 7, "tta.method": "tent", "tta.lr": 0.05, "tta.keep": True}
    tiny("whole", config)

    interrupted("broken", config)
    runs.resume(tmp_path / "broken")
    rows = {name: events(tmp_path / name, "clients_evaluated") for name in ("whole", "broken")}
    for key in ("clients", "round"):
        assert [row[key] for row in rows["whole"]] == [row[key] for row in rows["broken"]]
    states = {
        run: [
            torch.load(tmp_path / run / "clients" / "client-000" / f"tta-00000{number}.pt", weights_only=True)
            for number in (1, 2, 3)
        ]
        for run in ("whole", "broken")
    }
    given = len(test_time.stream(*stream_of(tmp_path / "whole", "client-000")))
    assert [state["batches"] for state in states["whole"]] == [given, 2 * given, 3 * given]
    for one, two in zip(states["whole"], states["broken"], strict=True):
        for name, value in one["memory"]["student"].items():
            assert torch.equal(value, two["memory"]["student"][name])
    # The last evaluation by hand: the method of round 2 on the model of round 3.
    here, server = again(tmp_path / "whole")
    written(here, server, "client-000")
    method = make("tent", deploy(here.local.model), here.config.tta.options)
    method.load(states["whole"][1])
    played = test_time.stream(*stream_of(tmp_path / "whole", "client-000"))
    accuracy = labels_right([method.step(batch)[0] for batch in played.batches()], played.labels)
    assert rows["whole"][2]["clients"]["client-000"]["tta_accuracy"] == pytest.approx(accuracy)
    assert all(
        torch.equal(value, states["whole"][2]["memory"]["student"][name])
        for name, value in method.memory["student"].items()
    )


def stream_of(folder: Path, client: str) -> tuple[Any, ...]:
    here, _ = again(folder)
    return here.config, client, here.local.holdout[client]


def test_kept_memory_meets_what_is_prepared_on_the_model_of_now():
    now = {"prepared": {"fisher": 2}, "ready": True, "memory": 0, "base": {"prepared": {}, "ready": True, "memory": 1}}
    old = {"prepared": {"fisher": 1}, "ready": True, "memory": 5, "base": {"prepared": {}, "ready": True, "memory": 6}}
    assert test_time._update_state(now, old) == {**old, "prepared": {"fisher": 2}}


def test_personal_models_are_adapted_from_what_each_client_keeps(tiny, tmp_path):
    tiny("run", {**SEQUENCE, "strategy": "fedsa", "tta.method": "t3a"})
    here, server = again(tmp_path / "run")
    reported = events(tmp_path / "run", "clients_evaluated")[-1]["clients"]
    for client, result in reported.items():
        written(here, server, client)
        given = test_time.stream(*stream_of(tmp_path / "run", client))
        plain = evaluate(here.local.model, Encoded(given.inputs, given.labels))["accuracy"]
        assert result["tta_source_accuracy"] == pytest.approx(plain)


def test_a_language_model_learns_from_its_inputs_and_is_asked_for_the_last_token(tiny, tmp_path):
    config = {
        "model.name": "tiny-llama",
        "model.task": "causal-lm",
        "data.source": "docstrings",
        **HELD,
        "model.max_length": 24,
        "tta.method": "tlm",
        "tta.lr": 0.05,
        "tta.corruption": "clean",
    }
    summary = tiny("run", config)
    here, server = again(tmp_path / "run")
    client, result = next(iter(events(tmp_path / "run", "clients_evaluated")[-1]["clients"].items()))
    written(here, server, client)
    held = here.local.holdout[client]
    cut = CausalLM("causal-lm").stream(held)
    for row in range(len(held)):
        ids = held.inputs["input_ids"][row][: int(held.inputs["attention_mask"][row].sum())]
        kept = int(cut.inputs["attention_mask"][row].sum())
        assert cut.inputs["input_ids"][row][:kept].tolist() == ids[:-1].tolist()
        assert int(cut.labels[row]) == int(ids[-1])
    logits = deploy(here.local.model)(cut.inputs)[0]
    assert result["tta_source_accuracy"] == pytest.approx(float((logits.argmax(-1) == cut.labels).double().mean()))
    assert 0 <= summary["tta"]["tta_accuracy"] <= 1


def test_atp_learns_rates_averages_them_and_uses_them(tiny, tmp_path):
    config = {
        **SEQUENCE,
        "run.rounds": 2,
        "strategy.wrap": [{"name": "atp", "lr": 0.01, "batch_size": 6}],
        "tta.method": "atp",
    }
    tiny("run", config)
    here, server = again(tmp_path / "run")
    rates = {key: value for key, value in server.memory.items() if key.startswith("rates:")}
    assert set(rates) == {f"rates:{key}" for key in server.adapter.tensors}
    assert all(value.abs().sum() > 0 for key, value in rates.items() if not key.endswith("/B"))
    # Round 2 again by hand: each client from the broadcast of round 1's end, and the weighted mean.
    first = checkpoint.read(tmp_path / "run" / "checkpoints" / "round-000001")
    sums, total = dict.fromkeys(rates, 0.0), 0
    for client, data in here.local.train_data.items():
        task = replace(here.strategy.instructions(first), round=2)
        update, metrics = here.local.train(client, here.strategy.broadcast(first, client), task)
        assert metrics["num-examples"] == len(data)
        sums = {key: sums[key] + len(data) * float(update.extra[key]) for key in sums}
        total += len(data)
    for key, value in sums.items():
        assert float(rates[key]) == pytest.approx(value / total, rel=1e-4, abs=1e-9), key
    # And the adapter's rounds are what they are without rates.
    tiny("plain", {key: value for key, value in config.items() if not key.startswith(("strategy", "tta"))})
    plain = checkpoint.latest(tmp_path / "plain" / "checkpoints")
    assert plain.adapter.sha256() == server.adapter.sha256()
    # The client's number is the method's with these rates.
    client, result = next(iter(events(tmp_path / "run", "clients_evaluated")[-1]["clients"].items()))
    received = written(here, server, client)
    model = deploy(here.local.model)
    method = make("atp", model, here.config.tta.options)
    sent = received_rates(received)
    method.receive({name: sent[key] for key, name in names_at(here.local.model, model, sent).items()})
    given = test_time.stream(*stream_of(tmp_path / "run", client))
    assert result["tta_accuracy"] == pytest.approx(
        labels_right([method.step(batch)[0] for batch in given.batches()], given.labels)
    )


RATES = {"strategy.wrap": ["atp"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"tta.method": "memo", "tta.views": 2},  # puts all back after each sample
        {"tta.method": "itta", "tta.adapt": "all", "tta.align_steps": 1},  # moves scales and shifts of its own
        {"tta.method": "t3a", "adapter.train_head": False},
        {"tta.method": "atp", **RATES},
    ],
    ids=["memo", "itta", "t3a", "atp"],
)
def test_what_keeps_nothing_that_the_rounds_train_may_go_on(changes, tiny, tmp_path):
    tiny("run", {**HELD, "run.rounds": 1, "data.clients": 2, "tta.keep": True, **changes})
    assert list((tmp_path / "run").rglob("tta-*.pt"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.holdout": 0.0}, "data.holdout=0 holds none out"),
        ({"tta.method": "tnet"}, "Did you mean 'tent'"),
        ({"tta.rate": 0.1}, "config key tta.rate"),
        ({"tta.lr": -1.0}, "tta.lr"),
        ({"tta.corruption": "blurr"}, "Did you mean 'blur'"),
        ({"tta.severity": 6}, "tta.severity"),
        (
            {"model.task": "sequence-classification", "model.name": "tiny-bert", "data.source": "docstrings"},
            "Set tta.corruption=clean",
        ),
        ({"tta.method": "atp"}, r"strategy.wrap=\[atp\]"),
        ({"tta.method": "tlm"}, "causal-lm"),
        ({"tta.keep": True, "tta.adapt": "lora"}, "which the rounds train"),
        (
            {"tta.keep": True, "tta.method": "rdumb", "tta.base": "tent", "tta.base_options": {"adapt": "all"}},
            "which the rounds train",
        ),
        ({"tta.keep": True, "tta.method": "t3a"}, r"t3a keeps classifier.weight, which the rounds train.*false\.$"),
        (
            {"tta.keep": True, "tta.method": "atp", "tta.mode": "online", "tta.adapt": "norm_affine", **RATES},
            "which the rounds train",
        ),
        (
            {
                "strategy.wrap": ["atp"],
                "privacy.unit": "client",
                "privacy.noise_multiplier": 1.0,
                "strategy.weighting": "uniform",
                "privacy.release_metrics": True,
            },
            "a second release of their data",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(changes, words, tiny, tmp_path):
    with pytest.raises(InputError, match=words):
        tiny("run", {**HELD, "tta.method": "tent", **changes})
    assert not (tmp_path / "run").exists()


def test_a_method_can_be_switched_off_and_replaced_by_an_override():
    shipped = configs.load("tta")
    assert shipped.tta.method == "t3a"
    off = configs.load("tta", ["tta.method=null"])
    assert off.tta.method is None and off.tta.options == {}
    other = configs.load("tta", ["tta=tent", "tta.lr=0.5"])
    assert other.tta.method == "tent" and other.tta.options["lr"] == 0.5 and other.tta.severity == 3
    assert configs.load(configs.to_tree(other)).tta == other.tta


def test_the_console_shows_both_accuracies_of_each_client(tiny, tmp_path, monkeypatch):
    summary = tiny("run", {**HELD, "tta.method": "t3a"})
    monkeypatch.setattr(console.out, "width", 200)
    with console.out.capture() as captured:
        console.run_result(summary)
    text = captured.get()
    for client, row in summary["tta"]["clients"].items():
        line = next(line for line in text.splitlines() if client in line)
        assert f"{row['source_accuracy']:.1%}" in line and f"{row['tta_accuracy']:.1%}" in line
        assert row["stream"] in line
