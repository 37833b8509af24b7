"""CoSO and its algebra against slow references: steps, leaks, saturation, sketches, owners, kept changes."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.continual.body import Body
from fedpeft.continual.model import Plastic
from fedpeft.continual.parts.subspace import (
    extend_within,
    leading_directions,
    left_singular,
    merge_sketches,
    project_out,
    root_of_gram,
    sketch,
)
from fedpeft.models.base import Base
from support.full_weight_parts import drawn, made, records


def coso(side: str = "out", m: int = 4, n: int = 4, **options: object) -> Body:
    net = nn.Sequential(nn.Linear(n, m, bias=False), nn.Linear(m, 2)).requires_grad_(False)
    model = Plastic(Base(net, lambda batch: net(batch["x"]), {"1": net[1]}, None, "", "image-classification"), ["0"])
    return made("coso", model, records([0, 1], n), side=side, **options)


def step(body: Body, G: Tensor) -> None:
    body.parameters["0/W"].grad = G.clone()
    body.step()


def basis(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("rotate", [False, True])
def test_coso_steps_follow_the_equations(side, rotate):
    m, n, r1 = 6, 5, 2
    body = coso(side, m, n, r1=r1, r2=3, refresh=2, rotate_moments=rotate, svd="full")
    rows = m if side == "out" else n
    body.memory["bases"]["0/M"] = M = basis(rows, 2)
    W = np.zeros((rows, n if side == "out" else m))
    P, first, second = np.zeros((rows, r1)), np.zeros((r1, W.shape[1])), np.zeros((r1, W.shape[1]))
    for t in range(5):
        G = drawn(m, n, seed=t)
        step(body, G)
        left = (G if side == "out" else G.T).double().numpy()
        left = left - M.double().numpy() @ (M.double().numpy().T @ left)
        if t % 2 == 0:
            U = np.linalg.svd(left)[0][:, :r1]
            U = U * np.sign(U[np.abs(U).argmax(0), np.arange(r1)])
            if rotate:
                turn = U.T @ P
                first, second = turn @ first, turn**2 @ second
            P = U
        R = P.T @ left
        first, second = 0.9 * first + 0.1 * R, 0.999 * second + 0.001 * R**2
        N = first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-6)
        W = W - 0.1 * P @ N
    found = body.parameters["0/W"].detach().double().numpy()
    np.testing.assert_allclose(found if side == "out" else found.T, W, atol=2e-5)
    assert body.memory["adapters"]["0/m"].shape == (r1, n if side == "out" else m)


@pytest.mark.parametrize("svd", ["gram", "randomized", "full"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_rank_deficient_gradients_with_old_moments_do_not_leak_into_the_protected_space(svd, side):
    body = coso(side, 64, 64, r1=16, r2=16, svd=svd)
    body.memory["bases"]["0/M"] = M = basis(64, 40)
    for t in range(6):
        rank = 16 if t < 3 else 8
        step(body, drawn(64, rank, seed=t) @ drawn(rank, 64, seed=50 + t))
    W = body.parameters["0/W"].detach()
    moved = M.T @ W if side == "out" else W @ M
    assert W.norm() > 1 and moved.norm() / W.norm() < 1e-5
    P = body.memory["adapters"]["0/P"]
    assert (P.norm(dim=0) > 0.99).sum() == 8 and bool((P[:, 8:] == 0).all())
    assert (M.T @ P).norm() < 1e-5


@pytest.mark.parametrize("svd", ["gram", "randomized", "full"])
def test_weak_directions_do_not_leak_either(svd):
    """A Gram matrix squares singular values: near the threshold its eigenvectors mix with those of zero."""
    body = coso("out", 64, 64, r1=16, r2=16, svd=svd)
    body.memory["bases"]["0/M"] = M = basis(64, 40)
    left = torch.linalg.qr(project_out(drawn(64, 8), M)).Q
    step(body, left * torch.logspace(0, -5.5, 8) @ basis(64, 8, seed=5).T)
    P = body.memory["adapters"]["0/P"]
    assert (P.norm(dim=0) > 0.99).sum() >= 8 and (M.T @ P).norm() < 1e-6


def test_ways_to_the_directions_agree():
    wide = drawn(20, 50).double() * (0.7 ** torch.arange(50))
    for G in (wide, wide.T):
        U, sigma = left_singular(G, 6, "full")
        assert torch.allclose(sigma, torch.linalg.svdvals(G)[:6])
        for svd in ("gram", "randomized"):
            U2, sigma2 = left_singular(G, 6, svd, torch.Generator().manual_seed(0))
            assert torch.allclose(sigma, sigma2, rtol=1e-4) and torch.allclose(U, U2, atol=1e-3), svd
    U, sigma = left_singular(torch.outer(torch.tensor([0.0, -2.0]), torch.tensor([1.0, 0.0, 0.0])), 4, "gram")
    assert U.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]] and sigma.tolist() == [2, 0, 0, 0]


def test_a_full_layer_stands_still_and_says_so(caplog):
    body = coso(eps_th=1.0, r2=4, r1=4)
    for t in range(3):
        step(body, drawn(4, 4, seed=t))
    with caplog.at_level(logging.WARNING, "fedpeft"):
        body.end_task(body.statistics(body.records()))
    assert body.saturation() == {"0": 1.0} and "100 %" in caplog.text and "0 are protected" in caplog.text
    before = body.parameters["0/W"].detach().clone()
    body.feed(1, body.current(), [0, 1])
    body.start()
    step(body, drawn(4, 4, seed=9))
    assert torch.equal(body.parameters["0/W"], before)
    assert body.memory["bases"]["0/M"].shape == (4, 4)


def test_a_cap_keeps_the_leading_directions_and_room_to_learn(caplog):
    body = coso(eps_th=1.0, r2=4, r1=4, cap=0.5)
    G = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    step(body, G)
    with caplog.at_level(logging.WARNING, "fedpeft"):
        body.end_task(body.statistics(body.records()))
    assert body.saturation() == {"0": 0.5} and not caplog.text
    assert torch.allclose(body.memory["bases"]["0/M"].abs(), torch.eye(4)[:, :2], atol=1e-6)


def test_the_basis_grows_keeps_its_columns_and_stays_orthonormal():
    body = coso("out", 12, 9, r1=3, r2=3)
    sizes = []
    for task in range(4):
        before = body.memory["bases"]["0/M"].clone()
        for t in range(4):
            step(body, drawn(12, 9, seed=10 * task + t))
        body.end_task(body.statistics(body.records()))
        M = body.memory["bases"]["0/M"]
        assert torch.allclose(M[:, : before.shape[1]], before, atol=1e-6)
        assert (M.T @ M - torch.eye(M.shape[1])).abs().max() < 1e-6
        sizes.append(M.shape[1])
        body.feed(task + 1, body.current(), [0, 1])
        body.start()
        assert body.memory["numbers"]["t"] == 0 and not body.memory["adapters"]["0/m"].any()
        assert not body.memory["statistics"]["0/S"].any()
    assert sizes == sorted(sizes) and 1 <= sizes[0] <= 3 and sizes[-1] > sizes[0]


def test_leading_directions_by_their_share_of_the_energy():
    S = torch.diag(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).sqrt())
    shares = {0.3: 1, 0.5: 1, 0.79: 1, 0.8: 2, 0.99: 2, 1.0: 3}
    assert {share: leading_directions(S, share).shape[1] for share in shares} == shares
    assert leading_directions(torch.zeros(3, 2), 0.9).shape == (3, 0)
    assert torch.equal(leading_directions(S, 0.9).abs(), torch.eye(3, dtype=torch.float64)[:, :2])
    assert torch.allclose(root_of_gram(S @ S.T, 2).abs(), S[:, :2])


@pytest.mark.parametrize(("shrink", "kept", "delta"), [("next", [3.0, 1.0], 3.0), ("last", [2.0, 0.0], 4.0)])
def test_a_sketch_shrinks_by_the_place_that_was_asked_for(shrink, kept, delta):
    S = torch.zeros(3, 2, dtype=torch.float64)
    Q = torch.diag(torch.tensor([math.sqrt(7.0 if shrink == "last" else 6.0), 2.0, math.sqrt(3.0)]).double())
    found, shrunk = sketch(S, Q, shrink)
    assert shrunk == pytest.approx(delta)
    energy = (found**2).sum(0).tolist()
    assert energy == pytest.approx([3.0, 1.0] if shrink == "next" else [3.0, 0.0])


@pytest.mark.parametrize("shrink", ["next", "last"])
def test_sketches_bound_what_they_lose_and_merge(shrink):
    def stream(seed: int) -> tuple[Tensor, Tensor, float]:
        S, C, lost = torch.zeros(12, 5).double(), torch.zeros(12, 12).double(), 0.0
        for t in range(8):
            Q = drawn(12, 7, seed=seed + t).double() * torch.linspace(2, 0.1, 12)[:, None].double()
            C += Q @ Q.T
            S, delta = sketch(S, Q, shrink)
            lost += delta
        return S, C, lost

    (S, C, lost), (S2, C2, lost2) = stream(0), stream(100)
    gap = torch.linalg.eigvalsh(C - S @ S.T)
    assert gap[0] > -1e-10 and lost > 1 and gap[-1] <= lost * (1 + 1e-12)
    merged = merge_sketches([S, S2], shrink)
    delta = sketch(S, S2, shrink)[1]
    gap = torch.linalg.eigvalsh(C + C2 - merged @ merged.T)
    assert merged.shape == (12, 5) and gap[0] > -1e-10 and gap[-1] <= (lost + lost2 + delta) * (1 + 1e-12)
    assert torch.allclose(merge_sketches([S], shrink) @ merge_sketches([S], shrink).T, S @ S.T) or shrink == "last"


def test_the_sketch_of_a_task_is_fed_as_often_as_asked():
    def energy(**options: object) -> float:
        body = coso(r1=2, r2=4, **options)
        for _ in range(6):
            step(body, torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])))
        return float((body.memory["statistics"]["0/S"] ** 2).sum())

    assert energy() == pytest.approx(6)
    assert energy(refresh=3) == pytest.approx(2)
    assert energy(refresh=3, sketch_every=1) == pytest.approx(6)
    assert energy(refresh=1, sketch_every=2) == pytest.approx(3)
    assert energy(refresh=3, decay=0.5) == pytest.approx(1 + 0.25)


def test_owners_statistics_add_up_to_those_of_all_gradients():
    one, two, both = (coso(r1=2, r2=4, eps_th=0.9) for _ in range(3))
    for t in range(2):
        step(one, drawn(4, 1, seed=t) @ drawn(1, 4, seed=20 + t))
        step(two, drawn(4, 1, seed=40 + t) @ drawn(1, 4, seed=60 + t))
    total = {key: value + two.statistics(two.records())[key] for key, value in one.statistics(one.records()).items()}
    G = [drawn(4, 1, seed=a + t) @ drawn(1, 4, seed=a + 20 + t) for a in (0, 40) for t in range(2)]
    C = sum(g.double() @ g.double().T for g in G)
    assert torch.allclose(total["0/C"], C, atol=1e-5)
    both.end_task(total)
    expected = torch.linalg.eigh(C).eigenvectors.flip(1)
    M = both.memory["bases"]["0/M"].double()
    k = M.shape[1]
    assert 1 <= k < 4 and torch.allclose(M @ M.T, expected[:, :k] @ expected[:, :k].T, atol=1e-5)


def test_changes_of_the_weights_are_kept_whole_or_truncated():
    dense, low = coso(deltas="dense", r1=4, r2=2), coso(deltas="svd", delta_rank=2, r1=4, r2=2)
    for body in (dense, low):
        for task in range(2):
            step(body, drawn(4, 4, seed=task))
            body.end_task(body.statistics(body.records()))
            body.feed(task + 1, body.current(), [0, 1])
            body.start()
    kept = dense.memory["adapters"]
    assert torch.allclose(kept["delta/0/0/W"] + kept["delta/1/0/W"], dense.parameters["0/W"], atol=1e-7)
    kept, numbers = low.memory["adapters"], low.memory["numbers"]
    for task in range(2):
        exact = dense.memory["adapters"][f"delta/{task}/0/W"]
        short = kept[f"delta/{task}/0/B"] @ kept[f"delta/{task}/0/A"]
        assert torch.linalg.matrix_rank(short, rtol=1e-5) == 2
        assert float((exact - short).norm() / exact.norm()) == pytest.approx(
            numbers[f"delta/{task}/0/residual"], abs=1e-5
        )
    stored = low.stored()
    assert stored["adapters"] == 4 * (16 + 2 * 16) and stored["statistics"] == 0


def test_projection_is_exact_where_little_is_left():
    M = basis(30, 29)
    G = M @ drawn(29, 5) * 1e3 + drawn(30, 5) * 1e-2
    left = project_out(G, M)
    assert left.norm() > 0 and (M.double().T @ left.double()).norm() / left.double().norm() < 1e-6
    assert not project_out(drawn(30, 5), basis(30, 30)).any()
    assert torch.equal(extend_within(M, torch.zeros(30, 0)), M)
    for sign in (1, -1):
        longer = extend_within(sign * basis(5, 2), drawn(5, 1))
        assert longer.shape == (5, 3) and torch.allclose(longer[:, :2], sign * basis(5, 2), atol=1e-6)
