"""Optimizers that see each tensor by its name and shape: one step is over all clients' [K, ...] of it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.clients.optimizers.base import STEP, ClientOptimizer, Layout, Settling
from fedpeft.config import ClientConfig


@dataclass(frozen=True)
class Moving:
    """A tensor of K clients, its gradient and its state, all views [K, ...]: what is changed in place is changed."""

    value: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


Moves = Callable[[dict[str, Moving], float, int], None]  # tensors by name, the rate, and the number of the step from 1


class Stacked(Settling):
    """Calls `move` for every step, alone with K = 1.

    Args:
        kinds: what is kept of each tensor from step to step, zero at first; without any, no steps are counted.
        last: leaves in the values what is sent, when the steps have been taken.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        lr: float,
        layout: Layout,
        kinds: Sequence[str],
        move: Moves,
        last: Callable[[dict[str, Moving]], None] | None = None,
    ):
        super().__init__(weights, {"lr": lr})
        self.layout, self.kinds, self.move, self.last = layout, kinds, move, last
        # By their shapes and not by their number: a cohort of one client is a matrix [1, P] too.
        self.alone = [weight.shape for weight in weights] == list(layout.shapes.values())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all clients."""
        [group] = self.param_groups
        count = 0
        for weight in group["params"] if self.kinds else ():
            state = self.state[weight]
            for kind in self.kinds:
                state.setdefault(kind, torch.zeros_like(weight))
            state[STEP] = state.get(STEP, torch.tensor(0.0)) + 1
            count = int(state[STEP])
        self.move(self._view_tensors(), group["lr"], count)

    @torch.no_grad()
    def settle(self) -> None:
        """Leave in the weights what is sent; nothing has to be done where no step was taken."""
        if self.last is not None and self.state:
            self.last(self._view_tensors())

    def _view_tensors(self) -> dict[str, Moving]:
        tensors: dict[str, Moving] = {}
        for place, weight in enumerate(self.param_groups[0]["params"]):
            gradient = weight if weight.grad is None else weight.grad  # none is read when the round is over
            kept = (self.state[weight][kind] for kind in self.kinds)
            views = [self._view_rows(value, place) for value in (weight, gradient, *kept)]
            for name, value, grad, *rest in zip(views[0], *(view.values() for view in views), strict=True):
                tensors[name] = Moving(value, grad, dict(zip(self.kinds, rest, strict=True)))
        return tensors

    def _view_rows(self, value: Tensor, place: int) -> dict[str, Tensor]:
        shapes = self.layout.shapes
        if self.alone:
            return {list(shapes)[place]: value[None]}
        parts = value.split([shape.numel() for shape in shapes.values()], dim=1)
        return {key: part.unflatten(1, shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}


class PairedSGD(ClientOptimizer):
    """Steps A and B of a site against directions that hang on both, all else against its gradient; keeps no state.

    Weight decay is decoupled.
    """

    pairs_factors = True

    def has_state(self, client: ClientConfig) -> bool:
        return False

    def directions(self, A: Moving, B: Moving, scale: float) -> tuple[Tensor, Tensor]:
        """What is subtracted, times the rate, from A [K, r, in] and B [K, out, r] of the product `scale` B A."""
        raise NotImplementedError

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            steps = {name: tensor.gradient for name, tensor in tensors.items()}
            # All directions before any value moves: each hangs on the other factor as it was.
            for site, (A, B) in pairs(tensors).items():
                steps[f"{site}/A"], steps[f"{site}/B"] = self.directions(A, B, layout.scales[site])
            for name, tensor in tensors.items():
                tensor.value.mul_(1 - lr * client.weight_decay).sub_(lr * steps[name])

        return Stacked(weights, client.lr, layout, (), move)


def pairs(tensors: dict[str, Moving]) -> dict[str, tuple[Moving, Moving]]:
    """A and B of each site that has both, by site."""
    sites = {name.rpartition("/")[0] for name in tensors}
    return {
        site: (tensors[f"{site}/A"], tensors[f"{site}/B"])
        for site in sorted(sites)
        if f"{site}/A" in tensors and f"{site}/B" in tensors
    }


@dataclass(frozen=True)
class Gram:
    """M M^T + d I of K clients as its eigenvalues [K, r] and eigenvectors [K, r, r]; NaN where a client's M is."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor, damping: float) -> Gram:
        """Of M [K, r, n]. d is `damping`, and ten times what rounding leaves of an eigenvalue of zero, eps r tr(M M^T).

        What rounding leaves in a gradient along such an eigenvector, divided by d, is then small beside the step.
        """
        product = matrix @ matrix.mT
        good = torch.isfinite(product).all(dim=(1, 2))
        # LAPACK refuses the whole batch for one client's NaN.
        identity = torch.eye(product.shape[1], dtype=product.dtype, device=product.device)
        values, vectors = torch.linalg.eigh(product.where(good[:, None, None], identity))
        # Rounding leaves a singular matrix small eigenvalues below zero.
        values = values.clamp(min=0.0)
        rounding = 10 * torch.finfo(product.dtype).eps * product.shape[1] * values.sum(1, keepdim=True)
        return cls((values + damping + rounding).where(good[:, None], torch.nan), vectors)

    def solve(self, right: Tensor) -> Tensor:
        """(M M^T + d I)^-1 R of [K, r, n]."""
        return self.vectors @ (self.vectors.mT @ right / self.values[:, :, None])


def adam_direction(tensor: Moving, step: int, beta1: float, beta2: float, eps: float, nesterov: bool = False) -> Tensor:
    """Adam's mean gradient over its root mean square, both bias-corrected; moves the moments.

    Args:
        nesterov: take the mean as it will be if the gradient comes once more, as AdamP's option of that name does.
    """
    mean, square = tensor.state["exp_avg"], tensor.state["exp_avg_sq"]
    mean.lerp_(tensor.gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(tensor.gradient, tensor.gradient, value=1 - beta2)
    ahead = tensor.gradient.lerp(mean, beta1) if nesterov else mean
    return (ahead / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
