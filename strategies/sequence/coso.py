"""CoSO in a federation: full-weight learning whose changes travel as coefficients in a shared low-dimensional subspace.

Cheng et al., arXiv 2505.11816. Before a task every client sends a sketch Q_k of the gradients of the full weights at
the present model on its own new records (Frequent Directions, r2 columns); sketches merge, so the server has that of
all:

    S = FD([Q_1 sqrt(p_1), Q_2 sqrt(p_2), ...]),   P = the r leading left singular vectors of (I - M M^T) S
    side out   dW = P C,     B = P [m, r] frozen,    clients train A = C [r, n] from zero
    side in    dW = C P^T,   A = P^T [r, n] frozen,  clients train B = C [m, r] from zero

Averaging C is exact, because P is shared, and M^T dW = 0 (out) or dW M = 0 (in) for the whole task, because the
constraint is linear. At the next task s P C goes into the base, and M takes the leading directions of S that hold the
share `eps_th` of its squared singular values.

Deviations from the paper's single learner: P stays for a task (refresh period infinite), as clients must share it; the
sketch is taken before the task. `basis: random` draws P from the seed outside of M and protects earlier P instead: no
sketch is sent, which is the form that sample-level DP allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import on_device, per_sample_loss
from fedpeft.continual.body import Body
from fedpeft.continual.parts.orthogonal import draw_outside, extend_basis
from fedpeft.continual.parts.subspace import leading_directions, merge_sketches, project_out, sketch
from fedpeft.data.encode import Encoded
from fedpeft.models.base import orient
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.sequence.base import (
    NEW,
    Place,
    ServerBody,
    Tensors,
    fold_into_base,
    recall_tensors,
    remember_tensors,
)

BASIS, SKETCH = "|M", "|S"
SKETCH_ROWS = 64  # records of a gradient that goes into a sketch


class FederatedCoSO(ServerBody):
    """Coefficients in a shared subspace, orthogonal to those of earlier tasks."""

    fixes_factor = folds = changes_A = True
    without_sketches = "Set continual.basis=random."

    def __init__(self, central: type[Body], **options: Any) -> None:
        super().__init__(central, **options)
        self.fixed, self.needs = ("B", ("A", "B")) if self.config.side == "out" else ("A", ("B",))
        self.without_needs = "Set continual.side=in, or take a strategy that does (fedit)."
        self.sketches = (NEW,) if self.config.basis == "sketch" else ()

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        return tuple(role for role in roles if role != self.fixed)

    def describe_sketch(self, adapter: AdapterState) -> dict[str, tuple[int, ...]]:
        out = self.config.side == "out"
        return {
            site: (len(adapter[f"{site}/B"]) if out else adapter[f"{site}/A"].shape[1], self.config.r2)
            for site in adapter.lora_sites()
        }

    def make_sketch(self, model: Adapted, data: Encoded) -> Tensors:
        return {
            site: sketch.float()
            for site, sketch in sketch_gradients(model, data, self.config.r2, self.config.side == "in").items()
        }

    def merge_sketches(self, sketches: list[Tensors], weights: list[float]) -> Tensors:
        """Each client's is weighted like its update; the sketches' errors add up."""
        # Roots, since Q Q^T is what the clients' weights are for.
        roots = [(weight / sum(weights)) ** 0.5 for weight in weights]
        return {
            site: merge_sketches([Q[site].double() * root for Q, root in zip(sketches, roots, strict=True)])
            for site in sketches[0]
        }

    def begin(self, server: ServerState, place: Place, seed: int, sketches: dict[str, Tensors]) -> ServerState:
        out, sketch = self.config.side == "out", sketches.get(NEW, {})
        bases, old = recall_tensors(server, BASIS), recall_tensors(server, SKETCH)
        tensors: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for site in server.adapter.lora_sites():
            A, B = server.adapter[f"{site}/A"], server.adapter[f"{site}/B"]
            frozen = B if out else A.T
            if place.task > 0:
                bases[site] = extend_basis(
                    bases.get(site),
                    self._add_protected(old[site], bases.get(site)) if self.sketches else frozen.double(),
                )
                kept[site + BASIS] = bases[site]
            P = self._basis_outside(sketch.get(site), bases.get(site), frozen, seed, site, place.task)
            tensors[f"{site}/B"] = P if out else torch.zeros_like(B)
            tensors[f"{site}/A"] = torch.zeros_like(A) if out else P.T
            if self.sketches:
                kept[site + SKETCH] = sketch[site].double()
        # Folded with the old factors, before the new ones take their places.
        server = remember_tensors(fold_into_base(server) if place.task > 0 else server, kept)
        return server.with_tensors(tensors)

    def _add_protected(self, sketch: Tensor, M: Tensor | None) -> Tensor:
        """The leading directions of a finished task's sketch outside of what is protected already."""
        S = sketch.double()
        return leading_directions(S if M is None else project_out(S, M), self.config.eps_th)

    def _basis_outside(
        self, sketch: Tensor | None, M: Tensor | None, like: Tensor, seed: int, site: str, task: int
    ) -> Tensor:
        """Orthonormal columns P [d, r] outside of M: the sketch's leading ones, filled up from the seed."""
        r = like.shape[1]
        if sketch is None:
            return draw_outside(M, like.shape[0], r, seed, site, task)
        S = sketch.double() if M is None else project_out(sketch.double(), M)
        found = leading_directions(S, 1.0)[:, :r]
        used = found if M is None else torch.cat([M, found], dim=1)
        rest = draw_outside(used, like.shape[0], r - found.shape[1], seed, site, task)
        return torch.cat([found, rest], dim=1)


def sketch_gradients(model: Adapted, data: Encoded, columns: int, inputs: bool) -> Tensors:
    """Frequent Directions of the full weights' gradients at the model as it is, [d, columns] by site.

    Args:
        inputs: sketch right singular directions (d = inputs) instead of left ones (d = outputs).
    """
    layers = {site: model.base.layer(site) for site in model.form.lora_sites()}
    # The frozen weights themselves, for once: a factor's gradient sees no more directions than its rank.
    weights = {site: layer.get_parameter("weight") for site, layer in layers.items()}
    device = next(iter(weights.values())).device
    sketches: Tensors = {}
    for value in weights.values():
        value.requires_grad_(True)
    try:
        for start in range(0, len(data), SKETCH_ROWS):
            index = np.arange(start, min(start + SKETCH_ROWS, len(data)))
            loss = per_sample_loss(model, *on_device(data, index, device)).mean()
            slopes = torch.autograd.grad(loss, list(weights.values()))
            for (site, layer), slope in zip(layers.items(), slopes, strict=True):
                gradient = orient(layer, slope.cpu().double())
                gradient = gradient.T if inputs else gradient
                before = sketches.get(site, gradient.new_zeros(len(gradient), columns))
                sketches[site] = sketch(before, gradient)[0]
    finally:
        for value in weights.values():
            value.requires_grad_(False)
    return sketches
