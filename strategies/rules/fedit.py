"""FedIT: average both LoRA factors. Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round

The product of means is not the mean of products; it misses R = sum_k p_k (B_k - B)(A_k - A), second order in client
drift. Factors carry over from round to round and are never reset.

Deviations: the FedIT branch of the public FLoRA repository drops all clients but the first; this is the paper's rule.
"""

from __future__ import annotations

from fedpeft.state import Needs
from fedpeft.strategies.base import FederatedStrategy


class FedIT(FederatedStrategy):
    """FedAvg on A and B."""

    paper = "Zhang et al. 2023, arXiv 2305.05644"
    needs = Needs.SUM
    takes_fixed_factor = True
    takes_any_adapter = True
    trains = ("A", "B", "head")
