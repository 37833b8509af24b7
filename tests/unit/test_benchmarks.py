"""The federated benchmark: exact private steps, honest tuning, reproducible runs, claims by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from fedpeft import seeds
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import accounting, federated, federated_report, toy

SMALL = toy.Protocol(
    inputs=6,
    hidden=5,
    classes=3,
    train=180,
    test=60,
    subspace=None,
    shift=1.0,
    rank=2,
    clients=3,
    per_round=2,
    alpha=1.0,
    min_examples=20,
    rounds=2,
    steps=3,
    batch=10,
    clip=0.3,
)


def slow_gradients(A, B, W, V, x, y, trained, clip):
    """Autograd, one sample at a time: sum of gradients of the trained factors, each clipped as one vector."""
    total = {name: torch.zeros_like(value) for name, value in (("A", A), ("B", B))}
    factors, clipped = {"A": A, "B": B}, 0
    for one, label in zip(x, y, strict=True):
        leaf = {name: value.clone().requires_grad_() for name, value in factors.items()}
        logits = V @ torch.relu(W @ one + leaf["B"] @ (leaf["A"] @ one))
        loss = torch.nn.functional.cross_entropy(logits[None], label[None])
        found = torch.autograd.grad(loss, [leaf[name] for name in trained])
        norm = float(torch.cat([value.flatten() for value in found]).norm())
        clipped += norm > clip
        for name, value in zip(trained, found, strict=True):
            total[name] += value * min(1.0, clip / norm)
    return total, clipped


@pytest.mark.parametrize("trained", ["AB", "B"])
def test_clipped_sums_equal_a_loop_over_samples(trained):
    generator = torch.Generator().manual_seed(0)
    A, B, W, V, x = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 6), (5, 2), (5, 6), (3, 5), (12, 6))
    )
    y = torch.randint(3, (2, 12), generator=generator)
    present = torch.ones(2, 12, dtype=torch.bool)
    present[1, 7:] = False
    GA, GB = toy.gradients(A, B, W, V, x, y, present, "A" in trained, "B" in trained, 4.0)
    for row in range(2):
        count = int(present[row].sum())
        expected, clipped = slow_gradients(A[row], B[row], W[row], V[row], x[row, :count], y[row, :count], trained, 4.0)
        assert 0 < clipped < count
        assert torch.allclose(GB[row], expected["B"], rtol=0, atol=1e-12)
        if "A" in trained:
            assert torch.allclose(GA[row], expected["A"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("strategy", "trained"), [("fedit", "AB"), ("ffa_lora", "B")])
def test_private_training_is_noised_clipped_sgd_divided_by_the_expected_batch(strategy, trained):
    world = toy.make_world(SMALL, 5)
    options = {"transport": "dense"} if strategy == "ffa_lora" else {}
    adapter = toy.first_adapter(SMALL, 5, 1.0, torch.float64)
    server = federated.method("one", strategy, **options).make().initial(adapter, 5)
    server = server.with_tensors({f"{toy.SITE}/B": 0.1 * torch.ones(5, 2)})
    row = toy.Row(toy.Run("one", 0.7, 5, server), 0, world, "client-1", server.adapter)
    A, B = toy.train(SMALL, toy.Net.of([world], torch.float64), [row], 1, "A" in trained, True, 4.0)

    part = world.parts["client-1"]
    batches = toy.poisson(SMALL, part, seeds.torch_generator(5, "toy", "round", 1, "client-1", "batches"))
    generator = seeds.torch_generator(5, "toy", "round", 1, "client-1", "noise")
    noise = {"A": torch.randn(3, 2, 6, generator=generator), "B": torch.randn(3, 5, 2, generator=generator)}
    deviation = accounting.sigma(len(part), 10, 6, 4.0, 1e-5) * 0.3
    now = {name: server.adapter[f"{toy.SITE}/{name}"].clone() for name in "AB"}
    for step in range(3):
        taken = batches[step][batches[step] >= 0]
        total, _ = slow_gradients(now["A"], now["B"], world.W, world.V, world.x[taken], world.y[taken], trained, 0.3)
        for name in trained:
            now[name] = now[name] - 0.7 * (total[name] + deviation * noise[name][step]) / 10
    assert torch.allclose(B[0], now["B"], rtol=0, atol=1e-6) and torch.allclose(A[0], now["A"], rtol=0, atol=1e-6)
    assert torch.equal(A[0], server.adapter[f"{toy.SITE}/A"]) == (trained == "B")
    assert not torch.allclose(B[0], server.adapter[f"{toy.SITE}/B"], atol=1e-3)


def test_poisson_batches_have_binomial_sizes_and_no_repeats():
    protocol = replace(SMALL, steps=400, batch=25)
    part = torch.arange(1000, 1100)
    records = toy.poisson(protocol, part, torch.Generator().manual_seed(1))
    present = records >= 0
    sizes = present.sum(1).double()
    assert abs(float(sizes.mean()) - 25) < 4 * math.sqrt(25 * 0.75 / 400)
    assert 12 < float(sizes.var()) < 26  # 18.75; a fixed batch size would have 0
    assert all(len(set(row[row >= 0].tolist())) == int(size) for row, size in zip(records, sizes, strict=True))
    assert set(records[present].tolist()) == set(part.tolist())
    everything = toy.poisson(replace(protocol, batch=200), part, torch.Generator().manual_seed(1))
    assert torch.equal(everything, part.repeat(400, 1))


def test_noise_multiplier_keeps_the_budget():
    # Reference values of an accountant with a finer grid of orders: ours may only be larger, and not by much.
    for records, epsilon, reference in ((11225, 6, 0.702), (11225, 3, 0.907), (5000, 1, 3.359)):
        assert reference * 0.998 < accounting.sigma(records, 128, 1000, epsilon, 1e-5) < reference * 1.03
    noise = accounting.sigma(900, 128, 400, 3.0, 1e-5)
    assert 0.98 * 3 < accounting.spent(noise, 900, 128, 400, 1e-5) <= 3
    assert accounting.spent(noise, 900, 128, 200, 1e-5) < 2.2


def test_same_seed_same_run_and_batching_changes_nothing():
    worlds = [toy.make_world(SMALL, seed) for seed in (0, 1)]
    one = federated.method("FedIT", "fedit")

    def states(chosen, lrs):
        runs = toy.simulate(SMALL, chosen, one, lrs, 4.0, torch.float64)
        return {(run.lr, run.seed): run.server.adapter[f"{toy.SITE}/B"] for run in runs}

    together, again, alone = states(worlds, (0.5, 1.0)), states(worlds, (0.5, 1.0)), states(worlds[1:], (0.5,))
    assert all(torch.equal(together[key], again[key]) for key in together)
    assert torch.allclose(together[0.5, 1], alone[0.5, 1], rtol=0, atol=1e-12)
    assert not torch.allclose(together[0.5, 1], together[0.5, 0], atol=1e-3)
    assert not torch.allclose(together[0.5, 1], together[1.0, 1], atol=1e-3)


def test_a_run_whose_updates_are_not_finite_stops_and_says_so():
    worlds = [toy.make_world(SMALL, 0)]
    bad, good = toy.simulate(SMALL, worlds, federated.method("FedIT", "fedit"), (1e30, 0.1))
    assert bad.failed is not None and good.failed is None
    assert len(bad.curve) == len(good.curve) and bad.server.adapter[f"{toy.SITE}/B"].isfinite().all()


def test_tuning_never_draws_test_records(monkeypatch):
    drawn = []
    generator = seeds.torch_generator
    monkeypatch.setattr(seeds, "torch_generator", lambda *path: drawn.append((path[0], path[1:])) or generator(*path))
    worlds = federated.tuning_worlds(SMALL, 2)
    federated.tune(SMALL, worlds, federated.method("FFA", "ffa_lora", transport="dense"), (0.1, 1.0), "final", None)
    assert drawn and not [path for _, path in drawn if "test" in path]
    assert not {root for root, _ in drawn} & set(range(1000))
    for world in worlds:
        assert len(world.x) == 150 and len(world.held_x) == 30
        assert not (world.held_x[:, None] == world.x[None]).all(-1).any()


def test_tuned_rate_does_not_depend_on_test_labels():
    tuning = federated.tuning_worlds(SMALL, 2)
    world = toy.make_world(SMALL, 0)
    upset = [replace(one, held_y=(one.held_y + 1) % 3) for one in (world, toy.make_world(SMALL, 1))]
    one = federated.method("FedIT", "fedit")
    args = (tuning, one, (0.3,), (1e-3, 0.3), "final", None)
    honest = federated._compare({}, SMALL, [world], *args)
    poisoned = federated._compare({}, SMALL, upset, *args)
    tuned = [
        {(row["lr"], tuple(row["validation_by_lr"].items())) for row in rows if row["column"] == federated.TUNED}
        for rows in (honest, poisoned)
    ]
    assert tuned[0] == tuned[1] and len(tuned[0]) == 1
    assert honest[0]["final"] != poisoned[0]["final"]


def rows_of(method, values, **fields):
    where = {"experiment": "dp", "setting": "no DP", "column": "lr 1", **fields}
    return [
        {**where, "method": method, "seed": seed, "final": value, "average": value, "lr": 1.0, "failed_round": None}
        for seed, value in enumerate(values)
    ]


def test_claims_are_paired_by_seed():
    rows = rows_of("FedSVD", [0.3, 0.6, 0.9]) + rows_of("FFA", [0.2, 0.4, 0.6])[::-1]
    rows += rows_of("FedIT", [0.3, 0.5, 1.1]) + rows_of("FFA orthonormal", [0.7, 1.0, 1.3])
    mean, error, count = federated_report.paired(rows, "FedSVD", "FFA")
    assert (mean, error, count) == (pytest.approx(0.2), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert {claim["claim"]: claim["verdict"] for claim in federated_report.claims(rows)} == {
        "FedSVD > FFA": "holds",
        "FedSVD > FedIT": "unclear",
        "FFA > FedIT": "unclear",
        "FedSVD = FFA orthonormal": "does not hold",
    }
    assert federated_report.above(-0.3, 0.1) == "does not hold"
    with pytest.raises(InputError, match="same seeds"):
        federated_report.paired(rows_of("a", [1, 2]) + rows_of("b", [1, 2, 3]), "a", "b")
    with pytest.raises(InputError, match="two at least"):
        federated_report.paired(rows_of("a", [1]) + rows_of("b", [1]), "a", "b")


def test_required_claims_are_marked():
    names = ("FedSVD", "FFA", "FFA orthonormal", "FedIT")
    rows = [
        row
        for name in names
        for setting in ("no DP", "epsilon 6", "epsilon 1")
        for column in ("lr 1", "tuned")
        for row in rows_of(name, [0.1, 0.2], setting=setting, column=column)
    ]
    required = [(claim["claim"], claim["setting"]) for claim in federated_report.claims(rows) if claim["required"]]
    assert sorted(required) == [
        ("FedSVD = FFA orthonormal", "epsilon 1"),
        ("FedSVD = FFA orthonormal", "epsilon 6"),
        ("FedSVD = FFA orthonormal", "no DP"),
        ("FedSVD > FFA", "epsilon 6"),
        ("FedSVD > FFA", "no DP"),
        ("FedSVD > FedIT", "epsilon 1"),
    ]


def test_absolute_lambda_is_the_closed_form_as_written():
    from fedpeft.state import AdaptedLayer, AdapterState, ServerState, Update

    sites = {toy.SITE: AdaptedLayer("lora", (2, 2))}

    def adapter(A, B):
        return AdapterState({f"{toy.SITE}/A": torch.tensor([A]), f"{toy.SITE}/B": torch.tensor(B)[:, None]}, sites)

    updates = [Update("a", 1.0, adapter([1.0, 0.0], [1.0, 0.0])), Update("b", 1.0, adapter([3.0, 0.0], [0.0, 1.0]))]
    server = federated.AbsoluteFAIR(lambda_=1.0).aggregate(ServerState(adapter([1.0, 0.0], [0.0, 0.0])), updates)
    assert torch.allclose(server.adapter[f"{toy.SITE}/B"].flatten(), torch.tensor([0.3, 0.7]))


def test_quick_run_writes_results_and_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(federated, "DP", replace(federated.DP, inputs=16, train=1500, test=200))
    results = federated.run(tmp_path, 2, quick=True, experiments=("heterogeneity", "rowspace"))
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    assert (tmp_path / "heterogeneity.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / "dp.png").exists()
    assert len(federated_report.tables(results)) == 4
    reference = {(row["method"], row["seed"]): row["accuracy"] for row in results["baselines"]}
    assert len(reference) == 6
    for seed in (0, 1):
        assert reference["no adaptation", seed] < 0.35 < 0.55 < reference["frozen features + logistic regression", seed]
    worst = {row["method"]: row for row in results["rows"] if row["experiment"] == "rowspace"}
    assert worst["FedSVD"]["path_difference"] < 1e-12 and worst["FedSVD"]["span_deviation"] < 1e-12
    assert worst["FedIT"]["path_difference"] > 0.01 and worst["FedIT"]["span_deviation"] > 0.01
    with pytest.raises(InputError, match="heterogeneity"):
        federated.run(tmp_path, 2, experiments=("heterogenity",))
    with pytest.raises(InputError, match="seeds=1"):
        federated.run(tmp_path, 1)
