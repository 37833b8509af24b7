"""CoSO: what is protected, in training, in float32, over clients, and in the two numerical traps."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from support import continual_parts as parts
from support.continual_parts import HIDDEN as IN
from support.continual_parts import WIDTH as OUT
from support.continual_parts import low_rank_gradient, noise, orthonormal

FIRST, SECOND = "blocks.0.fc2", "blocks.1.fc2"  # [12, 16]
SIDES = {"out": OUT, "in": IN}


def within(M: Tensor, W: Tensor, side: str) -> Tensor:
    """The part of a change of weights that lies in the protected space."""
    return M.T @ W if side == "out" else W @ M


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
    body = parts.begun(
        "coso", {"side": side, "r1": 8, "r2": 4, "svd": svd, "refresh": refresh, "rotate_moments": rotate}
    )
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
        made = parts.run(
            "coso", options={"side": "out", "r1": 6, "r2": 6, "eps_th": 1.0, "refresh": 1, "cap": 0.5}, tasks=5
        )
    assert all(0 < value <= 0.5 for value in made.body.saturation().values())
    for key, M in made.body.memory["bases"].items():
        assert (M.T @ M - torch.eye(M.shape[1])).abs().max() <= 1e-5, key
