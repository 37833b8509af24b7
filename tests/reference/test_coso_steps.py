"""CoSO's steps: Adam where it should be, the paper's equations elsewhere, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import continual_parts as parts
from support.continual_parts import HIDDEN as IN
from support.continual_parts import WIDTH as OUT
from support.continual_parts import noise, orthonormal

FIRST, SECOND = "blocks.0.fc2", "blocks.1.fc2"  # [12, 16]
SIDES = {"out": OUT, "in": IN}


def adam(gradients: list[Tensor], lr: float, eps: float = 1e-6) -> Tensor:
    """The sum of Adam's steps."""
    value, m, v = torch.zeros_like(gradients[0]), 0.0, 0.0
    for t, G in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
        value = value - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    return value


@pytest.mark.parametrize("side", SIDES)
def test_the_first_task_with_full_rank_and_one_basis_is_adam_in_that_basis(side, float64):
    gradients = [noise(OUT, IN, seed=number) for number in range(8)]
    rank = min(OUT, IN)
    body = parts.begun("coso", {"side": side, "r1": rank, "r2": 4, "refresh": 1000}, lr=0.01)
    for step, G in enumerate(gradients):
        parts.drive(body, {f"{FIRST}/W": G}, step)
    U, _, V = torch.linalg.svd(gradients[0], full_matrices=False)
    expected = (
        U @ adam([U.T @ G for G in gradients], 0.01) if side == "out" else adam([G @ V.T for G in gradients], 0.01) @ V
    )
    assert torch.allclose(body.parameters[f"{FIRST}/W"], expected, atol=1e-8)


def test_with_the_identity_as_basis_it_is_adam_exactly(float64):
    """A first gradient with descending diagonal has the axes as singular vectors."""
    first = torch.zeros(OUT, IN)
    first[range(OUT), range(OUT)] = torch.arange(2 * OUT, OUT, -1.0)
    gradients = [first, *(noise(OUT, IN, seed=number) for number in range(1, 8))]
    body = parts.begun("coso", {"side": "out", "r1": OUT, "r2": 4, "refresh": 1000}, lr=0.01)
    for step, G in enumerate(gradients):
        parts.drive(body, {f"{FIRST}/W": G}, step)
    value = torch.zeros(OUT, IN, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.01, eps=1e-6)
    for G in gradients:
        value.grad = G
        optimizer.step()
    assert torch.allclose(body.parameters[f"{FIRST}/W"], value, atol=1e-9)


def signed(U: Tensor) -> Tensor:
    """The largest entry of each column positive: moments are kept over a refresh, so that signs matter."""
    return U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()


def slow_coso(
    tasks: list[list[Tensor]],
    side: str,
    r1: int,
    r2: int,
    refresh: int,
    eps_th: float,
    shrink: str,
    decay: float,
    rotate: bool,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """W and M after tasks of given gradients, as equations 1 to 7 read; all singular values by full decomposition."""
    tasks = [[G if side == "out" else G.T for G in task] for task in tasks]
    m, n = tasks[0][0].shape
    W, M = torch.zeros(m, n), torch.zeros(m, 0)
    for task in tasks:
        S, P, m1, m2 = torch.zeros(m, r2), torch.zeros(m, r1), torch.zeros(r1, n), torch.zeros(r1, n)
        for t, G in enumerate(task):
            G = G - M @ (M.T @ G)
            if t % refresh == 0:
                U, s, _ = torch.linalg.svd(G, full_matrices=False)
                new = signed(U[:, :r1]) * (s[:r1] > 1e-6 * s[0])
                if rotate:
                    m1, m2 = new.T @ P @ m1, (new.T @ P) ** 2 @ m2
                P = new
                left, values, _ = torch.linalg.svd(torch.cat([S * decay, U[:, :r2] * s[:r2]], 1), full_matrices=False)
                cut = values[r2 if shrink == "next" else r2 - 1] ** 2
                S = left[:, :r2] * (values[:r2] ** 2 - cut).clamp(min=0).sqrt()
            R = P.T @ G
            m1, m2 = 0.9 * m1 + 0.1 * R, 0.999 * m2 + 0.001 * R * R
            N = (m1 / (1 - 0.9 ** (t + 1))) / ((m2 / (1 - 0.999 ** (t + 1))).sqrt() + 1e-6)
            W = W - lr * P @ N
        U, s, _ = torch.linalg.svd(S, full_matrices=False)
        k = max(1, int(((s**2).cumsum(0) / (s**2).sum() <= eps_th).sum()))
        M = torch.linalg.qr(torch.cat([M, U[:, :k]], 1))[0]
    return (W if side == "out" else W.T), M


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize(
    "refresh, shrink, decay, rotate",
    [
        (1, "next", 1.0, False),
        (3, "next", 1.0, False),
        (2, "last", 1.0, False),
        (2, "next", 0.8, False),
        (2, "next", 1.0, True),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_three_tasks_are_those_of_the_equations(side, refresh, shrink, decay, rotate, svd, float64):
    spectrum = torch.linspace(1.0, 0.2, IN)
    tasks = [[noise(OUT, IN, seed=10 * task + step) * spectrum for step in range(7)] for task in range(3)]
    body = parts.begun(
        "coso",
        {
            "side": side,
            "r1": 4,
            "r2": 3,
            "refresh": refresh,
            "eps_th": 0.85,
            "shrink": shrink,
            "decay": decay,
            "rotate_moments": rotate,
            "svd": svd,
        },
        lr=0.01,
    )
    for task, gradients in enumerate(tasks):
        if task:
            parts.end(body)
            parts.begin(body, task, parts.stream())
        for step, G in enumerate(gradients):
            parts.drive(body, {f"{FIRST}/W": G, f"{SECOND}/W": G}, step)
    parts.end(body)
    parts.begin(body, 2, parts.stream())  # the basis of the last task is made at the latest here
    W, M = slow_coso(tasks, side, 4, 3, refresh, 0.85, shrink, decay, rotate, 0.01)
    assert torch.allclose(body.parameters[f"{FIRST}/W"], W, atol=1e-7)
    found = body.memory["bases"][f"{FIRST}/M"]
    assert found.shape == M.shape
    assert torch.allclose(found @ found.T, M @ M.T, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_moments_are_small_and_zero_when_a_task_begins(side):
    later = []
    r1, other = 4, IN if side == "out" else OUT

    def begun(body):
        kept = body.memory["adapters"]
        keys = [f"{layer}/{role}" for layer in body.model.layers for role in "mv"]
        assert not any(bool(kept[key].any()) for key in keys if key in kept)

    def stepped(body, step):
        for layer in body.model.layers:
            shapes = {tuple(sorted(body.memory["adapters"][f"{layer}/{role}"].shape)) for role in ("m", "v")}
            assert shapes == {tuple(sorted((r1, other)))}
            later.append(bool(body.memory["adapters"][f"{layer}/m"].any()))

    made = parts.learner("coso", options={"side": side, "r1": r1, "r2": 3})
    parts.watch(made, begun, stepped).run()
    assert all(later[:4]) and any(later)
    if side == "out":
        assert made.body.memory["adapters"][f"{FIRST}/m"].shape == (r1, IN)


def test_what_is_kept_is_far_less_than_a_full_basis_of_gradients():
    """Between tasks: one basis a layer; sketch, projector and moments belong to the task."""
    made = parts.run("coso", options={"side": "out", "r1": 4, "r2": 3})
    stored = made.body.stored()
    assert stored["bases"] == sum(4 * OUT * M.shape[1] for M in made.body.memory["bases"].values())
    assert stored["raw"] == 0
    for M in made.body.memory["bases"].values():
        assert M.shape[1] <= 3 * 3


def test_the_projection_can_be_told_from_plain_training():
    """CoSO without a past is a low-rank Adam; with one, the same gradient moves less."""
    moved = {}
    for columns in (0, 8):
        body = parts.begun("coso", {"side": "out", "r1": 4, "r2": 4})
        if columns:
            body.memory["bases"][f"{FIRST}/M"] = orthonormal(OUT, columns).float()
        parts.drive(body, {f"{FIRST}/W": noise(OUT, IN).float()})
        moved[columns] = body.parameters[f"{FIRST}/W"].detach().clone()
    assert torch.linalg.matrix_rank(moved[0], tol=1e-5) == 4
    assert not torch.allclose(moved[0], moved[8], atol=1e-3)


@pytest.mark.parametrize("every, expected", [(1, 6), (3, 2)])
def test_which_steps_feed_the_sketch(every, expected, float64):
    """Orthogonal rank-one gradients leave as many directions in a large sketch as steps fed it."""
    axes = orthonormal(OUT, 6)
    body = parts.begun("coso", {"side": "out", "r1": 4, "r2": 8, "refresh": 1, "sketch_every": every, "eps_th": 1.0})
    for step in range(6):
        parts.drive(
            body, {f"{layer}/W": torch.outer(axes[:, step], noise(IN, seed=step)) for layer in (FIRST, SECOND)}, step
        )
    S = body.memory["statistics"][f"{FIRST}/S"]
    assert S.shape == (OUT, 8)
    assert int((torch.linalg.svdvals(S) > 1e-6).sum()) == expected
