"""Bodies that train full weights, LoRAs or norms in place: their equations against hand-sized numbers.

The base is one linear layer (identity) that the classifier reads, so that every gradient can be written down.
"""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft import config as configs
from fedpeft.continual import forms
from fedpeft.continual import stream as streams
from fedpeft.continual.body import Body, Classifier, TrainConfig, leaf
from fedpeft.continual.learner import Learner
from fedpeft.continual.model import Plastic
from fedpeft.continual.subspace import extend, leading, left_singular, merge_sketches, project, root, sketch
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.models import Base

WIDTH, CLASSES = 4, 6
BODIES = {
    "coso": [{"r1": 2, "r2": 2}, {"side": "in", "r1": 3, "r2": 2, "refresh": 2, "svd": "randomized", "deltas": "svd",
                                  "delta_rank": 1, "rotate_moments": True}],
    "ewc": [{"lam": 3.0}, {"form": "lora", "labels": "model", "decay": 0.5}],
    "lwf": [{}, {"form": "film"}],
    "er": [{"capacity": 7, "replay": 3}, {"form": "lora", "r": 2}],
    "joint": [{}],
    "classp": [{}, {"power": 2.0}],
    "fsa": [{}, {"form": "lora"}, {"form": "film"}],
}
CASES = [(body, number) for body, options in BODIES.items() for number in range(len(options))]


def plastic(width: int = WIDTH, classes: int = CLASSES) -> Plastic:
    """x [N, width] through an identity layer, a norm that does nothing yet, and the head."""
    layer, norm, head = nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.Linear(width, classes)
    layer.weight.data = torch.eye(width)
    net = nn.Sequential(layer, norm, head).requires_grad_(False)
    return Plastic(Base(net, lambda batch: net(batch["x"]), {"2": head}, None, "", "image-classification"), ["0"])


def bare(width: int = 2, classes: int = 2) -> Plastic:
    """Features are (I + dW) x."""
    layer, head = nn.Linear(width, width, bias=False), nn.Linear(width, classes)
    layer.weight.data = torch.eye(width)
    net = nn.Sequential(layer, head).requires_grad_(False)
    return Plastic(Base(net, lambda batch: net(batch["x"]), {"1": head}, None, "", "image-classification"), ["0"])


def records(labels: list[int], width: int = WIDTH, seed: int = 0) -> Encoded:
    drawn = torch.Generator().manual_seed(seed)
    found = torch.tensor(labels)
    centre = torch.randn(CLASSES, width, generator=drawn)
    return Encoded({"x": centre[found] + 0.3 * torch.randn(len(labels), width, generator=drawn)}, found)


def three_tasks() -> streams.Stream:
    train, test = records([0, 1, 2, 3, 4, 5] * 5), records([0, 1, 2, 3, 4, 5] * 3, seed=0)
    groups = [[0, 1], [2, 3], [4, 5]]
    return streams.build(streams.plan("three", "class", train.labels.numpy(), test.labels.numpy(), groups, 0), train,
                         test)


def made(name: str, model: Plastic, data: Encoded, classes: tuple[int, ...] = (0, 1), lr: float = 0.1,
         **options: object) -> Body:
    """A body at the beginning of its first task."""
    body: Body = configs.method("bodies", name, dict(options), "body", model=model, seed=0,
                                train=TrainConfig(epochs=1, batch_size=4, lr=lr))
    body.classifier = Classifier(model.head.out_features, model.width, 0, 1e-3)
    body.feed(0, streams.Task("task-0", classes, data, data), list(classes))
    body.start()
    return body


def learner(name: str, options: dict[str, object], seed: int = 0) -> Learner:
    train = TrainConfig(epochs=2, batch_size=4, lr=0.01)
    return Learner(three_tasks(), plastic(), name, {"linear": {}}, train, seed, options)


def flat(value: object) -> list[object]:
    """All leaves of nested plain data, with their keys."""
    if isinstance(value, dict):
        return [item for key in value for item in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [item for one in value for item in flat(one)]
    return [value.tolist() if isinstance(value, Tensor) else value]


# Every body -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_run_that_goes_on_from_a_file_equals_one_that_was_never_stopped(name, number, tmp_path):
    whole, saved = learner(name, BODIES[name][number]), []
    whole.save = lambda path: saved.append(copy.deepcopy(whole.state()))
    whole.run(tmp_path / "none", every=1)
    places = [(state["task"], state["step"]) for state in saved]
    expected = whole.state()
    expected.pop("ledger")  # seconds
    for place in ((0, 2), (0, 6), (1, 0), (1, 3)):  # in mid-task, before and after a task's end
        torch.save(saved[places.index(place)], tmp_path / "state")
        rest = learner(name, BODIES[name][number])
        rest.resume(tmp_path / "state")
        found = rest.run().state()
        found.pop("ledger")
        assert flat(found) == flat(expected), place


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_base_stays_runs_repeat_and_rows_do_not_depend_on_each_other(name, number):
    run = learner(name, BODIES[name][number])
    before = {key: value.clone() for key, value in run.model.base.backbone.state_dict().items()}
    start = run.run(stop=1).body.parameters
    start = {key: value.detach().clone() for key, value in start.items()}
    run.run()
    assert any(not torch.equal(value, start[key]) for key, value in run.body.parameters.items())
    assert all(torch.equal(value, before[key]) for key, value in run.model.base.backbone.state_dict().items())
    again = learner(name, BODIES[name][number]).run()
    assert run.right == again.right
    assert all(torch.equal(value, again.body.parameters[key]) for key, value in run.body.parameters.items())
    inputs = records([0, 1, 2, 3, 4, 5]).inputs
    together = run.scores("linear", inputs)
    alone = torch.cat([run.scores("linear", {"x": inputs["x"][row : row + 1]}) for row in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


# CoSO -----------------------------------------------------------------------------------------------------------------


def coso(side: str = "out", m: int = 4, n: int = 4, **options: object) -> Body:
    net = nn.Sequential(nn.Linear(n, m, bias=False), nn.Linear(m, 2)).requires_grad_(False)
    model = Plastic(Base(net, lambda batch: net(batch["x"]), {"1": net[1]}, None, "", "image-classification"), ["0"])
    return made("coso", model, records([0, 1], n), side=side, **options)


def step(body: Body, G: Tensor) -> None:
    body.parameters["0/W"].grad = G.clone()
    body.step()


def basis(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).Q


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    left = torch.linalg.qr(project(drawn(64, 8), M)).Q
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
    assert {share: leading(S, share).shape[1] for share in shares} == shares
    assert leading(torch.zeros(3, 2), 0.9).shape == (3, 0)
    assert torch.equal(leading(S, 0.9).abs(), torch.eye(3, dtype=torch.float64)[:, :2])
    assert torch.allclose(root(S @ S.T, 2).abs(), S[:, :2])


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
        assert float((exact - short).norm() / exact.norm()) == pytest.approx(numbers[f"delta/{task}/0/residual"],
                                                                             abs=1e-5)
    stored = low.stored()
    assert stored["adapters"] == 4 * (16 + 2 * 16) and stored["statistics"] == 0


def test_projection_is_exact_where_little_is_left():
    M = basis(30, 29)
    G = M @ drawn(29, 5) * 1e3 + drawn(30, 5) * 1e-2
    left = project(G, M)
    assert left.norm() > 0 and (M.double().T @ left.double()).norm() / left.double().norm() < 1e-6
    assert not project(drawn(30, 5), basis(30, 30)).any()
    assert torch.equal(extend(M, torch.zeros(30, 0)), M)
    for sign in (1, -1):
        longer = extend(sign * basis(5, 2), drawn(5, 1))
        assert longer.shape == (5, 3) and torch.allclose(longer[:, :2], sign * basis(5, 2), atol=1e-6)


# EWC and LwF ----------------------------------------------------------------------------------------------------------


def test_ewc_importance_and_pull():
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    body = made("ewc", bare(), Encoded({"x": x}, labels), lam=4.0, decay=0.5)
    V = torch.tensor([[1.0, 0.0], [0.5, -1.0]])
    body.classifier.weight.data, body.classifier.bias.data = V, torch.tensor([0.1, 0.0])
    W = torch.tensor([[0.2, 0.0], [0.1, -0.3]])
    body.parameters["0/W"].data = W.clone()
    assert body.penalty({"x": x}, labels, x, body.classifier) is None
    squares = torch.zeros(2, 2)
    for row, label in zip(x, labels, strict=True):  # dL/dW = V^T (p - y) x^T
        p = (V @ ((torch.eye(2) + W) @ row) + torch.tensor([0.1, 0.0])).softmax(0)
        squares += torch.outer(V.T @ (p - torch.eye(2)[label]), row) ** 2
    found = body.statistics(body.records())
    assert torch.allclose(found["0/W/F"].float(), squares, rtol=1e-4)
    body.end_task(found)
    F = body.memory["statistics"]["0/W/F"]
    assert torch.allclose(F, squares / squares.mean(), rtol=1e-4) and float(F.mean()) == pytest.approx(1)
    moved = torch.tensor([[0.5, 0.0], [0.0, -0.1]])
    body.parameters["0/W"].data = W + moved
    penalty = body.penalty({"x": x}, labels, x, body.classifier)
    assert penalty.item() == pytest.approx(float(2.0 * (squares / squares.mean() * moved**2).sum()), rel=1e-4)
    body.end_task({"0/W/F": torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)})
    assert torch.allclose(body.memory["statistics"]["0/W/F"], F / 2 + torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(body.memory["adapters"]["0/W/anchor"], W + moved)


def test_ewc_of_no_gradient_pulls_nowhere():
    body = made("ewc", bare(), records([0, 0], 2), classes=(0,))  # one class: every prediction is certain
    body.end_task(body.statistics(body.records()))
    assert not body.memory["statistics"]["0/W/F"].any()


def test_ewc_holds_where_it_pulls_hard():
    free, held = (learner("ewc", {"lam": lam}).run() for lam in (0.0, 1e5))
    first = learner("ewc", {"lam": 0.0}).run(stop=6).body.parameters["0/W"]
    plain = learner("sequential", {}).run().body.parameters["0/W"]
    assert torch.equal(free.body.parameters["0/W"], plain)
    important = held.body.memory["statistics"]["0/W/F"] > 1
    far, near = ((run.body.parameters["0/W"] - first)[important].norm() for run in (free, held))
    assert near < far / 2


def test_lwf_keeps_old_scores_and_nothing_else():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    data = Encoded({"x": x}, torch.tensor([0, 1]))
    body = made("lwf", bare(classes=3), data, lam=2.0, temperature=2.0)
    body.classifier.weight.data = torch.tensor([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    body.classifier.bias.data.zero_()
    assert body.penalty(data.inputs, data.labels, x, body.classifier) is None
    body.end_task({})
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(0, abs=1e-6)
    body.feed(1, streams.Task("task-1", (2,), data, data), [0, 1, 2])
    body.start()
    body.classifier.weight.data[:2] = 0  # new scores are even, the old were (2, 0) and (0, 2): softmax of (1, 0)
    p = 1 / (1 + math.exp(-1))
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    new = x.clone().requires_grad_(True)
    penalty = body.penalty(data.inputs, data.labels, new, body.classifier)
    assert penalty.item() == pytest.approx(2.0 * 4.0 * kl, rel=1e-5)
    body.classifier.weight.data[2] = -7  # a new class has no part in it
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(penalty.item())
    body.parameters["0/W"].data[0, 0] += 5  # nor has the present body in the old scores
    assert body.penalty(data.inputs, data.labels, x, body.classifier).item() == pytest.approx(penalty.item())
    gradient = torch.autograd.grad(body.penalty(data.inputs, data.labels, x, body.classifier), body.classifier.weight)
    assert gradient[0][:2].abs().sum() > 0 and not gradient[0][2].any()


# Replay ---------------------------------------------------------------------------------------------------------------


def test_the_reservoir_holds_every_record_with_the_same_probability():
    def held(seed: int) -> list[int]:
        body: Body = configs.method("bodies", "er", {"capacity": 5}, "body", model=bare(), seed=seed,
                                    train=TrainConfig())
        for index, rows in enumerate((range(0, 3), range(3, 12), range(12, 20))):
            data = Encoded({"x": torch.zeros(len(rows), 2)}, torch.tensor(list(rows)))
            body.feed(index, streams.Task("", (0,), data, data), [0])
            body.end_task({})
            assert len(body.memory["raw"]["labels"]) == min(5, rows.stop)
        return body.memory["raw"]["labels"].tolist()

    runs = [held(seed) for seed in range(400)]
    assert all(len(set(labels)) == 5 for labels in runs)
    late = np.mean([label >= 12 for labels in runs for label in labels])
    assert late == pytest.approx(8 / 20, abs=0.04)
    share = np.bincount(np.concatenate(runs), minlength=20) / 400
    assert np.abs(share - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / 400)


def test_a_batch_is_the_new_records_and_then_old_ones_from_the_memory():
    data = records([0, 1] * 6)
    body = made("er", plastic(), data, capacity=6, replay=3)
    _, labels = body.batch(1)
    assert labels.tolist() == data.labels[torch.tensor(body.order(1))].tolist()
    body.end_task({})
    new = records([2, 3] * 6, seed=1)
    body.feed(1, streams.Task("task-1", (2, 3), new, new), [0, 1, 2, 3])
    body.start()
    drawn_rows = set()
    for number in range(3):
        inputs, labels = body.batch(number)
        assert torch.equal(inputs["x"][:4], new.inputs["x"][torch.tensor(body.order(number))])
        assert len(labels) == 7 and set(labels[4:].tolist()) <= {0, 1}
        kept = [tuple(row) for row in body.memory["raw"]["inputs"]["x"].tolist()]
        old = [tuple(row) for row in inputs["x"][4:].tolist()]
        assert len(set(old)) == 3 and set(old) <= set(kept)
        drawn_rows |= set(old)
    assert len(drawn_rows) > 3


def test_joint_trains_on_all_records_so_far_once_an_epoch():
    run = learner("joint", {})
    run.run(stop=7)
    body, tasks = run.body, run.stream.tasks
    assert body.per_epoch() == 5 and body.steps() == 10 and len(body.records()) == 20
    rows = torch.cat([body.batch(number)[0]["x"] for number in range(5)]).tolist()
    assert sorted(rows) == sorted(torch.cat([task.train.inputs["x"] for task in tasks[:2]]).tolist())
    run.run()
    assert run.ledger[-1]["stored_bytes"]["raw"] == 30 * (4 * WIDTH + 8)


def test_replay_and_joint_training_remember_more_than_going_on_does():
    def first(name: str) -> int:
        train = TrainConfig(epochs=10, batch_size=4, lr=0.02, head_lr=0.05)
        return Learner(three_tasks(), plastic(), name, {"masked": {}}, train, 0).run().right["masked"][-1][0]

    plain, replay, joint = first("sequential"), first("er"), first("joint")
    assert plain <= 1 and replay >= plain + 3 and joint >= plain + 3


# CLASSP and first-session adaptation ----------------------------------------------------------------------------------


def test_classp_by_hand_over_two_steps():
    body = made("classp", bare(), records([0, 1], 2), lr=0.5, threshold=0.25, power=1.0, eps=1.0)
    for G in ([[1.0, 0.5], [-2.0, 0.1]], [[3.0, 0.6], [0.0, 0.0]]):
        body.parameters["0/W"].grad = torch.tensor(G)
        body.step()
    a = body.memory["statistics"]["0/W/a"]
    assert torch.allclose(a, torch.tensor([[4.0, 0.6], [2.0, 0.0]]))  # .5^2 is not above .25
    W = torch.tensor([[-0.5 * (1 / 2 + 3 / 5), -0.5 * 0.6 / 1.6], [0.5 * 2 / 3, 0.0]])
    assert torch.allclose(body.parameters["0/W"], W)
    body.feed(1, body.current(), [0, 1])
    body.start()
    assert torch.equal(body.memory["statistics"]["0/W/a"], a)


def test_classp_is_adagrad_without_threshold_at_power_two():
    body = made("classp", bare(), records([0, 1], 2), lr=0.1, threshold=0.0, power=2.0, eps=1e-12)
    other = leaf(torch.zeros(2, 2))
    adagrad = torch.optim.Adagrad([other], lr=0.1)
    for t in range(5):
        body.parameters["0/W"].grad, other.grad = drawn(2, 2, seed=t), drawn(2, 2, seed=t)
        body.step()
        adagrad.step()
    assert torch.allclose(body.parameters["0/W"], other, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "lora", "film"])
def test_first_session_adaptation_learns_in_the_first_task_only(form):
    run = learner("fsa", {"form": form})
    run.run(stop=1)
    start = {key: value.detach().clone() for key, value in run.body.parameters.items()}
    run.run(stop=5)
    first = {key: value.detach().clone() for key, value in run.body.parameters.items()}
    weight = run.classifier.weight.detach().clone()
    assert any(not torch.equal(first[key], start[key]) for key in start)
    run.run()
    assert all(torch.equal(value, first[key]) for key, value in run.body.parameters.items())
    assert not torch.equal(run.classifier.weight, weight)
    roles = {"full": {"W"}, "lora": {"A", "B"}, "film": {"g", "b"}}[form]
    assert {key.rpartition("/")[2] for key in first} == roles


def test_film_is_what_training_the_norms_own_gain_and_shift_is():
    model = plastic()
    norm = model.modules["1"]
    norm.weight.data, norm.bias.data = drawn(WIDTH, seed=2), drawn(WIDTH, seed=3)
    g, b = drawn(WIDTH, seed=4), drawn(WIDTH, seed=5)
    x = {"x": drawn(7, WIDTH)}
    found = model.features(x, forms.change(model, {"1/g": g, "1/b": b}))
    norm.weight.data, norm.bias.data = (1 + g) * norm.weight, (1 + g) * norm.bias + b
    assert torch.allclose(found, model.features(x), atol=1e-5) and forms.norms(model) == {"1": WIDTH}
    y = drawn(2, 3, 4, 4)
    moved = forms.modulate(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 5.0]), True)(y, y)
    assert torch.equal(moved[:, 0], y[:, 0]) and torch.equal(moved[:, 1], 2 * y[:, 1])
    assert torch.equal(moved[:, 2], y[:, 2] + 5)


def test_film_needs_a_norm():
    with pytest.raises(InputError, match=r"body.form=film: Sequential has no normalisation layers"):
        made("fsa", bare(), records([0, 1], 2), form="film")
