"""CoSO against its equations: what is protected, what the sketch promises, and when it is Adam."""

from __future__ import annotations

import logging
from itertools import pairwise

import continual_parts as parts
import pytest
import torch
from torch import Tensor

from fedpeft.continual.bodies.coso import leading, project, sketch

FIRST, SECOND = "blocks.0.fc2", "blocks.1.fc2"  # [12, 16]
OUT, IN = parts.WIDTH, parts.HIDDEN
SIDES = {"out": OUT, "in": IN}


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double())[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def within(M: Tensor, W: Tensor, side: str) -> Tensor:
    """The part of a change of weights that lies in the protected space."""
    return M.T @ W if side == "out" else W @ M


def low_rank_gradient(rank: int, seed: int) -> Tensor:
    return noise(OUT, rank, seed=seed) @ noise(rank, IN, seed=seed + 1000)


# The functions -------------------------------------------------------------------------------------------------------


def test_a_projection_removes_the_basis_and_nothing_else():
    M, G = orthonormal(12, 5), noise(12, 16)
    assert (M.T @ project(G, M)).abs().max() < 1e-14
    inside = M @ noise(5, 16)
    assert torch.allclose(project(G + inside, M), project(G, M), atol=1e-13)
    outside = project(noise(12, 16, seed=5), M)
    assert torch.allclose(project(outside, M), outside, atol=1e-13)
    assert torch.equal(project(G, M[:, :0]), G)


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
    found = leading(U * torch.tensor([3.0, 2, 1]).double(), eps)
    assert found.shape == (12, count)
    assert torch.allclose((found * U[:, :count]).sum(0).abs(), torch.ones(count).double(), atol=1e-9)


def test_nothing_leads_where_nothing_was_seen():
    assert leading(torch.zeros(12, 4).double(), 0.98).shape == (12, 0)


# The body: what is protected -----------------------------------------------------------------------------------------


def protected(side: str, **more: object) -> tuple[object, list[tuple[str, Tensor, Tensor]], list[dict[str, Tensor]]]:
    """A run that notes for every task and layer the basis at its start and the change of weights in it."""
    starts, moved, bases = {}, [], []

    def begun(body):
        bases.append({name: value.clone() for name, value in body.memory["bases"].items()})
        starts.update({key: value.detach().clone() for key, value in body.parameters.items()})

    def trained(body):
        for layer in body.model.layers:
            change = body.parameters[f"{layer}/W"].detach() - starts[f"{layer}/W"]
            moved.append((layer, bases[-1].get(f"{layer}/M", torch.zeros(SIDES[side], 0)), change))

    made = parts.learner("coso", options={"side": side, "r1": 4, "r2": 3, "refresh": 2, "eps_th": 0.9, **more}, tasks=4)
    parts.watch(made, begun, trained=trained).run()
    return made, moved, bases


@pytest.mark.parametrize("svd", ["full", "gram", "randomized"])
@pytest.mark.parametrize("side", SIDES)
def test_training_never_moves_the_protected_space(side, svd, float64):
    _, moved, _ = protected(side, svd=svd)
    checked = 0
    for _, M, change in moved:
        assert M.shape[0] == SIDES[side]
        if 0 < M.shape[1] < SIDES[side]:
            assert within(M, change, side).norm() <= 1e-10 * change.norm()
            assert change.norm() > 1e-4
            checked += 1
    assert checked == 6  # two layers, three tasks with a past


@pytest.mark.parametrize("side", SIDES)
def test_training_in_float32_moves_the_protected_space_by_rounding_only(side):
    for _, M, change in protected(side)[1]:
        if 0 < M.shape[1] < SIDES[side]:
            assert within(M, change, side).norm() <= 1e-4 * change.norm()


def test_without_projection_the_space_would_move(float64):
    """The same measure on plain fine-tuning is far from zero, so the tests above can fail."""
    M, made = orthonormal(OUT, 4), parts.run("sequential", tasks=2)
    change = made.body.parameters[f"{FIRST}/W"].detach()
    assert within(M, change, "out").norm() > 0.1 * change.norm()


@pytest.mark.parametrize("side", SIDES)
def test_bases_are_orthonormal_and_only_grow(side):
    _, _, bases = protected(side)
    sizes: dict[str, list[int]] = {layer: [] for layer in (FIRST, SECOND)}
    for known in bases:
        for layer in sizes:
            M = known.get(f"{layer}/M", torch.zeros(SIDES[side], 0))
            sizes[layer].append(M.shape[1])
            if M.shape[1]:
                assert (M.T @ M - torch.eye(M.shape[1])).abs().max() <= 1e-5
    for found in sizes.values():
        assert found[0] == 0 and all(one < two <= SIDES[side] for one, two in pairwise(found)), found


def test_an_older_basis_stays_in_the_newer_one():
    _, _, bases = protected("out")
    for old, new in pairwise(bases[1:]):
        for key, M in old.items():
            assert (M - new[key] @ (new[key].T @ M)).norm() <= 1e-4 * M.norm()


def test_the_input_side_keeps_responses_to_old_inputs_and_the_output_side_does_not(float64):
    """Inputs of task 0 span the rows of its gradients; with all of them protected W x stays for each such x."""
    answers = {}
    for side in SIDES:
        body = parts.begun("coso", {"side": side, "r1": 4, "r2": 8, "refresh": 1, "eps_th": 1.0})
        inputs = noise(3, IN)
        for step in range(6):
            parts.drive(body, {f"{layer}/W": noise(OUT, 3, seed=step) @ inputs for layer in (FIRST, SECOND)}, step)
        parts.end(body)
        before = body.parameters[f"{FIRST}/W"].detach() @ inputs.T
        parts.begin(body, 1, parts.stream())
        for step in range(6):
            parts.drive(body, {f"{FIRST}/W": noise(OUT, IN, seed=50 + step)}, step)
        after = body.parameters[f"{FIRST}/W"].detach() @ inputs.T
        answers[side] = float((after - before).norm() / before.norm())
    assert answers["in"] < 1e-10
    assert answers["out"] > 1e-3


def test_averaging_clients_keeps_the_protected_space(float64):
    M = orthonormal(OUT, 4)
    moved = []
    for client in range(2):
        body = parts.begun("coso", {"side": "out", "r1": 4, "r2": 4}, seed=client)
        body.memory["bases"][f"{FIRST}/M"] = M
        for step in range(5):
            parts.drive(body, {f"{FIRST}/W": noise(OUT, IN, seed=10 * client + step)}, step)
        moved.append(body.parameters[f"{FIRST}/W"].detach())
    mean = 0.3 * moved[0] + 0.7 * moved[1]
    assert mean.norm() > 1e-3 and (M.T @ mean).norm() <= 1e-10 * mean.norm()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_side_is_that_of_the_map_however_the_layer_stores_it(kind):
    """GPT-2's Conv1D holds [in, out]; the same net so stored trains to the same dW [out, in]."""
    from transformers.pytorch_utils import Conv1D

    given = parts.base()
    if kind == "conv1d":
        for block in given.backbone.blocks:
            turned = Conv1D(OUT, IN)
            turned.weight.data, turned.bias.data = block.fc2.weight.data.T.contiguous(), block.fc2.bias.data
            block.fc2 = turned.requires_grad_(False)
    plain = parts.run("coso", options={"side": "in", "r1": 4, "r2": 3})
    made = parts.learner("coso", options={"side": "in", "r1": 4, "r2": 3})
    made.body.model = made.model = parts.Plastic(given, parts.LAYERS)
    made.run()
    for layer in (FIRST, SECOND):
        assert made.body.memory["bases"][f"{layer}/M"].shape[0] == IN
        assert torch.allclose(made.body.parameters[f"{layer}/W"], plain.body.parameters[f"{layer}/W"], atol=1e-4)


# The two traps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("svd", ["full", "gram", "randomized"])
@pytest.mark.parametrize("side", SIDES)
def test_directions_of_no_gradient_do_not_leak_into_the_protected_space(side, svd, refresh, rotate, float64):
    """A full-rank gradient fills the moments; then gradients of rank one, and none, leave most of P arbitrary."""
    body = parts.begun("coso", {"side": side, "r1": 8, "r2": 4, "svd": svd, "refresh": refresh,
                                "rotate_moments": rotate})
    M = orthonormal(SIDES[side], 6)
    body.memory["bases"][f"{FIRST}/M"] = M
    gradients = [noise(OUT, IN), *(low_rank_gradient(1, seed) for seed in range(1, 6)), torch.zeros(OUT, IN)]
    for step, G in enumerate(gradients):
        before = body.parameters[f"{FIRST}/W"].detach().clone()
        parts.drive(body, {f"{FIRST}/W": G}, step)
        W = body.parameters[f"{FIRST}/W"].detach()
        assert W.isfinite().all()
        assert within(M, W - before, side).norm() <= 1e-10 * W.norm(), step
    assert W.norm() > 1e-3


def test_a_gradient_inside_the_protected_space_moves_nothing(float64):
    body = parts.begun("coso", {"side": "out", "r1": 4, "r2": 4, "refresh": 1})
    M = orthonormal(OUT, 4)
    body.memory["bases"][f"{FIRST}/M"] = M
    for step in range(4):
        parts.drive(body, {f"{FIRST}/W": M @ noise(4, IN, seed=step)}, step)
    W = body.parameters[f"{FIRST}/W"].detach()
    assert W.isfinite().all() and (M.T @ W).norm() <= 1e-10


def test_a_saturated_layer_stands_still_and_is_reported(caplog):
    """Six new directions a task fill twelve after two; then nothing moves, nothing is NaN, and the log says so.

    Eleven of twelve is all there is: layer norms follow every layer, so no gradient has a constant part over outputs.
    """
    made = parts.learner("coso", options={"side": "out", "r1": 6, "r2": 6, "eps_th": 1.0, "refresh": 1}, tasks=5)
    shares, moved, starts = [], [], {}

    def begun(body):
        shares.append(body.saturation())
        starts.update({key: value.detach().clone() for key, value in body.parameters.items()})

    def trained(body):
        changes = {key: value.detach() - starts[key] for key, value in body.parameters.items()}
        moved.append({key: float((change - change.mean(0)).norm()) for key, change in changes.items()})

    with caplog.at_level(logging.WARNING, "fedpeft"):
        parts.watch(made, begun, trained=trained).run()
    assert set(shares[0]) == {FIRST, SECOND}
    assert all(value == 0 for value in shares[0].values())
    assert all(11 / 12 - 1e-9 <= value <= 1 for value in shares[-1].values())
    assert all(value <= 1 for found in shares for value in found.values())
    assert all(value <= 1e-5 for value in moved[-1].values()), moved
    assert all(value > 1e-2 for value in moved[0].values())
    assert all(value.isfinite().all() for value in made.body.parameters.values())
    assert any(FIRST in record.getMessage() for record in caplog.records)


def test_a_cap_leaves_room(caplog):
    with caplog.at_level(logging.WARNING, "fedpeft"):
        made = parts.run("coso", options={"side": "out", "r1": 6, "r2": 6, "eps_th": 1.0, "refresh": 1, "cap": 0.5},
                         tasks=5)
    assert all(0 < value <= 0.5 for value in made.body.saturation().values())
    for key, M in made.body.memory["bases"].items():
        assert (M.T @ M - torch.eye(M.shape[1])).abs().max() <= 1e-5, key


# The steps -----------------------------------------------------------------------------------------------------------


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
    expected = U @ adam([U.T @ G for G in gradients], 0.01) if side == "out" else \
        adam([G @ V.T for G in gradients], 0.01) @ V
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


def slow_coso(tasks: list[list[Tensor]], side: str, r1: int, r2: int, refresh: int, eps_th: float, shrink: str,
              decay: float, rotate: bool, lr: float) -> tuple[Tensor, Tensor]:
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
@pytest.mark.parametrize("refresh, shrink, decay, rotate", [
    (1, "next", 1.0, False), (3, "next", 1.0, False), (2, "last", 1.0, False), (2, "next", 0.8, False),
    (2, "next", 1.0, True)])
@pytest.mark.parametrize("side", SIDES)
def test_three_tasks_are_those_of_the_equations(side, refresh, shrink, decay, rotate, svd, float64):
    spectrum = torch.linspace(1.0, 0.2, IN)
    tasks = [[noise(OUT, IN, seed=10 * task + step) * spectrum for step in range(7)] for task in range(3)]
    body = parts.begun("coso", {"side": side, "r1": 4, "r2": 3, "refresh": refresh, "eps_th": 0.85, "shrink": shrink,
                                "decay": decay, "rotate_moments": rotate, "svd": svd}, lr=0.01)
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
        parts.drive(body, {f"{layer}/W": torch.outer(axes[:, step], noise(IN, seed=step)) for layer in (FIRST, SECOND)},
                    step)
    S = body.memory["statistics"][f"{FIRST}/S"]
    assert S.shape == (OUT, 8)
    assert int((torch.linalg.svdvals(S) > 1e-6).sum()) == expected
