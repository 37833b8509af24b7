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

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import option
from fedpeft.continual.parts.orthogonal import extended, outside
from fedpeft.continual.parts.subspace import leading, merge_sketches, project
from fedpeft.state import ServerState
from fedpeft.strategies.sequence.base import Place, ServerBody, folded, recalled, remember

BASIS, SKETCH = "|M", "|S"


class CoSO(ServerBody):
    """Coefficients in a shared subspace, orthogonal to those of earlier tasks."""

    paper = "Cheng et al. 2025, arXiv 2505.11816"
    rules = ("fedit", "ffa_lora", "fedsvd")
    folds = True

    @dataclass
    class Config:
        side: str = option("in", "which side of the gradient the subspace is of: out, as published, or in",
                           choices=("out", "in"))
        basis: str = option("sketch", "the task's subspace: from the clients' gradients, or drawn from the seed",
                            choices=("sketch", "random"))
        r2: int = option(16, "columns of a sketch", low=1)
        eps_th: float = option(0.9, "share of a task's squared singular values that is protected", above=0, high=1)

    @property
    def sketches(self) -> bool:  # type: ignore[override]
        return bool(self.config.basis == "sketch")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("A", "B") if self.config.side == "out" else ("B",)

    @property
    def changes_A(self) -> bool:  # type: ignore[override]
        return True

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        fixed = "B" if self.config.side == "out" else "A"
        return tuple(role for role in roles if role != fixed)

    def begin(self, server: ServerState, place: Place, seed: int, sketch: dict[str, Tensor]) -> ServerState:
        out = self.config.side == "out"
        bases, old = recalled(server, BASIS), recalled(server, SKETCH)
        tensors: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for site in server.adapter.lora_sites():
            A, B = server.adapter[f"{site}/A"], server.adapter[f"{site}/B"]
            frozen = B if out else A.T
            if place.task > 0:
                bases[site] = extended(bases.get(site), self._protected(old[site], bases.get(site)) if self.sketches
                                       else frozen.double())
                kept[site + BASIS] = bases[site]
            P = self._basis(sketch.get(site), bases.get(site), frozen, seed, site, place.task)
            tensors[f"{site}/B"] = P if out else torch.zeros_like(B)
            tensors[f"{site}/A"] = torch.zeros_like(A) if out else P.T
            if self.sketches:
                kept[site + SKETCH] = sketch[site].double()
        server = remember(folded(server) if place.task > 0 else server, kept)
        return server.with_tensors(tensors)

    def _protected(self, sketch: Tensor, M: Tensor | None) -> Tensor:
        """The leading directions of a finished task's sketch outside of what is protected already."""
        S = sketch.double()
        return leading(S if M is None else project(S, M), self.config.eps_th)

    def _basis(self, sketch: Tensor | None, M: Tensor | None, like: Tensor, seed: int, site: str, task: int) -> Tensor:
        """Orthonormal columns P [d, r] outside of M: the sketch's leading ones, filled up from the seed."""
        r = like.shape[1]
        if sketch is None:
            return outside(M, like.shape[0], r, seed, site, task)
        S = sketch.double() if M is None else project(sketch.double(), M)
        found = leading(S, 1.0)[:, :r]
        used = found if M is None else torch.cat([M, found], dim=1)
        rest = outside(used, like.shape[0], r - found.shape[1], seed, site, task)
        return torch.cat([found, rest], dim=1)


def merged(sketches: list[Tensor], weights: list[float]) -> Tensor:
    """The sketch [d, r2] of all clients' gradients, each weighted like its update; the sketches' errors add up."""
    total = sum(weights)
    return merge_sketches([Q.double() * (weight / total) ** 0.5 for Q, weight in zip(sketches, weights, strict=True)])
