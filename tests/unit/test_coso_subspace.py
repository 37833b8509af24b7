"""Projection, frequent-directions sketch and leading directions: what each promises, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedpeft.continual.parts.subspace import leading_directions, project_out, sketch
from support.continual_parts import HIDDEN as IN
from support.continual_parts import WIDTH as OUT
from support.continual_parts import low_rank_gradient, noise, orthonormal


def test_a_projection_removes_the_basis_and_nothing_else():
    M, G = orthonormal(12, 5), noise(12, 16)
    assert (M.T @ project_out(G, M)).abs().max() < 1e-14
    inside = M @ noise(5, 16)
    assert torch.allclose(project_out(G + inside, M), project_out(G, M), atol=1e-13)
    outside = project_out(noise(12, 16, seed=5), M)
    assert torch.allclose(project_out(outside, M), outside, atol=1e-13)
    assert torch.equal(project_out(G, M[:, :0]), G)


def truncated(G: Tensor, r2: int) -> tuple[Tensor, float]:
    """Q of a gradient, and the energy of the first direction that it loses."""
    U, s, _ = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r2] * s[:r2], float(s[r2] ** 2)


def stream_of_gradients(count: int = 30, m: int = 24, n: int = 20) -> list[Tensor]:
    """Gradients that share directions of slowly decaying size and differ by noise, so that truncation loses much."""
    U, V, decay = orthonormal(m, n, 1), orthonormal(n, n, 2), torch.arange(1, n + 1).double() ** -0.5
    return [U * decay @ V.T + 0.02 * noise(m, n, seed=number) for number in range(count)]


@pytest.mark.parametrize("shrink", ["next", "last"])
def test_the_sketch_loses_at_most_what_it_shrank_and_what_truncation_cut(shrink):
    """C - S S^T is positive and at most sum delta + sum sigma_{r2+1}^2; without the second sum this fails here."""
    r2, gradients = 4, stream_of_gradients()
    S, shrunk, cut = torch.zeros(24, r2).double(), 0.0, 0.0
    C = torch.zeros(24, 24).double()
    for G in gradients:
        Q, tail = truncated(G, r2)
        S, delta = sketch(S, Q, shrink)
        C, shrunk, cut = C + G @ G.T, shrunk + float(delta), cut + tail
        values = torch.linalg.eigvalsh(C - S @ S.T)
        assert S.shape == (24, r2)
        assert values.min() >= -1e-9 * values.max()
        assert values.max() <= shrunk + cut + 1e-9
    assert values.max() > shrunk, "the gradients are too easy to need the second sum"


@pytest.mark.parametrize("shrink", ["next", "last"])
def test_an_untruncated_sketch_keeps_the_bounds_of_frequent_directions(shrink):
    """|A A^T - S S^T| <= sum delta <= (|A|^2 - |A_k|^2) / (l - k) for all k < l; l = r2 + 1 where r2 survive."""
    r2, gradients = 6, [low_rank_gradient(r, 7 * r) for r in (1, 2, 3, 4, 5, 6)] * 2
    S, shrunk = torch.zeros(OUT, r2).double(), 0.0
    for G in gradients:
        for column in range(0, IN, r2):
            S, delta = sketch(S, G[:, column : column + r2], shrink)
            shrunk += float(delta)
    A = torch.cat(gradients, 1)
    assert torch.linalg.matrix_norm(A @ A.T - S @ S.T, 2) <= shrunk * (1 + 1e-9)
    energy = torch.linalg.svdvals(A) ** 2
    length = r2 + 1 if shrink == "next" else r2
    for k in range(length):
        assert shrunk <= float(energy[k:].sum()) / (length - k) * (1 + 1e-9), k
    assert shrunk > 0


@pytest.mark.parametrize("shrink, survivors", [("next", 4), ("last", 3)])
def test_how_many_directions_survive_a_shrink(shrink, survivors):
    S, delta = sketch(torch.zeros(12, 4).double(), orthonormal(12, 8) * torch.arange(8, 0, -1).double(), shrink)
    assert int((torch.linalg.svdvals(S) > 1e-9).sum()) == survivors
    assert delta == pytest.approx(16.0 if shrink == "next" else 25.0)  # 8 7 6 5 | 4 3 2 1
    kept = torch.tensor([8.0, 7, 6, 5]).double() ** 2 - float(delta)
    assert torch.allclose(torch.linalg.svdvals(S) ** 2, kept.clamp(min=0), atol=1e-9)


def test_a_sketch_below_its_size_is_exact():
    Q = noise(12, 3)
    for shrink in ("next", "last"):
        S, delta = sketch(torch.zeros(12, 4).double(), torch.cat([Q, torch.zeros(12, 1)], 1), shrink)
        assert torch.allclose(S @ S.T, Q @ Q.T, atol=1e-12) and abs(float(delta)) < 1e-12


def test_sketches_of_owners_merge_and_their_errors_add():
    """A server that sketches [S_a, S_b] knows the sum of both within the sum of the bounds."""
    r2, own, total, C = 4, [], 0.0, torch.zeros(24, 24).double()
    for owner in range(3):
        S = torch.zeros(24, r2).double()
        for G in stream_of_gradients(30)[10 * owner : 10 * owner + 10]:
            Q, tail = truncated(G, r2)
            S, delta = sketch(S, Q, "next")
            total, C = total + float(delta) + tail, C + G @ G.T
        own.append(S)
    merged = own[0]
    for S in own[1:]:
        merged, delta = sketch(merged, S, "next")
        total += float(delta)
    values = torch.linalg.eigvalsh(C - merged @ merged.T)
    assert values.min() >= -1e-9 * values.max()
    assert values.max() <= total + 1e-9


@pytest.mark.parametrize("eps, count", [(0.5, 1), (0.65, 1), (0.9, 1), (0.93, 2), (0.99, 2), (1.0, 3)])
def test_leading_directions_hold_at_most_the_share_and_are_at_least_one(eps, count):
    """Energies 9, 4, 1 of 14: shares 0.643, 0.929, 1."""
    U = orthonormal(12, 3)
    found = leading_directions(U * torch.tensor([3.0, 2, 1]).double(), eps)
    assert found.shape == (12, count)
    assert torch.allclose((found * U[:, :count]).sum(0).abs(), torch.ones(count).double(), atol=1e-9)


def test_nothing_leads_where_nothing_was_seen():
    assert leading_directions(torch.zeros(12, 4).double(), 0.98).shape == (12, 0)
