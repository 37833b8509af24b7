"""Federated continual learning through `simulate` and the command line: shipped configs, resume, privacy, refusals.

Runs are tiny (200 digits, 3 clients, 2 tasks of 2 rounds, 2 steps), so nothing here says how well a method learns.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft.clients import sequence
from fedpeft.clients.sequence import head_sums
from fedpeft.continual import matrix
from fedpeft.errors import RunError
from fedpeft.record import checkpoint, report
from fedpeft.record.metrics import read
from fedpeft.run.world import load_world
from fedpeft.simulations import run as runs
from fedpeft.strategies.sequence.build import make_head
from fedpeft.strategies.sequence.sequence import TASK, TaskSequence
from support.sequences import DP_LDA, SMALL, ended

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "factor_coso": ("continual", {"continual.side": "both"}),
    "coso": ("continual_coso", {}),
    "conpet_static": ("continual_conpet", {}),
    "lae": ("continual_lae", {"continual.head": "lda"}),
    "private": ("continual_dp", DP_LDA),
    "inflora": ("continual", {"continual.body": "inflora"}),
    "merging": ("continual_lae", {"continual.body": "merging", "continual.method": "opcm", "strategy": "fedit"}),
}
SHIPPED = ["continual", "continual_coso", "continual_conpet", "continual_dp", "continual_lae"]
ALONE = {"run.cohort_tokens": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(case)`: folder and summary of the case's run, made once."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def make(case):
        config, more = CASES[case]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "write", lambda run: [])
            return root / case, runs.simulate(config, {**SMALL, **more}, root / case)

    return make


def adapter(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))}


def same_state(one, two):
    """Bit for bit: adapter, what bodies and heads keep, rows."""
    assert (one.round, one.numbers) == (two.round, two.numbers)
    assert one.adapter.sha256() == two.adapter.sha256()
    assert one.memory.keys() == two.memory.keys()
    assert all(torch.equal(value, two.memory[key]) for key, value in one.memory.items())


def kept(server, ending):
    return {key: value for key, value in server.memory.items() if key.startswith("continual:") and key.endswith(ending)}


@pytest.mark.parametrize("alone", [{}, ALONE], ids=["cohort", "one after another"])
@pytest.mark.parametrize(
    ("body", "resting", "rounds"),
    [
        ({"continual.body": "factor_coso", "continual.side": "out"}, ("/A",), range(1, 5)),
        ({"continual.body": "fsa"}, ("/A", "/B"), range(3, 5)),
        ({"continual.body": "frozen"}, ("/A", "/B"), range(1, 5)),
    ],
    ids=["factor_coso", "fsa", "frozen"],
)
def test_control_variates_rest_where_a_body_lets_a_tensor_rest(go, tmp_path, body, resting, rounds, alone):
    """Clients that could not say what they had met of a factor that does not train failed in every round."""
    config = {**body, "continual.head": "linear", "strategy": {"name": "fedit", "wrap": ["scaffold"]}, **alone}
    go("run", "continual", {**config, "run.keep_checkpoints": 9, "client.lr": 0.1})
    states = {
        number: checkpoint.read(path)
        for number in range(1, 5)
        for path in checkpoint.of_round(tmp_path / "run" / "checkpoints", number)[-1:]
    }
    assert not [event for event in read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "quarantine"]
    controls = {
        number: {key: value for key, value in state.memory.items() if key.startswith("control:")}
        for number, state in states.items()
    }
    for number, found in controls.items():
        before = controls.get(number - 1, {})
        for key, value in found.items():
            still = torch.equal(value, before.get(key, torch.zeros_like(value)))
            assert still == (key.endswith(resting) and number in rounds), (number, key)


# One task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lda", "ncm", "ranpac"])
def test_a_federated_head_is_the_one_of_the_pooled_records(go, tmp_path, name):
    options = {"continual.head_options": {"features": 64}} if name == "ranpac" else {}
    summary = go("run", "continual_lae", {"continual.tasks": 1, "run.rounds": 1, "continual.head": name, **options})
    server, run = ended(tmp_path / "run"), tmp_path / "run"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    here.local.model.write(server.adapter)
    central = make_head(here.config, 10, here.local.model.base.width)
    pooled = head_sums(here.local.model, central, here.train_encoded)
    assert pooled
    for key, value in pooled.items():
        torch.testing.assert_close(
            server.memory[f"continual:sums|online|{key}"], value, rtol=1e-6, atol=1e-6 * float(value.abs().max())
        )
    other = make_head(here.config, 10, central.width)
    other.update({key: server.memory[f"continual:sums|online|{key}"] for key in pooled}, list(range(10)))
    central.update(pooled, list(range(10)))
    right = 0
    for found, _, labels in here.local.model.features(here.test_encoded):
        answers = central.scores(found, None).argmax(1)
        assert torch.equal(other.scores(found, None).argmax(1), answers)
        right += int((answers == labels).sum())
    assert summary["continual"]["right"] == [[right]] and right > 0.5 * len(here.test_encoded)


# The shipped configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SHIPPED)
def test_a_shipped_config_runs_and_says_everything(config, fedpeft, tmp_path, monkeypatch):
    if config != "continual":  # one with all its plots and its report
        monkeypatch.setattr(report, "write", lambda run: [])
    overrides = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    result = fedpeft("simulate", config, *overrides, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json["continual"] == json.loads((tmp_path / "run" / "summary.json").read_text())["continual"]
    section, events = result.json["continual"], read(tmp_path / "run" / "metrics.jsonl")
    right, count = np.array(section["right"]), np.array(section["count"])
    assert sorted(name for names in section["tasks"] for name in names) == [str(digit) for digit in range(10)]
    assert right.shape == (2, 2) and right[0, 1] == 0 and (right <= count).all() and right[0, 0] > 0
    assert set(section["metrics"]["values"]) == set(matrix.NAMES)
    assert section["metrics"]["values"]["acc_micro"] == pytest.approx(right[1].sum() / count.sum())
    assert section["metrics"]["values"]["bwt"] == pytest.approx((right[1, 0] - right[0, 0]) / count[0])
    assert section["metrics"]["undefined"].keys() == {"fwt", "a_auc"}
    tasks = [event for event in events if event["event"] == "task"]
    assert [event["right"] for event in tasks] == section["right"] and [event["round"] for event in tasks] == [2, 4]
    fitted = section["head"] in ("lda", "ranpac")
    sketched = section["body"] == "coso"
    asked = [(event["sums"], event["round"]) for event in events if event["event"] == "sums"]
    assert asked == [
        *[("sketch", 1)] * sketched,
        *[("head", 2)] * fitted,
        *[("sketch", 3)] * sketched,
        *[("head", 4)] * fitted,
    ]
    assert sum(event["event"] == "round" for event in events) == 4
    assert not result.json["quarantined"]


@pytest.mark.parametrize("case, ending", [("factor_coso", "|N"), ("coso", "|M"), ("lae", "|offline")])
def test_a_body_does_what_sequential_does_not(case, ending, whole, go, tmp_path):
    run, _ = whole(case)
    config, more = CASES[case]
    more = {key: value for key, value in more.items() if key != "continual.side"}
    go("not", config, {**more, "continual.body": "sequential"})
    assert kept(ended(run), ending) and not kept(ended(tmp_path / "not"), ending)
    assert adapter(run) != adapter(tmp_path / "not")


def test_conpet_replays_from_the_second_task_on(whole, go, tmp_path):
    """The first task is that of plain training, the second is not, though the same classes compete."""
    run, summary = whole("conpet_static")
    plain = go("not", "continual_conpet", {"continual.body": "sequential", "continual.head": "masked"})
    assert plain["continual"]["right"][0] == summary["continual"]["right"][0]
    assert adapter(run) != adapter(tmp_path / "not")


def test_factor_coso_in_a_run_keeps_tasks_apart(go, tmp_path):
    """What task 1 added to a site's function has no part in the rows of A that task 0 used."""
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        write = checkpoint.write
        patch.setattr(
            checkpoint,
            "write",
            lambda folder, server, *rest: (states.__setitem__(server.round, server), write(folder, server)),
        )
        go("run", "continual", {"continual.side": "in"})
    first, last = states[2].adapter, states[4].adapter
    for site in first.lora_sites():
        A = torch.linalg.qr(first[f"{site}/A"].double().T).Q
        change = last.sites[site].scaling * last[f"{site}/B"].double() @ last[f"{site}/A"].double()
        assert float((change @ A).norm()) < 1e-5 * float(change.norm())
        old = first.sites[site].scaling * first[f"{site}/B"].double() @ first[f"{site}/A"].double()
        base = last[f"{site}/residual_B"].double() @ last[f"{site}/residual_A"].double()
        torch.testing.assert_close(base, old, atol=1e-6 * float(old.norm()), rtol=0)


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("fedsvd", {"strategy.transport": "core"}),
        ("ffa_lora", {"strategy.transport": "seed", "strategy.init": "orthonormal"}),
    ],
)
def test_the_out_side_works_with_factors_that_clients_draw_themselves(go, strategy, options):
    """It chooses no A, so these transports are not refused; then every client must still agree with the server."""
    summary = go("run", "continual", {"strategy": strategy, **options, "continual.side": "out"})
    assert summary["rounds"] == 4 and not summary["quarantined"]


# Engines and resume ---------------------------------------------------------------------------------------------------


def test_a_worker_process_gives_the_same_bits(go, tmp_path, forked):
    go("here", "continual_coso", ALONE)
    go("worker", "continual_coso", {**ALONE, "run.workers": 1})
    assert adapter(tmp_path / "worker") == adapter(tmp_path / "here")
    same_state(ended(tmp_path / "worker"), ended(tmp_path / "here"))


@pytest.mark.parametrize("case", ["factor_coso", "conpet_static", "private"])
def test_a_cohort_gives_the_adapter_of_clients_one_after_another(case, whole, go, tmp_path):
    config, more = CASES[case]
    go("alone", config, {**more, **ALONE})
    for name in adapter(tmp_path / "alone"):
        one, two = (load_file(run / "adapter" / name) for run in (tmp_path / "alone", whole(case)[0]))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=2e-4, msg=key)


def at(kind, number):
    """Interrupts a run at the first such event, before what follows it is on the disk."""

    def interrupt(event):
        if event["event"] == kind and event.get("round") == number:
            raise KeyboardInterrupt

    return interrupt


CUTS = {
    "mid-task": at("round", 4),  # round 3 is on the disk
    "before-the-head": at("task", 2),  # task 0's rounds are, its row is not
    "after-the-head": at("round", 3),  # its row is, task 1 has begun only in memory
    "last-head": at("task", 4),  # all rounds are, the last row is not
}


@pytest.mark.parametrize(
    "case, cut",
    [
        *(("factor_coso", cut) for cut in CUTS),
        ("private", "mid-task"),
        ("lae", "mid-task"),
        *((case, cut) for case in ("private", "lae") for cut in ("before-the-head", "last-head")),
        ("coso", "after-the-head"),
        ("conpet_static", "mid-task"),
        ("conpet_static", "after-the-head"),
        ("inflora", "after-the-head"),
        ("merging", "before-the-head"),
        ("merging", "mid-task"),
    ],
)
def test_a_cut_run_ends_as_if_nothing_had_happened(case, cut, whole, go, tmp_path):
    run, summary = whole(case)
    config, more = CASES[case]
    with pytest.raises(KeyboardInterrupt):
        go("cut", config, more, on_event=CUTS[cut])
    again = runs.resume(tmp_path / "cut")
    assert again["continual"] == summary["continual"]
    assert adapter(tmp_path / "cut") == adapter(run)
    same_state(ended(tmp_path / "cut"), ended(run))
    if case == "private":
        assert again["privacy"]["clients"] == summary["privacy"]["clients"]


@pytest.mark.parametrize("case, cut", [("factor_coso", "before-the-head"), ("inflora", "after-the-head")])
def test_a_resumed_run_has_every_event_once(case, cut, whole, go, tmp_path):
    """InfLoRA asks for sums over a finished task's records when the next one begins: cut after that, it asks again."""
    config, more = CASES[case]
    with pytest.raises(KeyboardInterrupt):
        go("broken", config, more, on_event=CUTS[cut])
    runs.resume(tmp_path / "broken")
    events = [
        [
            {key: value for key, value in event.items() if key not in ("time", "seconds")}
            for event in read(run / "metrics.jsonl")
        ]
        for run in (whole(case)[0], tmp_path / "broken")
    ]
    assert [event["event"] for event in events[1]] == [event["event"] for event in events[0]]
    assert events[0] == events[1]
    asked = [event["sums"] for event in events[1] if event["event"] == "sums"]
    assert asked == (["sketch", "head", "past_sketch", "sketch", "head"] if case == "inflora" else ["head"] * 2)


# Who takes part -------------------------------------------------------------------------------------------------------


def without_task_1(go, tmp_path) -> Path:
    """A split in which client-002 has records of task 0 alone."""
    go("first", "continual", {"run.rounds": 2})
    run = tmp_path / "first"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    tree = json.loads((run / "split.json").read_text())
    mine = np.array(tree["clients"]["client-002"])
    of = np.isin(here.train.labels[mine], here.strategy.curriculum.groups[1])
    tree["clients"]["client-002"] = mine[~of].tolist()
    tree["clients"]["client-001"] += mine[of].tolist()
    (tmp_path / "split.json").write_text(json.dumps(tree))
    return tmp_path / "split.json"


def test_a_client_without_records_of_a_task_sits_out(go, tmp_path, monkeypatch):
    split = {"data.split": str(without_task_1(go, tmp_path))}
    summary = go("run", "continual", split)
    assert [(row["round"], row["client"]) for row in summary["quarantined"]] == [(3, "client-002"), (4, "client-002")]
    assert all("has no records of task 1" in row["reason"] for row in summary["quarantined"])
    events = read(tmp_path / "run" / "metrics.jsonl")
    assert [(event["client"], event["round"]) for event in events if event["event"] == "sums_missing"] == [
        ("client-002", 4)
    ]
    assert [event["clients"] for event in events if event["event"] == "sums"] == [
        ["client-000", "client-001", "client-002"],
        ["client-000", "client-001"],
    ]
    with pytest.raises(RunError, match=r"round 3: 2 good replies of 3, but run\.quorum=1.* needs 3"):
        go("strict", "continual", {**split, "run.quorum": 1.0})
    monkeypatch.setattr(TaskSequence, "choose", lambda self, names, rules, number: names[:2])  # sums are asked of all
    with pytest.raises(RunError, match=r"task 1: sums from 2 of 3 clients, but run\.quorum=0\.9 needs 3"):
        go("sums", "continual", {**split, "run.quorum": 0.9})


def test_a_client_that_missed_a_task_says_so(go, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="fedpeft")
    monkeypatch.setattr(
        TaskSequence, "choose", lambda self, names, rules, number: names[:1] if number < 3 else names[:2]
    )
    go("run", "continual_lae", {"strategy.weighting": "uniform"})
    found = [event for event in read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"]
    assert [event["missed_tasks"] for event in found] == [0.0, 0.0, 0.5, 0.5]  # mean of client-000's 0, client-001's 1
    assert [record.message for record in caplog.records if "missed" in record.message] == [
        "client-001 missed task 0; it goes on with what the server has"
    ]


def test_a_client_weighs_what_its_records_are_not_what_it_replays(whole):
    """Else all weigh the same from task 1 on, and one with no past to replay weighs many times as much."""
    run, _ = whole("conpet_static")
    here = load_world(configs.load(run / "resolved.yaml"), run)
    server = here.strategy.before_round(here.start)
    for number, begun in ((1, 0), (3, 1)):
        state = replace(server, round=number - 1, numbers={**server.numbers, TASK: begun})
        task = replace(here.strategy.instructions(state), round=number)
        _, metrics = here.local.train("client-000", here.strategy.broadcast(state, "client-000"), task)
        data = here.local.train_data["client-000"]
        assert data.stored is here.train_encoded.stored  # a share is a view of the run's records
        assert metrics["num-examples"] == len(sequence.records_of_task(data, task, "client-000"))
