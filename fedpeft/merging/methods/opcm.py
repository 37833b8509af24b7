"""OPCM: merge task after task, each projected orthogonal to what was merged before. Tang et al., arXiv 2501.09522.

With the merged change D of all sites, the new task's change tau, and D = U S V^T at each site,

    Z = U^T tau V,   Z_ii <- 0,   Z[:k, :k] <- 0,   P = U Z V^T       k = #{i : (S_1 + ... + S_i) / sum(S) <= alpha}
    D <- (lambda' D + P) / lambda,   lambda = ||lambda' D + P|| / n        over all sites together

lambda' is the lambda of the task before, 1 at the first, and n the mean norm of the changes tau seen so far: the merged
change has the norm of a typical task at any time. The zero diagonal makes <P, D> = 0, the zero block keeps the strong
directions of D as they were.

The paper takes full U [m, m] and V [n, n]. Nothing dense is needed: with the thin U, V of D's factors, of rank q,

    P = tau - U (M o (U^T tau V)) V^T,   M_ij = 1 where i = j <= q or i, j <= k, else 0

keeps what tau has outside span(U) and span(V) exactly. Cost per site: O((m + n) (q + r)^2). The rank grows up to the
sum of the ranks, or the width of the layer.

Deviations: past q, columns of a full U and V are any basis of a null space, so the published code zeroes diagonal
entries that depend on the LAPACK build; here only the q entries are zeroed that D determines. Where D has full rank
(q = min(m, n), as after full fine-tuning) both are the same. alpha = 1 zeroes the whole q x q block (the published
index is 0 there). Heads are averaged: an adapter does not hold what they started from.

    >>> import torch
    >>> from fedpeft.merging.base import merge
    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> def one(b): return AdapterState({"q/A": torch.eye(2), "q/B": torch.tensor(b)}, {"q": AdaptedLayer("lora")})
    >>> merged = merge("opcm", [one([[2.0, 0.0], [0.0, 1.0]]), one([[5.0, 1.0], [2.0, 5.0]])])
    >>> D = merged["q/B"] @ merged["q/A"]            # the 5s fall on the diagonal; 1 and 2 stay
    >>> (D / D[0, 1]).round(decimals=4).tolist()
    [[2.0, 1.0], [2.0, 1.0]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.config import option
from fedpeft.merging.base import Merger, Numbers, State, Tensors, combine, pair
from fedpeft.state import AdapterState

NOISE = 1e-12  # singular values below this share of the largest are rounding: no directions of D


@dataclass
class OPCMConfig:
    """Options of `opcm`: how much of what was merged before is shut off from a new task."""

    alpha: float = option(
        0.5, "share of the sum of singular values whose directions a new task may not touch at all", low=0, high=1
    )


class OPCM(Merger):
    """Each task's change is projected orthogonal to the merged one, and the norm is kept that of one task."""

    Config: ClassVar[Any] = OPCMConfig
    paper = "Tang et al. 2025, arXiv 2501.09522"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        numbers = state["numbers"]
        count, scaling = numbers["count"], {site: numbers["sites"][site]["scaling"] for site in adapter.lora_sites()}
        new = {key: value for key, value in adapter.tensors.items() if adapter.role(key) in ("A", "B")}
        mean = numbers.get("mean_norm", 0.0)
        mean += (_norm_of_change(new, scaling) - mean) / (count + 1)
        if not count:
            return combine(state, adapter, 1.0, 1.0), {"mean_norm": mean, "lambda": 1.0}
        tensors: Tensors = {}
        for site in scaling:
            B, A = merged(*pair(state, site), new[f"{site}/B"], new[f"{site}/A"], numbers["lambda"], self.config.alpha)
            tensors[f"{site}/B"], tensors[f"{site}/A"] = lowrank.compress(B, A)
        norm = _norm_of_change(tensors, scaling)
        lambda_ = norm / mean if norm and mean else 1.0  # nothing has been merged yet: every factor is zero
        for site in scaling:
            tensors[f"{site}/B"] = tensors[f"{site}/B"] / lambda_
        return tensors, {"mean_norm": mean, "lambda": lambda_}

    def notes(self, state: State) -> list[str]:
        return [f"lambda {state['numbers']['lambda']:.4g}; norm {state['numbers']['mean_norm']:.4g}"]


def merged(B: Tensor, A: Tensor, newB: Tensor, newA: Tensor, lambda_: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Factors [m, q + r] and [q + r, n] of lambda_ D + P, with D = B A of rank q and tau = newB newA of rank r."""
    U, S, Vt = lowrank.svd(B, A)
    if S.numel():
        rank = int((S / S[0] > NOISE).sum())
        U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    # The small products first: neither tau nor D is formed.
    inside = (U.T @ newB) @ (newA @ Vt.T) * mask(S, alpha)
    return torch.cat([U @ (torch.diag(lambda_ * S) - inside), newB], dim=1), torch.cat([Vt, newA])


def mask(S: Tensor, alpha: float) -> Tensor:
    """M [q, q]: 1 on the diagonal and in the leading block of the directions that hold a share alpha, else 0."""
    M = torch.eye(S.numel(), dtype=S.dtype)
    if S.numel():
        share = S.cumsum(0) / S.sum()
        share[-1] = 1.0  # the sum of all, without its rounding
        block = int((share <= alpha).sum())
        M[:block, :block] = 1.0
    return M


def _norm_of_change(tensors: Tensors, scaling: dict[str, float]) -> float:
    """Frobenius norm of the change of all sites together."""
    norms = [
        factor * float(lowrank.norm(tensors[f"{site}/B"], tensors[f"{site}/A"])) for site, factor in scaling.items()
    ]
    return math.hypot(*norms)
