"""The same seeds give the same adapter in this process, in worker processes and under Ray: bit for bit where clients
are trained one after another, to rounding where cohorts are others.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.sample import few

SGD = {"client.optimizer": "sgd", "client.lr": 0.1}
CASES = {
    "fedsvd": {"strategy": "fedsvd", **SGD},  # whose path of products does not depend on the basis that an SVD takes
    "scaffold": {"strategy.wrap": ["scaffold"], **SGD},
    "personal": {"strategy": "fedsa", "data.holdout": 0.25},
}


ALONE = {"run.cohort_tokens": 0}
AWAY = 0.01  # of a product's norm: rounding moves a step of Adam by as much, another client or batch by far more


def adapter(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "adapter").rglob("*.safetensors"))}


def function(path: Path) -> dict[str, torch.Tensor]:
    """What an adapter file computes: B A of every site, in float64, and other tensors as they are.

    The factors themselves may come in another basis: where singular values are near to each other an SVD takes any.
    """
    tensors = {key: value.double() for key, value in load_file(path).items()}
    sites = [key for key in tensors if ".lora_A." in key]
    if all(not tensors[key.replace(".lora_A.", ".lora_B.")].any() for key in sites):  # B stays with the clients
        return {key: value for key, value in tensors.items() if value.any()}
    products = {
        key.replace(".lora_A.", "."): tensors.pop(key.replace(".lora_A.", ".lora_B.")) @ tensors.pop(key)
        for key in sites
    }
    assert min(float(value.abs().max()) for value in products.values()) > 0, "trained"
    return {**products, **tensors}


@pytest.mark.parametrize("case, workers", few(product(CASES, (1, 2)), [*((case, 2) for case in CASES), ("fedsvd", 1)]))
def test_worker_processes_give_the_same_adapter(case, workers, tiny, tmp_path, request):
    if case != "fedsvd":  # whose processes are fresh ones
        request.getfixturevalue("forked")
    common = {**CASES[case], **ALONE, "run.clients_per_round": 3}
    tiny("here", common)
    tiny("workers", {**common, "run.workers": workers})
    assert adapter(tmp_path / "workers") == adapter(tmp_path / "here")


@pytest.mark.parametrize("case", [*CASES, "private", "fedex"])
def test_a_cohort_gives_the_adapter_of_clients_trained_one_after_another(case, tiny, tmp_path, forked):
    private = {"privacy.unit": "sample", "privacy.noise_multiplier": 0.5, "strategy.weighting": "uniform"}
    more = {"private": private, "fedex": {"strategy": "fedex"}}
    config = {**{**CASES, **more}[case], "run.clients_per_round": 3}
    tiny("alone", {**config, **ALONE})
    tiny("cohort", config)
    runs = ["cohort"]
    if case == "private":
        runs.append("shares")
        tiny("shares", {**config, "run.workers": 2})
    for run in runs:
        for path in sorted((tmp_path / "alone" / "adapter").rglob("*.safetensors")):
            twin = function(tmp_path / run / "adapter" / path.relative_to(tmp_path / "alone" / "adapter"))
            for key, value in function(path).items():
                away = float((twin[key] - value).norm() / value.norm())
                assert away < AWAY, f"{run}: {path.name}: {key}: {away:.2g} of its norm away"


def test_ray_gives_the_same_adapter(tiny, tmp_path):
    # SCAFFOLD keeps state at the clients, so this also shows that the state survives from round to round.
    here = tiny("here", {**CASES["scaffold"], **ALONE, "run.clients_per_round": 3})
    ray = tiny("ray", {**CASES["scaffold"], **ALONE, "run.clients_per_round": 3, "run.engine": "ray", "run.workers": 2})
    assert adapter(tmp_path / "ray") == adapter(tmp_path / "here")
    assert ray["accuracy_by_round"] == here["accuracy_by_round"]
    assert (ray["engine"], here["engine"]) == ("ray", "cohort")


@pytest.mark.full  # of processes of our own in every `make test`: test_hostile
def test_an_actor_that_dies_is_replaced(tiny):
    summary = tiny("ray", {"run.rounds": 2, "run.engine": "ray", "run.faults": {"client-001": "die"}})
    assert summary["rounds"] == 2
    assert {row["client"] for row in summary["quarantined"]} == {"client-001"}
    assert "process ended" in summary["quarantined"][0]["reason"]
