"""FedEx-LoRA: average both factors, put what that misses into the base. Singhal et al., ACL 2025, arXiv 2410.09432.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   W <- W + s R,
    R = sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)

Exact. R is computed as the covariance (no cancellation) in factors of rank (K - 1) r; all residuals so far stay in
factors beside the frozen base, compressed when their rank passes min(m, n). W drifts, so every client gets the whole
residual, also one that sat rounds out.

Deviations: weights p_k by examples (the authors' are uniform; set strategy.weighting=uniform for theirs). Their code
adds the transpose of R, right for GPT-2's Conv1D and wrong for nn.Linear.

    >>> from fedpeft.strategies.rules.fedex import FedEx
    >>> FedEx.changes_base
    True
"""

from __future__ import annotations

from fedpeft import lowrank
from fedpeft.state import Needs, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.parts.residuals import with_change


class FedEx(FederatedStrategy):
    """FedIT, with the exact residual added to the base."""

    paper = "Singhal et al. 2024, arXiv 2410.09432"
    needs = Needs.INDIVIDUAL
    changes_base = True
    # The residual belongs to the plain mean: a server step to other factors (momentum, a rate) would contradict it.
    fixed_basis = False

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        weights = [update.weight for update in updates]
        changes = {}
        for site in server.adapter.lora_sites():
            B, A = lowrank.residual(
                [update.adapter[f"{site}/B"] for update in updates],
                [update.adapter[f"{site}/A"] for update in updates],
                weights,
            )
            # Into B: residuals are added to the weights as they are, without a scaling.
            changes[site] = (B * server.adapter.sites[site].scaling, A)
        return with_change(server.with_tensors(self.average(updates, self.uploads(server))), changes)
