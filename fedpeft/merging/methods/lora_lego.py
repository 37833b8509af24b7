"""LoRA-LEGO: cut adapters into units of rank one and cluster them. Zhao et al., ICLR 2025, arXiv 2409.16167.

Row a_i of A and column b_i of B only ever act together, b_i a_i: unit i is the vector [a_i, b_i]. The units of all
adapters go into one pool; k-means makes k clusters of it; the centroids are the units of the merged adapter of rank k,

    [a, b]_c = mean of the units of cluster c, times (mean of their norms) / (norm of that mean)

which undoes the loss of norm by averaging. `scale_output` also multiplies the product by sqrt(r / k), r the mean rank
of the adapters, against an output variance that grows with the rank. The order of ranks, and of adapters with one
scaling, makes no difference: the pool is sorted before k-means starts from its seed. With k = all units the result is
the sum of the adapters.

Deviations: the constants of both scales are not checked against the paper, which does not say how often k-means starts
either; here the best of 10 starts counts. `scale_output` is off unless asked for: with it, k = all units would not
return the sum. A unit and its negative, [-a, -b], are the same product but not the same vector; as in the paper,
nothing aligns them.

    >>> import torch
    >>> A, B = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 4.0, 9.0]])
    >>> B, A = centroids(B.double(), A.double(), torch.tensor([0, 0, 1]))
    >>> A.shape, bool((B[0, 0] / A[0, 0] - 3).abs() < 1e-12), B[0, 1].item()
    (torch.Size([2, 2]), True, 9.0)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.errors import InputError
from fedpeft.merging.base import Merger, Numbers, State, Tensors, append, pair, sites_of
from fedpeft.state import AdapterState

STARTS = 10  # k-means runs from so many starts; the best counts


@dataclass
class LoRALegoConfig:
    """Options of `lora_lego`: how many units of rank one the clustering leaves, and their scale."""

    k: int | None = option(None, "rank of the result; null is the largest rank of the adapters at each site", low=1)
    scale_output: bool = option(False, "multiply the product by sqrt(mean rank of the adapters / k)")
    seed: int = option(0, "of the k-means starts", low=0)


class LoRALego(Merger):
    """Units of rank one of all adapters, clustered; the centroids are the merged adapter."""

    Config: ClassVar[Any] = LoRALegoConfig
    paper = "Zhao et al. 2024, arXiv 2409.16167"

    def update(self, state: State, adapter: AdapterState, number: float | None) -> tuple[Tensors, Numbers]:
        before = state["numbers"].get("ranks", {})
        ranks = {site: max(before.get(site, 0), adapter.rank(site)) for site in adapter.lora_sites()}
        return append(state, adapter), {"ranks": ranks}

    def finish(self, state: State) -> Tensors:
        tensors, numbers = {}, state["numbers"]
        for site in sites_of(state):
            # k-means starts from rows by their numbers, and the order of adapters must not matter.
            B, A = _sort_units(*pair(state, site))
            units, k = A.shape[0], self.config.k or numbers["ranks"][site]
            if k > units:
                raise InputError(f"lora_lego: k={k}: {site} has only {units} units, the sum of the adapters' ranks.")
            B, A = centroids(B, A, self._cluster_units(torch.cat([A, B.T], dim=1), k, site))
            if self.config.scale_output:
                B = B * (units / numbers["count"] / k) ** 0.5
            tensors[f"{site}/B"], tensors[f"{site}/A"] = B, A
        return tensors

    def _cluster_units(self, units: Tensor, k: int, site: str) -> Tensor:
        """Cluster number of each unit, from 0 without gaps; equal units share a cluster, so there may be fewer than k.

        Where k is the number of units each has a cluster of its own, also equal ones: their sum is the product.
        """
        from sklearn.cluster import KMeans

        if k == len(units):
            return torch.arange(k)
        # scikit-learn takes no larger ones.
        seed = seeds.derive(self.config.seed, "lora_lego", site) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct units than clusters
            labels = KMeans(k, n_init=STARTS, random_state=seed).fit(units.numpy()).labels_
        clusters: Tensor = torch.unique(torch.from_numpy(labels).long(), return_inverse=True)[1]
        return clusters


def centroids(B: Tensor, A: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """B [m, k] and A [k, n] of the clusters' mean units, each with the mean norm of its members."""
    units = torch.cat([A, B.T], dim=1)
    members = torch.nn.functional.one_hot(clusters).to(units).T
    members = members / members.sum(1, keepdim=True)
    means, norms = members @ units, members @ units.norm(dim=1)
    length = means.norm(dim=1)
    means = means * torch.where(length > 0, norms / length.clamp(min=torch.finfo(length.dtype).tiny), 1.0)[:, None]
    return means[:, A.shape[1] :].T.contiguous(), means[:, : A.shape[1]].contiguous()


def _sort_units(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same units in lexicographic order."""
    keys = torch.cat([A, B.T], dim=1).tolist()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return B[:, order], A[order]
