"""Optimizers that see factors as matrices, against their equations in float64, alone and in a cohort."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.clients.optimizers.muon import even_out
from fedpeft.config import load
from fedpeft.errors import InputError
from support.optimizer_steps import (
    DECAY,
    IN,
    OUT,
    RATE,
    SCALE,
    R,
    adam,
    after,
    cast,
    drawn,
    near,
    newton_schulz,
)


def test_lora_plus_is_adamw_with_two_rates():
    start, gradients = drawn(0), [drawn(1), drawn(2), drawn(3)]
    found = after("lora_plus", start, gradients, ratio=5.0)
    for key, value in start.items():
        near(found[key], adam(value, [g[key] for g in gradients], RATE * (5.0 if key == "q/B" else 1.0)))


def test_riemannian_is_its_equation_and_does_not_hang_on_the_split():
    start, whole = drawn(0), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def step(A, B):
        gradient = {**drawn(1), "q/A": SCALE * B.T @ whole, "q/B": SCALE * whole @ A.T}
        found = after("riemannian", {**start, "q/A": A, "q/B": B}, [gradient], damping=1e-14)
        shrunk = 1 - RATE * DECAY
        near(found["q/A"], shrunk * A - RATE * torch.linalg.inv(B.T @ B) @ gradient["q/A"], 1e-9)
        near(found["q/B"], shrunk * B - RATE * gradient["q/B"] @ torch.linalg.inv(A @ A.T), 1e-9)
        near(found["head/bias"], shrunk * start["head/bias"] - RATE * gradient["head/bias"])
        return found["q/B"] @ found["q/A"]

    A, B = start["q/A"], start["q/B"]
    mix = torch.tensor([[3.0, 1, 0], [0, 0.5, 2], [1, 0, 1]], dtype=torch.float64)
    near(step(mix @ A, B @ torch.linalg.inv(mix)), step(A, B), 1e-8)


def test_lora_pro_projects_the_whole_gradient():
    """The product moves by the projection of G on what steps of the factors reach: G P_A + P_B G (I - P_A)."""
    start = drawn(0)
    A, B = start["q/A"], start["q/B"]
    whole = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient = {**drawn(1), "q/A": SCALE * B.T @ whole, "q/B": SCALE * whole @ A.T}
    found = after("lora_pro", start, [gradient], damping=1e-14)
    moved_A, moved_B = (((1 - RATE * DECAY) * start[key] - found[key]) / RATE for key in ("q/A", "q/B"))
    P_A, P_B = A.T @ torch.linalg.inv(A @ A.T) @ A, B @ torch.linalg.inv(B.T @ B) @ B.T
    near(SCALE * (B @ moved_A + moved_B @ A), whole @ P_A + P_B @ whole - P_B @ whole @ P_A, 1e-9)
    inner = torch.linalg.inv(B.T @ B)
    X = (moved_A - inner @ gradient["q/A"] / SCALE**2) @ A.T @ torch.linalg.inv(A @ A.T)
    near(B.T @ B @ X + X @ A @ A.T, -inner @ gradient["q/A"] @ A.T / SCALE**2, 1e-9)


def test_lora_pro_begins_where_b_is_zero():
    start = {**drawn(0), "q/B": torch.zeros(OUT, R, dtype=torch.float64)}
    gradient = {**drawn(1), "q/A": torch.zeros(R, IN, dtype=torch.float64)}
    found, A = after("lora_pro", start, [gradient], damping=1e-14), start["q/A"]
    near(found["q/A"], (1 - RATE * DECAY) * A)
    near(found["q/B"], -RATE * gradient["q/B"] @ torch.linalg.inv(A @ A.T) / SCALE**2, 1e-9)


@pytest.mark.parametrize("name", ["lora_pro", "riemannian"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_where_b_has_a_lower_rank_float32_steps_as_float64_does(name, rank, size):
    """In float32 its Gram matrix with a small damping is singular, to rounding."""
    start, whole = drawn(0), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start["q/B"] = size * start["q/B"][:, :rank] @ drawn(3)["q/A"][:rank, :R]
    gradient = {**drawn(1), "q/A": SCALE * start["q/B"].T @ whole, "q/B": SCALE * whole @ start["q/A"].T}
    single, double = (after(name, cast(start, kind), [cast(gradient, kind)]) for kind in (torch.float32, torch.float64))
    for key in ("q/A", "q/B"):
        moved = double[key] - (1 - RATE * DECAY) * start[key]
        near(single[key].double(), double[key], 0.06 * float(moved.abs().max()))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_rule(nesterov):
    start, gradients = drawn(0), [drawn(1), drawn(2)]
    found = after("muon", start, gradients, nesterov=nesterov)
    for key in ("q/A", "q/B"):
        value, mean = start[key], torch.zeros_like(start[key])
        for g in (one[key] for one in gradients):
            mean = 0.95 * mean + 0.05 * g
            even = newton_schulz(0.05 * g + 0.95 * mean if nesterov else mean)
            rows, columns = value.shape
            value = value * (1 - RATE * DECAY) - RATE * max(1, rows / columns) ** 0.5 * even
        near(found[key], value, 1e-9)
    for key in ("head/weight", "head/bias"):
        near(found[key], adam(start[key], [g[key] for g in gradients], RATE))


def test_muon_is_torchs_but_for_its_bfloat16():
    value, gradient = drawn(0)["q/B"], drawn(1)["q/B"]
    theirs = nn.Parameter(value.clone())
    theirs.grad = gradient.clone()
    torch.optim.Muon([theirs], lr=RATE, weight_decay=DECAY).step()
    near(after("muon", drawn(0), [drawn(1)])["q/B"], theirs.detach(), 0.03 * RATE)
    singular = torch.linalg.svdvals(even_out(gradient[None], 5))
    assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("name", ["lora_pro", "riemannian"])
@pytest.mark.parametrize("strategy", ["ffa_lora", "rolora"])
def test_what_pairs_factors_needs_both(name, strategy):
    with pytest.raises(InputError, match=rf"client\.optimizer={name}.*strategy {strategy}.*fedit"):
        load({}, {"strategy": strategy, "client.optimizer": name})
    assert load({}, {"client.optimizer": name}).client.optimizer == name


def test_those_without_state_keep_none():
    with pytest.raises(InputError, match=r"client\.keep_optimizer=true: client\.optimizer=lora_pro"):
        load({}, {"client.optimizer": "lora_pro", "client.keep_optimizer": True})


def test_lora_fa_is_adamw_on_the_projected_gradient():
    start, gradients = drawn(0), [drawn(1), drawn(2), drawn(3)]
    found, A = after("lora_fa", start, gradients), start["q/A"]
    projected = [one["q/B"] @ torch.linalg.inv(A @ A.T) / SCALE**2 for one in gradients]
    near(found["q/B"], adam(start["q/B"], projected, RATE), 1e-7)
    near(found["head/weight"], adam(start["head/weight"], [one["head/weight"] for one in gradients], RATE))
    assert found["q/A"] is A


def test_lora_fa_steps_as_the_whole_weight_projected_on_the_rows_of_a():
    """As AdamW divides its lengths away, seen at a first step with a large eps, which is then one of SGD."""
    start, whole = drawn(0), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    A = start["q/A"]
    found = after("lora_fa", start, [{**drawn(1), "q/B": SCALE * whole @ A.T}], {"weight_decay": 0.0}, eps=1e6)
    moved = SCALE * (start["q/B"] - found["q/B"]) @ A * 1e6 / RATE
    near(moved, whole @ A.T @ torch.linalg.inv(A @ A.T) @ A, 1e-4)


@pytest.mark.parametrize("strategy", ["fedit", "rolora"])
def test_lora_fa_needs_an_a_that_stays(strategy):
    with pytest.raises(InputError, match=rf"client\.optimizer=lora_fa.*strategy {strategy}.*ffa_lora"):
        load({}, {"strategy": strategy, "client.optimizer": "lora_fa"})
    assert load({}, {"strategy": "ffa_lora", "client.optimizer": "lora_fa"}).client.optimizer == "lora_fa"
