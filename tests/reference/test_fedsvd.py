"""FedSVD: the invariants of its refactorisation, and its equality with FFA-LoRA on an orthonormal basis under SGD."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpeft.state import AdaptedLayer, AdapterState, Update
from support import dense

WEIGHTS = [10.0, 30.0, 20.0]
TRANSPORTS = ["core", "dense"]


def refactored(B, start=None, **options):
    """Strategy, the state after round 1 with these B at every site, and the same state refactored."""
    strategy = dense.make("fedsvd", **options)
    server = strategy.initial(start or dense.fresh(), 0)
    tensors = {
        f"{site}/B": torch.as_tensor(B(server.adapter[f"{site}/B"].shape), dtype=server.adapter[f"{site}/B"].dtype)
        for site in server.adapter.lora_sites()
    }
    server = replace(server, adapter=server.adapter.replace(tensors), round=1)
    return strategy, server, strategy.before_round(server)


def full_rank(shape):
    return np.random.default_rng(5).standard_normal(tuple(shape))


def deficient(shape):
    """Rank 1."""
    random = np.random.default_rng(6)
    return np.outer(random.standard_normal(shape[0]), random.standard_normal(shape[1]))


# The refactorisation -------------------------------------------------------------------------------------------------


def test_worked_example():
    """B1 = [2, 0], B2 = [0, 4], equal weights, A = [3, 4]: sigma = 5 sqrt 5, A = [.6, .8], B = [5, 10]."""
    start = AdapterState(
        {"q/A": torch.tensor([[3.0, 4.0]]).double(), "q/B": torch.zeros(2, 1).double()},
        {"q": AdaptedLayer("lora", (2, 2), 1.0)},
    )
    for transport in TRANSPORTS:
        strategy = dense.make("fedsvd", transport=transport)
        server = strategy.initial(start, 0)
        updates = [
            Update("a", 1.0, start.select(("B",)).replace({"q/B": torch.tensor([[2.0], [0.0]]).double()})),
            Update("b", 1.0, start.select(("B",)).replace({"q/B": torch.tensor([[0.0], [4.0]]).double()})),
        ]
        server = replace(strategy.aggregate(server, updates), round=1)
        np.testing.assert_allclose(dense.array(server.adapter["q/B"]), [[1.0], [2.0]], atol=1e-15)
        after = strategy.before_round(server).adapter
        np.testing.assert_allclose(dense.array(after["q/A"]), [[0.6, 0.8]], atol=1e-14)
        np.testing.assert_allclose(dense.array(after["q/B"]), [[5.0], [10.0]], atol=1e-13)
        assert np.linalg.norm(dense.array(after["q/B"])) == pytest.approx(11.1803, abs=1e-4)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("B", [full_rank, deficient])
def test_refactor_invariants(B, transport):
    _, before, after = refactored(B, transport=transport)
    for site in dense.SHAPES:
        oldB, oldA, _ = dense.triple(before.adapter, site)
        newB, newA, _ = dense.triple(after.adapter, site)
        assert dense.relative(newB @ newA, oldB @ oldA) < 1e-12
        np.testing.assert_allclose(newA @ newA.T, np.eye(3), atol=1e-12)
        gram = newB.T @ newB
        spectrum = np.linalg.svd(oldB @ oldA, compute_uv=False)[:3]
        np.testing.assert_allclose(gram, np.diag(spectrum**2), atol=1e-12 * spectrum[0] ** 2)
        np.testing.assert_allclose(newA.T @ newA, dense.row_projector(oldA), atol=1e-12)  # also where B has rank 1
        assert not np.allclose(newA, oldA, atol=1e-3)


def test_largest_entry_of_each_row_is_positive():
    for seed in range(8):
        _, _, after = refactored(lambda shape, seed=seed: np.random.default_rng(seed).standard_normal(tuple(shape)))
        for site in dense.SHAPES:
            for row in dense.array(after.adapter[f"{site}/A"]):
                assert row.max() == np.abs(row).max()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_idempotent(transport):
    strategy, _, once = refactored(full_rank, transport=transport)
    twice = strategy.before_round(once)
    for key, value in once.adapter.tensors.items():
        assert dense.relative(dense.array(twice.adapter[key]), dense.array(value)) < 1e-12


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_zero_B_leaves_A_alone(transport):
    _, before, after = refactored(lambda shape: np.zeros(tuple(shape)), transport=transport)
    assert after.adapter.sha256() == before.adapter.sha256()


def test_a_site_whose_B_is_zero_is_skipped_alone():
    strategy, before, _ = refactored(full_rank)
    before = replace(before, adapter=before.adapter.replace({"u/B": torch.zeros(7, 3).double()}))
    after = strategy.before_round(before)
    assert torch.equal(after.adapter["u/A"], before.adapter["u/A"])
    assert not torch.equal(after.adapter["v/A"], before.adapter["v/A"])


def test_the_function_is_the_same():
    _, before, after = refactored(full_rank)
    x = np.random.default_rng(0).standard_normal((9, 20))
    np.testing.assert_allclose(
        dense.product(after.adapter, "u") @ x, dense.product(before.adapter, "u") @ x, atol=1e-12
    )


def test_float32_product_and_rows():
    sites = {"q": (256, 192)}
    _, before, after = refactored(full_rank, dense.fresh(8, 1.0, torch.float32, sites, head=False))
    assert after.adapter["q/A"].dtype == after.adapter["q/B"].dtype == torch.float32
    assert dense.relative(dense.product(after.adapter, "q"), dense.product(before.adapter, "q")) < 5e-6
    A = dense.array(after.adapter["q/A"])
    assert np.abs(A @ A.T - np.eye(8)).max() < 5e-6


def test_bfloat16_is_refactored_in_high_precision_and_rounded_once():
    _, before, after = refactored(full_rank, dense.fresh(dtype=torch.bfloat16), transport="dense")
    for site in dense.SHAPES:
        B, A, _ = dense.triple(before.adapter, site)
        U, S, Vt = np.linalg.svd(B @ A)
        sign = np.sign(Vt[:3][np.arange(3), np.abs(Vt[:3]).argmax(axis=1)])
        for role, exact in (("A", Vt[:3] * sign[:, None]), ("B", U[:, :3] * S[:3] * sign)):
            got = after.adapter[f"{site}/{role}"]
            assert got.dtype == torch.bfloat16
            assert (np.abs(dense.array(got) - exact) <= 2.0**-8 * np.abs(exact) + 1e-12).all()
        assert dense.relative(dense.product(after.adapter, site), dense.product(before.adapter, site)) < 1e-2


def test_sqrt_split_shares_the_singular_values():
    _, before, after = refactored(full_rank, split="sqrt")
    for site in dense.SHAPES:
        B, A, _ = dense.triple(after.adapter, site)
        oldB, oldA, _ = dense.triple(before.adapter, site)
        spectrum = np.linalg.svd(oldB @ oldA, compute_uv=False)[:3]
        np.testing.assert_allclose(B @ A, oldB @ oldA, atol=1e-12)
        np.testing.assert_allclose(A @ A.T, np.diag(spectrum), atol=1e-12)
        np.testing.assert_allclose(B.T @ B, np.diag(spectrum), atol=1e-12)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_above_a_sites_width_keeps_shapes_and_product(transport):
    """r = 4 at a site with 2 outputs (a small classifier) and at one with 3 inputs."""
    start = dense.fresh(4, shapes={"narrow": (2, 9), "short": (8, 3)}, head=False)
    _, before, after = refactored(full_rank, start, transport=transport)
    for key, value in before.adapter.tensors.items():
        assert after.adapter[key].shape == value.shape
    for site in ("narrow", "short"):
        assert dense.relative(dense.product(after.adapter, site), dense.product(before.adapter, site)) < 1e-12
    A = dense.array(after.adapter["narrow/A"])
    np.testing.assert_allclose(A @ A.T, np.eye(4), atol=1e-12)


def test_it_refactors_every_k_rounds():
    for every in (1, 2, 3):
        played = dense.rounds(
            dense.make("fedsvd", every=every, init="orthonormal"), dense.fresh(), WEIGHTS, 2 * every + 1
        )
        changes = [
            not torch.equal(later.sent.adapter["u/A"], earlier.sent.adapter["u/A"])
            for earlier, later in pairwise(played)
        ]
        assert sum(changes) == 2, every


def test_loss_gradient_is_bounded_by_the_inputs():
    """||dloss/dB|| = s ||g|| ||A x|| <= s ||g|| ||x||, with equality for every x in the row space of A."""
    _, _, after = refactored(full_rank)
    random = np.random.default_rng(0)
    B, A, s = (torch.as_tensor(value) for value in dense.triple(after.adapter, "u"))
    for inside in (False, True):
        for _ in range(10):
            x = torch.tensor(random.standard_normal(9))
            x = A.T @ A @ x if inside else x
            weight, target = B.clone().requires_grad_(), torch.tensor(random.standard_normal(7))
            output = s * weight @ (A @ x)
            loss = (output - target).abs().pow(1.5).sum()
            outer, gradient = torch.autograd.grad(loss, [output, weight])
            ratio = float(gradient.norm() / (s * outer.norm() * x.norm()))
            assert ratio <= 1 + 1e-12 and (ratio > 1 - 1e-12) == inside


# The round -----------------------------------------------------------------------------------------------------------


def test_A_is_neither_trained_nor_uploaded():
    strategy = dense.make("fedsvd")
    for done in dense.rounds(strategy, dense.fresh(), WEIGHTS, 3):
        assert strategy.trained(done.sent) == ("B", "head")
        assert all(sorted(update.adapter.tensors) == ["out/weight", "u/B", "v/B"] for update in done.updates)
        for model in done.models.values():
            assert torch.equal(model["u/A"], done.sent.adapter["u/A"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clients_that_multiply_the_core_hold_the_servers_A_bit_for_bit(dtype):
    strategy = dense.make("fedsvd")
    for done in dense.rounds(strategy, dense.fresh(dtype=dtype), WEIGHTS, 4):
        sent = strategy.broadcast(done.sent, "c0")
        assert "u/A" not in sent and sent["u/M"].shape == (3, 3)
        assert torch.equal(done.models["c1"]["u/A"], done.sent.adapter["u/A"])
        assert strategy.instructions(done.sent).static.roles == ("A",)


def test_the_hash_is_that_of_the_round_0_A_in_every_round():
    strategy = dense.make("fedsvd")
    played = dense.rounds(strategy, dense.fresh(), WEIGHTS, 3)
    hashes = {strategy.instructions(done.sent).static.sha256 for done in played}
    assert hashes == {played[0].sent.adapter.select(("A",)).sha256()}


@pytest.mark.parametrize("options", [{}, {"init": "orthonormal"}, {"every": 2}, {"split": "sqrt"}])
def test_core_transport_is_dense_transport(options):
    core = dense.rounds(dense.make("fedsvd", transport="core", **options), dense.fresh(), WEIGHTS, 5)
    full = dense.rounds(dense.make("fedsvd", transport="dense", **options), dense.fresh(), WEIGHTS, 5)
    for one, other in zip(core, full, strict=True):
        for key, value in other.server.adapter.tensors.items():
            assert dense.relative(dense.array(one.server.adapter[key]), dense.array(value)) < 1e-9, key


def test_the_row_space_never_leaves_that_of_the_first_A():
    played = dense.rounds(dense.make("fedsvd"), dense.fresh(), WEIGHTS, 6)
    for site in dense.SHAPES:
        first = dense.row_projector(dense.array(played[0].sent.adapter[f"{site}/A"]))
        last = dense.row_projector(dense.array(played[-1].sent.adapter[f"{site}/A"]))
        np.testing.assert_allclose(last, first, atol=1e-12)


# FedSVD = FFA-LoRA on an orthonormal basis, under SGD ----------------------------------------------------------------

NET = {"first": (12, 10), "second": (4, 12)}
SIZES = [8, 14, 6, 12]


def network(adapter, x):
    """Two layers with frozen weights and a ReLU between them."""
    random = np.random.default_rng(3)
    for site, (m, n) in NET.items():
        weight = torch.tensor(random.standard_normal((m, n)) / np.sqrt(n))
        s = adapter.sites[site].scaling
        x = x @ (weight + s * adapter[f"{site}/B"] @ adapter[f"{site}/A"]).T
        x = torch.relu(x) if site == "first" else x
    return x


def trainer(optimizer):
    """Local training: 3 full-batch steps on the cross-entropy of the client's own data, optimizer new each round."""

    def train(model, roles, client):
        random = np.random.default_rng(100 + client)
        x = torch.tensor(random.standard_normal((SIZES[client], 10)))
        y = torch.tensor(random.integers(0, 4, SIZES[client]))
        parameters = {key: value.clone().requires_grad_() for key, value in model.select(roles).tensors.items()}
        steps = optimizer(list(parameters.values()))
        for _ in range(3):
            steps.zero_grad()
            F.cross_entropy(network(model.replace(parameters), x), y).backward()
            steps.step()
        return model.replace({key: value.detach() for key, value in parameters.items()})

    return train


def products(name, optimizer, **options):
    """Products of both sites after each of 6 rounds."""
    start = dense.fresh(3, 2.0, shapes=NET, head=False)
    played = dense.rounds(
        dense.make(name, **options),
        start,
        [float(size) for size in SIZES],
        6,
        seeds=[0, 1, 2, 3],
        train=trainer(optimizer),
    )
    return np.array(
        [np.concatenate([dense.product(done.server.adapter, site).ravel() for site in NET]) for done in played]
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


@pytest.mark.parametrize("optimizer", [sgd, momentum])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_under_sgd_fedsvd_is_ffa_on_an_orthonormal_basis(optimizer, every):
    svd = products("fedsvd", optimizer, init="orthonormal", every=every)
    ffa = products("ffa_lora", optimizer, init="orthonormal")
    assert np.linalg.norm(ffa[-1]) > 0.5 and np.linalg.norm(ffa[-1] - ffa[0]) > 0.1
    np.testing.assert_allclose(svd, ffa, atol=1e-10)


def test_without_the_orthonormal_start_they_differ():
    svd = products("fedsvd", sgd)
    assert dense.relative(svd[-1], products("ffa_lora", sgd)[-1]) > 0.1
    assert dense.relative(svd[-1], products("ffa_lora", sgd, init="orthonormal")[-1]) > 1e-3  # round 1 differs
    assert (
        dense.relative(
            products("fedsvd", sgd, init="orthonormal", split="sqrt")[-1],
            products("ffa_lora", sgd, init="orthonormal")[-1],
        )
        > 1e-2
    )


def test_under_adam_they_differ():
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    svd = products("fedsvd", adam, init="orthonormal")
    ffa = products("ffa_lora", adam, init="orthonormal")
    np.testing.assert_allclose(svd[0], ffa[0], atol=1e-10)  # before the first refactor
    assert dense.relative(svd[-1], ffa[-1]) > 0.05
