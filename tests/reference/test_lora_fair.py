"""LoRA-FAIR: its worked examples, its limits in lambda, and the best cosine that any correction of B can reach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.state import AdaptedLayer, AdapterState, ServerState, Update
from support import dense

WEIGHTS = [10.0, 30.0, 20.0, 15.0, 25.0]


def two_clients(A1, A2):
    """B1 = [1, 0], B2 = [0, 1] with these A; equal weights; s = 1."""
    start = AdapterState(
        {"q/A": torch.zeros(1, 2).double(), "q/B": torch.zeros(2, 1).double()}, {"q": AdaptedLayer("lora", (2, 2))}
    )
    pairs = [([[1.0], [0.0]], [A1]), ([[0.0], [1.0]], [A2])]
    return ServerState(start), [
        Update(f"c{index}", 1.0, start.replace({"q/B": torch.tensor(B).double(), "q/A": torch.tensor(A).double()}))
        for index, (B, A) in enumerate(pairs)
    ]


@pytest.mark.parametrize(("absolute", "expected"), [(0.0, [0.25, 0.75]), (1.0, [0.3, 0.7]), (4.0, [0.375, 0.625])])
def test_worked_example_a(absolute, expected):
    """A1 = [1, 0], A2 = [3, 0]: delta B = [-1, 1] / (4 + lambda), exact at lambda = 0. Here tr(A A^T) / r = 4."""
    server, updates = two_clients([1.0, 0.0], [3.0, 0.0])
    after = dense.make("lora_fair", lambda_=absolute / 4).aggregate(server, updates).adapter
    np.testing.assert_allclose(dense.array(after["q/B"]).ravel(), expected, atol=1e-12)
    np.testing.assert_allclose(dense.array(after["q/A"]), [[2.0, 0.0]], atol=1e-15)
    if absolute == 0:
        np.testing.assert_allclose(dense.product(after, "q"), [[0.5, 0.0], [1.5, 0.0]], atol=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, 0.01, 100.0])
def test_worked_example_b_cannot_be_corrected(lambda_):
    """A1 = [1, 0], A2 = [0, 1]: R A^T = 0, so B stays at its mean for every lambda."""
    server, updates = two_clients([1.0, 0.0], [0.0, 1.0])
    after = dense.make("lora_fair", lambda_=lambda_).aggregate(server, updates).adapter
    np.testing.assert_allclose(dense.array(after["q/B"]).ravel(), [0.5, 0.5], atol=1e-14)
    np.testing.assert_allclose(dense.product(after, "q"), np.full((2, 2), 0.25), atol=1e-14)


def corrected(lambda_, weights=WEIGHTS, **options):
    """One round from a fresh adapter; the clients do not depend on lambda."""
    return dense.rounds(dense.make("lora_fair", lambda_=lambda_, **options), dense.fresh(), weights, 1)[0]


@pytest.mark.parametrize("lambda_", [1e-3, 0.01, 0.3, 1.0, 20.0])
def test_it_minimises_the_l2_form(lambda_):
    done = corrected(lambda_)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        mean_A = dense.mean([A for _, A, _ in clients], p)
        absolute = lambda_ * np.trace(mean_A @ mean_A.T) / 3
        B, A = dense.lora_fair(clients, p, 2.0, absolute)
        assert dense.relative(dense.array(done.server.adapter[f"{site}/B"]), B) < 1e-9
        assert dense.relative(dense.array(done.server.adapter[f"{site}/A"]), A) < 1e-12


def test_large_lambda_is_fedit():
    done = corrected(1e12)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        assert (
            dense.relative(dense.product(done.server.adapter, site), dense.fedit(dense.triples(done, site), p, 2.0))
            < 1e-9
        )


def test_small_lambda_projects_the_mean_product_on_the_rows_of_A():
    done = corrected(1e-13)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        A = dense.mean([A for _, A, _ in clients], p)
        wanted = dense.mean_product(clients, p)
        assert dense.relative(dense.array(done.server.adapter[f"{site}/B"]), wanted / 2.0 @ np.linalg.pinv(A)) < 1e-8
        # what is left is outside the row space of A, the same part of R and of the mean product, and not zero
        P, R = dense.row_projector(A), wanted - dense.fedit(clients, p, 2.0)
        left = np.linalg.norm(wanted - dense.product(done.server.adapter, site))
        floor = np.linalg.norm(wanted - wanted @ P)
        assert left == pytest.approx(floor, rel=1e-8) and floor == pytest.approx(np.linalg.norm(R - R @ P), rel=1e-8)
        assert floor > 0.1 * np.linalg.norm(wanted)


def test_correction_shrinks_and_error_grows_with_lambda():
    p = dense.fractions(WEIGHTS)
    sizes, errors = [], []
    for lambda_ in (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0, 1e3):
        done = corrected(lambda_)
        site_sizes, site_errors = [], []
        for site in dense.SHAPES:
            clients = dense.triples(done, site)
            B = dense.mean([B for B, _, _ in clients], p)
            site_sizes.append(np.linalg.norm(dense.array(done.server.adapter[f"{site}/B"]) - B))
            site_errors.append(
                np.linalg.norm(dense.mean_product(clients, p) - dense.product(done.server.adapter, site))
            )
        sizes.append(site_sizes)
        errors.append(site_errors)
    assert (np.diff(sizes, axis=0) < 0).all()
    assert (np.diff(errors, axis=0) > 0).all()


def test_lambda_is_relative_to_the_size_of_A():
    """Clients with c A and B / c are the same functions: the corrected function does not depend on c."""
    base = corrected(0.1)
    for c in (0.01, 50.0):
        updates = [
            Update(
                update.client,
                update.weight,
                update.adapter.replace(
                    {
                        key: value * (c if key.endswith("/A") else 1 / c)
                        for key, value in update.adapter.tensors.items()
                        if key.endswith(("/A", "/B"))
                    }
                ),
            )
            for update in base.updates
        ]
        again = dense.make("lora_fair", lambda_=0.1).aggregate(base.sent, updates)
        for site in dense.SHAPES:
            assert dense.relative(dense.product(again.adapter, site), dense.product(base.server.adapter, site)) < 1e-10


@pytest.mark.parametrize("solver", ["closed", "cosine"])
def test_nothing_is_corrected_where_nothing_is_lost(solver):
    strategy = dense.make("lora_fair", solver=solver)
    start = dense.fresh()
    p = dense.fractions(WEIGHTS)
    same_A = [Update(f"c{index}", weight, dense.drift(start, ("B",), index)) for index, weight in enumerate(WEIGHTS)]
    after = strategy.aggregate(ServerState(start), same_A).adapter
    alone = strategy.aggregate(ServerState(start), [Update("c0", 3.0, dense.drift(start, ("A", "B"), 1))]).adapter
    for site in dense.SHAPES:
        B = dense.mean([dense.array(update.adapter[f"{site}/B"]) for update in same_A], p)
        assert dense.relative(dense.array(after[f"{site}/B"]), B) < 1e-9
        assert (
            dense.relative(dense.array(alone[f"{site}/B"]), dense.array(dense.drift(start, ("A", "B"), 1)[f"{site}/B"]))
            < 1e-9
        )


@pytest.mark.parametrize("solver", ["closed", "cosine"])
@pytest.mark.parametrize("lambda_", [0.0, 0.01])
def test_all_B_zero_stays_zero(solver, lambda_):
    start = dense.fresh()
    updates = [Update(f"c{index}", weight, dense.drift(start, ("A",), index)) for index, weight in enumerate(WEIGHTS)]
    after = dense.make("lora_fair", solver=solver, lambda_=lambda_).aggregate(ServerState(start), updates).adapter
    for site in dense.SHAPES:
        assert torch.equal(after[f"{site}/B"], torch.zeros_like(after[f"{site}/B"]))
        assert torch.isfinite(after[f"{site}/A"]).all()


def test_clients_with_opposite_B_give_a_finite_cosine():
    """The mean B is zero while the mean product is not: the cosine's gradient has 0 in its denominator."""
    start = dense.fresh()
    one = dense.drift(start, ("A", "B"), 1)
    other = dense.drift(start, ("A", "B"), 2)
    other = other.replace({f"{site}/B": -one[f"{site}/B"] for site in dense.SHAPES})
    updates = [Update("c0", 1.0, one), Update("c1", 1.0, other)]
    after = dense.make("lora_fair", solver="cosine").aggregate(ServerState(start), updates).adapter
    assert all(torch.isfinite(value).all() for value in after.tensors.values())


def test_cosine_solver_reaches_the_best_cosine():
    """No correction of B can exceed ||W P|| / ||W||, P the projector on the rows of the mean A."""
    done = corrected(0.0, solver="cosine", steps=4000, lr=0.2)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        wanted = dense.mean_product(clients, p)
        best = np.linalg.norm(wanted @ dense.row_projector(dense.mean([A for _, A, _ in clients], p))) / np.linalg.norm(
            wanted
        )
        fedit = dense.cosine(dense.fedit(clients, p, 2.0), wanted)
        got = dense.cosine(dense.product(done.server.adapter, site), wanted)
        assert fedit < best - 0.01
        assert fedit < got <= best + 1e-9 and got > best - 0.02 * (best - fedit)


def test_cosine_solver_starts_from_zero_and_improves_on_fedit_as_published():
    """The paper's numbers (lambda = .01, 1000 steps of .01). A random start would end below FedIT."""
    done = corrected(0.01, solver="cosine", steps=1000, lr=0.01)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        wanted = dense.mean_product(clients, p)
        assert dense.cosine(dense.product(done.server.adapter, site), wanted) > dense.cosine(
            dense.fedit(clients, p, 2.0), wanted
        )
    nothing = corrected(0.01, solver="cosine", steps=1, lr=0.0)
    for site in dense.SHAPES:
        assert (
            dense.relative(
                dense.product(nothing.server.adapter, site), dense.fedit(dense.triples(nothing, site), p, 2.0)
            )
            < 1e-12
        )


def test_first_step_of_the_cosine_solver_is_the_published_gradient():
    """-grad at 0 = [W / (||W|| ||X||) - c X / ||X||^2] A^T, X = B A, c = cos(W, X); one step of length lr."""
    lr = 1e-3
    done = corrected(0.0, solver="cosine", steps=1, lr=lr)
    p = dense.fractions(WEIGHTS)
    for site in dense.SHAPES:
        clients = dense.triples(done, site)
        B, A = dense.mean([B for B, _, _ in clients], p), dense.mean([A for _, A, _ in clients], p)
        W, X = dense.mean_product(clients, p) / 2.0, B @ A
        size = np.linalg.norm(X)
        step = lr * (W / (np.linalg.norm(W) * size) - dense.cosine(W, X) * X / size**2) @ A.T
        assert dense.relative(dense.array(done.server.adapter[f"{site}/B"]) - B, step) < 1e-6


def test_each_site_is_corrected_by_itself():
    done = corrected(0.01)
    alone = [
        Update(
            update.client,
            update.weight,
            replace(
                update.adapter,
                tensors={key: value for key, value in update.adapter.tensors.items() if not key.startswith("v/")},
                sites={key: site for key, site in update.adapter.sites.items() if key != "v"},
            ),
        )
        for update in done.updates
    ]
    start = replace(
        done.sent.adapter,
        tensors={key: value for key, value in done.sent.adapter.tensors.items() if not key.startswith("v/")},
        sites=alone[0].adapter.sites,
    )
    after = dense.make("lora_fair", lambda_=0.01).aggregate(ServerState(start), alone)
    assert torch.equal(after.adapter["u/B"], done.server.adapter["u/B"])
