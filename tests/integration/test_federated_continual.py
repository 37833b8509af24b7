"""Federated continual learning through `simulate` and the command line: five shipped configs, resume, privacy, refusals.

Runs are tiny (200 digits, 3 clients, 2 tasks of 2 rounds, 2 steps), so nothing here says how well a method learns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpeft import checkpoint, report
from fedpeft import config as configs
from fedpeft.adapters.features import batches
from fedpeft.clients import learning
from fedpeft.clients.learning import head_sums, unit
from fedpeft.clients.local import Local
from fedpeft.continual import matrix
from fedpeft.errors import InputError, RunError
from fedpeft.metrics import read
from fedpeft.privacy.accounting import composed
from fedpeft.privacy.ledger import BudgetExhausted, Ledger
from fedpeft.simulations import run as runs
from fedpeft.simulations.world import world
from fedpeft.strategies.learning.build import head as build_head

SMALL: dict[str, Any] = {
    "data.limit": 200, "data.clients": 3, "data.partition": "iid", "continual.tasks": 2, "run.rounds": 4,
    "client.local_steps": 2, "client.batch_size": 8, "run.baselines": False,
}
DP_LDA = {"continual.head": "lda", "continual.statistics_noise": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "factor_coso": ("continual", {}),
    "coso": ("continual_coso", {}),
    "conpet_static": ("continual_conpet", {}),
    "lae": ("continual_lae", {"continual.head": "lda"}),
    "private": ("continual_dp", DP_LDA),
}
SHIPPED = ["continual", "continual_coso", "continual_conpet", "continual_dp", "continual_lae"]
ALONE = {"run.cohort_tokens": 0}


@pytest.fixture
def go(tmp_path, monkeypatch):
    """`go(name, config, more)` runs a shipped config tiny into tmp_path/name, without plots."""
    monkeypatch.setattr(report, "write", lambda run: [])

    def run(name, config, more=None, **arguments):
        return runs.simulate(config, {**SMALL, **(more or {})}, tmp_path / name, **arguments)

    return run


def adapter(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))}


def ended(run: Path):
    return checkpoint.latest(run / "checkpoints")


def same_state(one, two):
    """Bit for bit: adapter, what bodies and heads keep, rows."""
    assert (one.round, one.numbers) == (two.round, two.numbers)
    assert one.adapter.sha256() == two.adapter.sha256()
    assert one.memory.keys() == two.memory.keys()
    assert all(torch.equal(value, two.memory[key]) for key, value in one.memory.items())


def kept(server, ending):
    return {key: value for key, value in server.memory.items() if key.startswith("continual:") and key.endswith(ending)}


# One task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lda", "ncm", "ranpac"])
def test_a_federated_head_is_the_one_of_the_pooled_records(go, tmp_path, name):
    options = {"continual.head_options": {"features": 64}} if name == "ranpac" else {}
    summary = go("run", "continual_lae", {"continual.tasks": 1, "run.rounds": 1, "continual.head": name, **options})
    server, run = ended(tmp_path / "run"), tmp_path / "run"
    here = world((run / "resolved.yaml").read_text(), run)
    here.local.model.write(server.adapter)
    central = build_head(here.config, 10, learning.width_of(here.local.model))
    pooled = head_sums(here.local.model, central, here.train_encoded)
    assert pooled
    for key, value in pooled.items():
        torch.testing.assert_close(server.memory[f"continual:sums|online|{key}"], value, rtol=1e-6,
                                   atol=1e-6 * float(value.abs().max()))
    other = build_head(here.config, 10, central.width)
    other.update({key: server.memory[f"continual:sums|online|{key}"] for key in pooled}, list(range(10)))
    central.update(pooled, list(range(10)))
    right = 0
    for found, _, labels in batches(here.local.model, here.test_encoded):
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
    assert sorted(sum(section["tasks"], [])) == [str(digit) for digit in range(10)]
    assert right.shape == (2, 2) and right[0, 1] == 0 and (right <= count).all() and right[0, 0] > 0
    assert set(section["metrics"]["values"]) == set(matrix.NAMES)
    assert section["metrics"]["values"]["acc_micro"] == pytest.approx(right[1].sum() / count.sum())
    assert section["metrics"]["values"]["bwt"] == pytest.approx((right[1, 0] - right[0, 0]) / count[0])
    assert section["metrics"]["undefined"].keys() == {"fwt", "a_auc"}
    tasks = [event for event in events if event["event"] == "task"]
    assert [event["right"] for event in tasks] == section["right"] and [event["round"] for event in tasks] == [2, 4]
    fitted = section["head"] == "lda"
    sketched = section["body"] == "coso"
    asked = [(event["sums"], event["round"]) for event in events if event["event"] == "sums"]
    assert asked == [*[("sketch", 1)] * sketched, *[("head", 2)] * fitted, *[("sketch", 3)] * sketched,
                     *[("head", 4)] * fitted]
    assert sum(event["event"] == "round" for event in events) == 4
    assert not result.json["quarantined"]


def test_bodies_do_what_sequential_does_not(go, tmp_path):
    """Task 0 is the same where nothing is to be remembered; later the adapter is another one, and state shows why."""
    marks = {"factor_coso": ("|N", "continual"), "coso": ("|M", "continual_coso"), "lae": ("|offline", "continual_lae")}
    for body, (ending, config) in marks.items():
        go(body, config)
        assert kept(ended(tmp_path / body), ending)
        go(f"{body}-not", config, {"continual.body": "sequential"})
        assert not kept(ended(tmp_path / f"{body}-not"), ending)
        assert adapter(tmp_path / body) != adapter(tmp_path / f"{body}-not")
    replaying = go("conpet", "continual_conpet", ALONE)["continual"]["right"]
    seen = go("not", "continual_conpet", {**ALONE, "continual.body": "sequential", "continual.head": "masked"})
    assert replaying[0] == seen["continual"]["right"][0] and adapter(tmp_path / "conpet") != adapter(tmp_path / "not")


def test_factor_coso_in_a_run_keeps_tasks_apart(go, tmp_path):
    """What task 1 added to a site's function has no part in the rows of A that task 0 used."""
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        write = checkpoint.write
        patch.setattr(checkpoint, "write",
                      lambda folder, server, *rest: (states.__setitem__(server.round, server), write(folder, server)))
        go("run", "continual")
    first, last = states[2].adapter, states[4].adapter
    for site in first.lora_sites():
        A = torch.linalg.qr(first[f"{site}/A"].double().T).Q
        change = last.sites[site].scaling * last[f"{site}/B"].double() @ last[f"{site}/A"].double()
        assert float((change @ A).norm()) < 1e-5 * float(change.norm())
        old = first.sites[site].scaling * first[f"{site}/B"].double() @ first[f"{site}/A"].double()
        base = last[f"{site}/residual_B"].double() @ last[f"{site}/residual_A"].double()
        torch.testing.assert_close(base, old, atol=1e-6 * float(old.norm()), rtol=0)


@pytest.mark.parametrize("strategy, options", [
    ("fedsvd", {"strategy.transport": "core"}),
    ("ffa_lora", {"strategy.transport": "seed", "strategy.init": "orthonormal"}),
])
def test_the_out_side_works_with_factors_that_clients_draw_themselves(go, strategy, options):
    """It chooses no A, so these transports are not refused; then every client must still agree with the server."""
    summary = go("run", "continual", {"strategy": strategy, **options, "continual.side": "out"})
    assert summary["rounds"] == 4 and not summary["quarantined"]


# Engines and resume ---------------------------------------------------------------------------------------------------


def test_a_worker_process_gives_the_same_bits(go, tmp_path):
    go("here", "continual_coso", ALONE)
    go("worker", "continual_coso", {**ALONE, "run.workers": 1})
    assert adapter(tmp_path / "worker") == adapter(tmp_path / "here")
    same_state(ended(tmp_path / "worker"), ended(tmp_path / "here"))


@pytest.mark.parametrize("case", ["factor_coso", "conpet_static", "private"])
def test_a_cohort_gives_the_adapter_of_clients_one_after_another(case, go, tmp_path):
    config, more = CASES[case]
    go("alone", config, {**more, **ALONE})
    go("cohort", config, more)
    for name in adapter(tmp_path / "alone"):
        one, two = (load_file(tmp_path / run / "adapter" / name) for run in ("alone", "cohort"))
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


@pytest.mark.parametrize("case", CASES)
def test_a_cut_run_ends_as_if_nothing_had_happened(case, go, tmp_path):
    config, more = CASES[case]
    whole = go("whole", config, more)
    for name, cut in CUTS.items():
        with pytest.raises(KeyboardInterrupt):
            go(name, config, more, on_event=cut)
        again = runs.resume(tmp_path / name)
        assert again["continual"] == whole["continual"], name
        assert adapter(tmp_path / name) == adapter(tmp_path / "whole"), name
        same_state(ended(tmp_path / name), ended(tmp_path / "whole"))
        if case == "private":
            assert again["privacy"]["clients"] == whole["privacy"]["clients"], name


def test_a_resumed_run_has_every_event_once(go, tmp_path):
    go("whole", "continual")
    with pytest.raises(KeyboardInterrupt):
        go("broken", "continual", on_event=CUTS["before-the-head"])
    runs.resume(tmp_path / "broken")
    events = [[{key: value for key, value in event.items() if key not in ("time", "seconds")}
               for event in read(tmp_path / run / "metrics.jsonl")] for run in ("whole", "broken")]
    assert [event["event"] for event in events[1]] == [event["event"] for event in events[0]]
    assert events[0] == events[1]


# Privacy --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def private(go, tmp_path, monkeypatch):
    """A finished private run with an LDA head: its world, and the requests for sums (client, received, task)."""
    asked, sums = [], Local.sums
    monkeypatch.setattr(Local, "sums", lambda self, *request: (asked.append(request), sums(self, *request))[1])
    summary = go("run", "continual_dp", DP_LDA)
    run = tmp_path / "run"
    return summary, world((run / "resolved.yaml").read_text(), run), asked


def test_every_task_has_an_account_with_its_training_and_its_sums(private, tmp_path):
    summary, here, asked = private
    table, folder = {}, tmp_path / "run" / "ledger"
    assert sorted(path.stem for path in folder.glob("*")) == [
        f"client-{client:03d}+task-{task}" for client in range(3) for task in range(2)]
    for path in folder.glob("*.jsonl"):
        entries, task = Ledger(path).entries(), int(path.stem[-1])
        client = path.stem.partition("+")[0]
        assert [(entry.round, entry.noise_multiplier, entry.steps) for entry in entries] == [
            (2 * task + 1, 1.0, 2), (2 * task + 2, 1.0, 2), (2 * task + 2, 2.0, 1)]
        data = here.local.train_data[client]
        mine = int(torch.isin(data.labels, torch.tensor(here.strategy.curriculum.groups[task])).sum())
        assert [entry.sample_rate for entry in entries] == [8 / mine, 8 / mine, 1.0]
        cost = composed(((8 / mine, 1.0, 4), (1.0, 2.0, 1)), 1e-3)
        table[client] = max(cost, table.get(client, 0.0))
    for client, epsilon in table.items():
        assert summary["privacy"]["clients"][client]["epsilon"] == pytest.approx(epsilon, abs=1e-9)
        assert summary["privacy"]["clients"][client]["steps"] == 8
    assert len(asked) == 6


def test_sums_are_in_the_ledger_before_they_leave_and_cost_once(private, tmp_path, monkeypatch):
    _, here, asked = private
    client, received, task = asked[-1]
    path = tmp_path / "run" / "ledger" / f"{client}+task-1.jsonl"
    before = path.read_bytes()
    one, two = here.local.sums(client, received, task), here.local.sums(client, received, task)
    assert one[0].sha256() == two[0].sha256() and one[1] == {"num-examples": 1.0} and path.read_bytes() == before

    def fail(*arguments):
        raise ValueError("record 17 is odd")

    monkeypatch.setattr(learning, "private_head_sums", fail)
    with pytest.raises(RunError, match="the reason stays with it"):
        here.local.sums(client, received, {**task, "view": "offline"})
    assert len(path.read_bytes()) > len(before), "what may have left is counted"
    with pytest.raises(BudgetExhausted):  # two views of the head are planned, and both are spent
        here.local.sums(client, received, {**task, "view": "another"})
    assert len(Ledger(path).entries()) == 4


def test_the_budget_is_that_of_training_alone_where_no_head_is_fitted(tmp_path):
    """`statistics_noise` beside a head that asks for no sums must not buy more training."""
    from fedpeft.clients.private import Guard

    private = {"privacy.noise_multiplier": None, "privacy.epsilon": 3.0, "continual.statistics_noise": 1.0}
    for more in ({}, {"continual.body": None}):
        try:
            config = configs.load("continual_dp", {**SMALL, **private, **more})
        except InputError as error:
            assert "statistics_noise" in str(error)
            continue
        plan = Guard(config, tmp_path, "run").plan("client-000", lambda: 60)
        assert plan.budget.epsilon == 3.0


def test_a_server_cannot_open_a_new_account_for_the_same_records(private):
    """The guarantee is against the server too: which task its records belong to, a client knows by itself."""
    _, here, asked = private
    client, received, task = asked[-1]
    for wrong in ({"task": 7}, {"task": 0}):
        spent = here.local.guard.spending([client])[client]["epsilon"]
        with pytest.raises((RunError, InputError)):
            here.local.sums(client, received, {**task, "learn": {**task["learn"], **wrong}})
        assert here.local.guard.spending([client])[client]["epsilon"] == spent
    train = {**here.strategy.task(ended(here.local.guard.folder.parent)), "round": 9}
    train.pop("learn")
    with pytest.raises((RunError, InputError)):
        here.local.train(client, received, train)


def test_private_heads_answer_on_features_of_norm_one():
    assert torch.allclose(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# Who takes part -------------------------------------------------------------------------------------------------------


def without_task_1(go, tmp_path) -> Path:
    """A split in which client-002 has records of task 0 alone."""
    go("first", "continual", {"run.rounds": 2})
    run = tmp_path / "first"
    here = world((run / "resolved.yaml").read_text(), run)
    tree = json.loads((run / "split.json").read_text())
    mine = np.array(tree["clients"]["client-002"])
    of = np.isin(here.train.labels[mine], here.strategy.curriculum.groups[1])
    tree["clients"]["client-002"] = mine[~of].tolist()
    tree["clients"]["client-001"] += mine[of].tolist()
    (tmp_path / "split.json").write_text(json.dumps(tree))
    return tmp_path / "split.json"


def test_a_client_without_records_of_a_task_sits_out(go, tmp_path):
    split = {"data.split": str(without_task_1(go, tmp_path))}
    summary = go("run", "continual", split)
    assert [(row["round"], row["client"]) for row in summary["quarantined"]] == [(3, "client-002"), (4, "client-002")]
    assert all("has no records of task 1" in row["reason"] for row in summary["quarantined"])
    events = read(tmp_path / "run" / "metrics.jsonl")
    assert [(event["client"], event["round"]) for event in events if event["event"] == "sums_missing"] == [
        ("client-002", 4)]
    assert [event["clients"] for event in events if event["event"] == "sums"] == [3, 2]
    with pytest.raises(RunError, match=r"round 3: 2 good replies of 3, but run\.quorum=1.* needs 3"):
        go("strict", "continual", {**split, "run.quorum": 1.0})
    with pytest.raises(RunError, match=r"task 1: sums from 2 of 3 clients, but run\.quorum=0\.9 needs 3"):
        # training asks two clients a round that have records; the sums are asked of all
        go("sums", "continual", {**split, "run.quorum": 0.9, "run.clients_per_round": 1, "run.seed": 0})


def test_a_client_that_missed_a_task_says_so(go, tmp_path, caplog):
    caplog.set_level("INFO", logger="fedpeft")
    go("run", "continual", {"run.clients_per_round": 1, "run.rounds": 4})
    chosen = [event for event in read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"]
    first = {event["clients"][0] for event in chosen[:2]}
    for event in chosen:
        late = event["round"] > 2 and event["clients"][0] not in first
        assert event["missed_tasks"] == float(late)
        assert (f"{event['clients'][0]} missed task 0" in caplog.text) >= late
    assert {event["clients"][0] for event in chosen[2:]} - first, "choose another seed: nobody missed a task"


def test_a_client_weighs_what_its_records_are_not_what_it_replays(go, tmp_path):
    """Else all weigh the same from task 1 on, and one with no past to replay weighs many times as much."""
    go("run", "continual_conpet")
    run = tmp_path / "run"
    here = world((run / "resolved.yaml").read_text(), run)
    server = here.strategy.before_round(here.start)
    for number in (1, 3):
        state = type(server)(server.adapter, number - 1, server.memory, server.numbers)
        task = {**here.strategy.task(state), "round": number}
        _, metrics = here.local.train("client-000", here.strategy.broadcast(state, "client-000"), task)
        data = here.local.train_data["client-000"]
        assert metrics["num-examples"] == len(learning.records(data, task, "client-000"))


# Refusals -------------------------------------------------------------------------------------------------------------

SAMPLE = {"privacy.unit": "sample", "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-3,
          "strategy.weighting": "uniform"}
CLIENT = {**SAMPLE, "privacy.unit": "client", "privacy.delta": 0.1}
COSO_LINEAR = ("continual_coso", {"continual.head": "linear"})
REFUSED = {
    "rounds": ("continual", {"run.rounds": 16}, r"continual\.tasks=5: run\.rounds=16 is not a multiple"),
    "causal": ("causal_lm", {"continual.body": "sequential"}, r"continual\.body.*model\.task=causal-lm has none"),
    "head": ("continual", {"adapter.train_head": False}, r"adapter\.train_head=false.*Set adapter\.train_head=true"),
    "client-lda": ("continual", CLIENT, r"privacy\.unit=client: continual\.head=lda.*Set continual\.head=linear"),
    "client-coso": (COSO_LINEAR[0], {**COSO_LINEAR[1], **CLIENT},
                    r"privacy\.unit=client: .*continual\.body=coso.*continual\.basis=random"),
    "secagg-lda": ("continual", {"secagg.enabled": True}, r"secagg\.enabled=true.*lda.*Set continual\.head=linear"),
    "secagg-coso": (COSO_LINEAR[0], {**COSO_LINEAR[1], "secagg.enabled": True},
                    r"secagg\.enabled=true.*coso.*continual\.basis=random"),
    "noise": ("continual", {"continual.statistics_noise": 1.5}, r"statistics_noise=1\.5 is for privacy\.unit=sample"),
    "policy": ("continual_dp", {"privacy.policy": "."}, r"privacy\.policy=.*Set privacy\.policy=null"),
    "replay": ("continual_conpet", SAMPLE, r"privacy\.unit=sample: continual\.body=conpet_static.*without replay"),
    "sketch": (COSO_LINEAR[0], {**COSO_LINEAR[1], **SAMPLE}, r"privacy\.unit=sample.*coso.*Set continual\.basis=random"),
    "fitted": ("continual_dp", {"continual.head": "lda"}, r"continual\.head=lda.*Set continual\.statistics_noise"),
    "epsilon": ("continual_dp", {**DP_LDA, "privacy.epsilon": 3.0, "privacy.noise_multiplier": None},
                r"privacy\.epsilon=3: .*lda.*Give privacy\.noise_multiplier"),
    "lacking": ("continual_coso", {"continual.side": "out", "strategy": "ffa_lora", "strategy.transport": "dense"},
                r"continual\.body=coso: it needs clients that train A; strategy ffa_lora trains B, head"),
    "rule": ("continual_coso", {"strategy": "lora_fair"},
             r"continual\.body=coso: .*lora_fair cannot do\. Strategies that can: fedit, ffa_lora, fedsvd"),
    "keeps": ("continual_lae", {"strategy": "fedsa", "data.holdout": 0.2},
              r"continual\.body=lae: strategy fedsa leaves B with each client"),
    "core": ("continual", {"strategy.transport": "core"},
             r"strategy\.transport=core: continual\.body=factor_coso.*Set strategy\.transport=dense"),
    "seed": ("continual", {"strategy": "ffa_lora"}, r"strategy\.transport=seed: .*Set strategy\.transport=dense"),
    "body": ("continual", {"continual.body": "cosso"}, r"continual\.body: 'cosso' is not known.*coso"),
    "option": ("continual", {"continual.side": "left"}, r"continual\.side.*left.*in.*out.*both"),
    "headname": ("continual", {"continual.head": "lad"}, r"continual\.head: 'lad' is not known.*lda"),
    "headoption": ("continual", {"continual.head_options": {"rigde": 1.0}}, r"continual\.head_options.*rigde"),
    "sites": ("continual", {"run.engine": "sites"}, r"run\.engine=sites.*continual"),
    "dtype": ("continual", {"model.dtype": "bfloat16"}, r"model\.dtype=bfloat16.*Set model\.dtype=float32"),
    "moving-A": ("continual", {"strategy": "fedex"}, r"continual\.body=factor_coso.*fedex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_is_refused_with_key_and_way_out(case):
    config, overrides, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        configs.load(config, overrides)


def test_more_tasks_than_classes_are_refused_before_anything_is_trained(go, tmp_path):
    with pytest.raises(InputError, match=r"continual\.tasks=12: 10 classes make 1 to 10 tasks"):
        go("run", "continual", {"continual.tasks": 12, "run.rounds": 12})
    assert not (tmp_path / "run").exists()
