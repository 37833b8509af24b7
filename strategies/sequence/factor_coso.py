"""CoSO's two projections in factor space: a federated task that leaves what earlier tasks rely on untouched.

The idea of CoSO (arXiv 2505.11816) for dW = s B A with A frozen within a task (FFA-LoRA, FedSVD). After a task s B A is
folded into the base; the next one starts at B = 0 with

    in    A with orthonormal rows and A N^T = 0, N [D, n] orthonormal rows that span the A of all earlier tasks
          => dW N^T = 0 for the whole task: averaging acts on B alone, and FedSVD's refactorisation stays in the row
          space of A. What earlier tasks added, s B_old A_old, is then a function of A_old x, and the new task moves no
          response to inputs in the span of A_old.
    out   B <- (I - M M^T) B after every aggregation, M [m, D] orthonormal columns that span the B of earlier tasks
          => M^T dW = 0: no output direction that earlier tasks used is moved.
    both  A as in `in`, B as in `out`.

N and M are made of factors that the server already has, so under DP they are public or noised: both projections are
post-processing and cost no budget. Uploads are B (and the head) alone. Capacity: floor(n / r) tasks for `in`; when no
orthogonal row is left the run is refused. `out` keeps the leading columns of B (share `energy` of the squared singular
values), at most m in all, and says how full they are.

Not in the paper, which projects full-weight gradients with subspaces of gradients (see `coso`). The in-side choice of
disjoint A is Orthogonal Adaptation's (arXiv 2312.02432), here inside a federated strategy.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from fedpeft.continual.body import Body
from fedpeft.continual.parts.orthogonal import draw_outside, extend_basis
from fedpeft.continual.parts.subspace import leading_directions, project_out
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.sequence.base import (
    Place,
    ServerBody,
    Tensors,
    fold_into_base,
    recall_tensors,
    remember_tensors,
)

log = logging.getLogger("fedpeft")
ROWS, COLUMNS = "|N", "|M"
FULL = 0.9  # share of protected directions above which a site hardly learns


class FederatedFactorCoSO(ServerBody):
    """Each task in a subspace orthogonal to those of earlier tasks, with uploads of B only."""

    needs = ("B",)
    fixes_factor = folds = True

    def __init__(self, central: type[Body], **options: Any) -> None:
        super().__init__(central, **options)
        self.changes_A = self.config.side != "out"

    def trained(self, roles: tuple[str, ...], place: Place) -> tuple[str, ...]:
        return tuple(role for role in roles if role != "A")

    def require(self, adapter: AdapterState, tasks: int) -> None:
        for site in adapter.lora_sites() if self.changes_A else ():
            r, n = adapter[f"{site}/A"].shape
            if tasks * r > n:
                raise InputError(
                    f"continual.side={self.config.side}: {tasks} tasks of rank {r} need {tasks * r} "
                    f"orthogonal rows, but {site} has {n} inputs. Lower adapter.r or continual.tasks (at "
                    f"most {n // r}), or set continual.side=out."
                )

    def begin(self, server: ServerState, place: Place, seed: int, sketches: dict[str, Tensors]) -> ServerState:
        inputs, outputs = self.config.side != "out", self.config.side != "in"
        rows, columns = recall_tensors(server, ROWS), recall_tensors(server, COLUMNS)
        kept: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for site in server.adapter.lora_sites():
            A, B = server.adapter[f"{site}/A"], server.adapter[f"{site}/B"]
            if outputs and place.task > 0:
                kept[site + COLUMNS] = extend_basis(columns.get(site), leading_directions(B, self.config.energy))
                full = kept[site + COLUMNS].shape[1] / len(B)
                if full > FULL:
                    log.warning(
                        "factor_coso: %.0f %% of the output directions of %s are protected; it hardly learns "
                        "any more. Lower continual.energy.",
                        100 * full,
                        site,
                    )
            if inputs:
                if place.task > 0:
                    kept[site + ROWS] = extend_basis(rows.get(site), A.T)
                r, n = A.shape
                tensors[f"{site}/A"] = draw_outside(kept.get(site + ROWS), n, r, seed, site, place.task).T
        server = remember_tensors(fold_into_base(server) if place.task > 0 else server, kept)
        return server.with_tensors(tensors)

    def after(self, server: ServerState, place: Place) -> ServerState:
        columns = recall_tensors(server, COLUMNS)
        return server.with_tensors(
            {f"{site}/B": project_out(server.adapter[f"{site}/B"].double(), M) for site, M in columns.items()}
        )
