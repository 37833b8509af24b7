"""Running average: the merged change of the weights is the mean of all changes so far.

With tau_t = s B_t A_t, the continual form of weight averaging (the baseline of Tang et al., arXiv 2501.09522) is

    D_t = ((t - 1) D_{t-1} + tau_t) / t

The factors are stacked, [(1 - 1/t) B, (1/t) B_t] [A; A_t], and reduced to the rank of the product by thin QR and SVD:
exact, where a mean of B and a mean of A is not. The rank grows up to the sum of the ranks, or the width of the layer.

    >>> import torch
    >>> from fedpeft.merging.base import merge
    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> layers = {"q": AdaptedLayer("lora")}
    >>> def one(a, b): return AdapterState({"q/A": torch.tensor([a]), "q/B": torch.tensor([[b]])}, layers)
    >>> merged = merge("running_average", [one([1.0, 0.0], 2.0), one([0.0, 1.0], 4.0)])
    >>> (merged["q/B"] @ merged["q/A"]).tolist(), merged.rank("q")
    ([[1.0, 2.0]], 1)
"""

from __future__ import annotations

from fedpeft.merging.base import Merger, Numbers, State, Tensors, combine
from fedpeft.state import AdapterState


class RunningAverage(Merger):
    """The mean of the adapters' products, exact."""

    paper = "weight averaging over time; baseline of Tang et al. 2025, arXiv 2501.09522"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        share = self.share(state, number)
        return combine(state, adapter, 1 - share, share), {}
