"""FedProx: a proximal term keeps clients near what they were sent. Li et al., MLSys 2020, arXiv 1812.06127.

    local loss + (mu / 2) ||theta - theta_global||^2   over the trained tensors

The aggregation is that of the strategy inside.

The term is not invariant to the gauge of the factors: (B Q, Q^-1 A) is the same function with another penalty.

Deviations: none. Clients add mu (theta - theta_global) to the gradient, which is the term's.

    >>> from fedpeft.strategies.wrappers.fedprox import FedProx
    >>> FedProx(mu=0.1).config.mu
    0.1
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import option
from fedpeft.strategies.client import ClientHalf, Visit
from fedpeft.strategies.wrappers.wrapper import Wrapper


class FedProxClient(ClientHalf):
    """Adds the proximal term."""

    alone = False
    strategy: FedProx

    def proximal(self, visit: Visit) -> float:
        return float(self.strategy.config.mu)


class FedProx(Wrapper):
    """A proximal term in the clients' loss."""

    paper = "Li et al. 2018, arXiv 1812.06127"
    client_half = FedProxClient

    @dataclass
    class Config:
        mu: float = option(0.01, "weight of the proximal term", low=0)
