"""CoSO: every step moves in the leading directions of the present gradient, off the directions that earlier tasks used.

Continuous subspace optimization, arXiv 2505.11816. Per layer with gradient G [m, n], protected basis M [m, D], step t:

    G' = G - M M^T G
    every `refresh` steps:  U Sigma V^T = svd(G'),  P = U[:, :r1]
        Q = U[:, :r2] Sigma[:r2],   U' Sigma' = svd([decay S, Q]),   S <- U'[:, :r2] sqrt(max(Sigma'^2 - delta, 0))
    R = P^T G',   m <- .9 m + .1 R,   v <- .999 v + .001 R^2
    W <- W - lr P (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-6)
    end of the task:  U, sigma = svd(S),   M <- qr([M, U[:, :k]]),
        k = max(1, #{i: sum_{j<=i} sigma_j^2 <= eps_th sum_j sigma_j^2})

S is a frequent-directions sketch of all G' of the task, delta = Sigma'^2 of place r2+1 (`shrink: next`, the authors'
code) or r2 (`last`, the paper). Moments, P and S start at zero in every task, W trains at `train.lr`.

`side: out` is the published choice: G is dL/dW as it is, M lives in the output space, and a change is orthogonal to
first order to earlier gradients. `in` does the same to G^T: M lives in the input space, so that W x keeps its value for
the inputs of earlier tasks. On the embedded streams `in` forgets far less.

Deviations from the authors' code: directions with sigma_i <= 1e-6 sigma_1 are left out of P, and P is projected off M
once more (surplus columns of U are arbitrary and leak into the protected space); M is made orthonormal again after each
task (they concatenate); the 1e-6 of Adam is added to the corrected root of v, where they add it before the correction,
which makes it 32 times as large at the first step and 1.6 times at the 500th; Q is not shrunk before it is merged; at
least one direction is kept; M grows to at most `cap` of the space, and a layer above 90 % is reported; the learning
rate is constant. Signs of U are fixed, so that moments mean the same after a refresh, and `rotate_moments` turns them
into the new basis. Algebra in float64.

    >>> from fedpeft.continual.parts.subspace import merge_sketches
    >>> merge_sketches([torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [1.0]])]).square().round().tolist()
    [[3.0], [0.0]]
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.config import FEDERATION, LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, add_dense
from fedpeft.continual.parts.subspace import (
    extend_within,
    leading_directions,
    left_singular,
    project_out,
    root_of_gram,
    sketch,
)
from fedpeft.data.encode import Encoded

log = logging.getLogger("fedpeft")

BETA1, BETA2, EPS = 0.9, 0.999, 1e-6
FULL = 0.9  # share of protected directions above which a layer hardly learns


class CoSO(Body):
    """Projected Adam on full weights, with a growing protected subspace."""

    paper = "arXiv 2505.11816"
    needs = ("boundaries",)
    stays_central = ""

    @dataclass
    class Config:
        side: str = option(
            "out",
            "space of the protected directions: outputs of a layer (published), or its inputs",
            choices=("out", "in"),
        )
        r1: int = option(8, "directions that a step moves in", low=1, only=LEARNER)
        r2: int = option(16, "directions of the sketch", low=1)
        refresh: int = option(1, "K, steps between new directions", low=1, only=LEARNER)
        eps_th: float = option(0.98, "share of the sketch's energy that is protected after a task", above=0, high=1)
        basis: str = option(
            "sketch",
            "the task's subspace: from the clients' gradients, or drawn from the seed, which sends no sketch",
            choices=("sketch", "random"),
            only=FEDERATION,
        )
        shrink: str = option(
            "next",
            "singular value that the sketch shrinks by: place r2 + 1, or the last, r2",
            choices=("next", "last"),
            only=LEARNER,
        )
        decay: float = option(1.0, "the sketch is multiplied by it before each merge", above=0, high=1, only=LEARNER)
        sketch_every: int = option(
            0, "steps between gradients that enter the sketch; 0: at each refresh", low=0, only=LEARNER
        )
        rotate_moments: bool = option(False, "turn Adam's moments into the new directions at a refresh", only=LEARNER)
        svd: str = option(
            "gram",
            "how directions are found: eigenvectors of the smaller Gram matrix, a randomised or "
            "a full singular value decomposition",
            choices=("gram", "randomized", "full"),
            only=LEARNER,
        )
        cap: float = option(1.0, "largest share of directions that may be protected", above=0, high=1, only=LEARNER)
        deltas: str = option(
            "none",
            "each task's change of the weights is also kept: not, whole, or truncated",
            choices=("none", "dense", "svd"),
            only=LEARNER,
        )
        delta_rank: int = option(16, "rank of a truncated change; what it leaves out is reported", low=1, only=LEARNER)

    def begin_task(self) -> None:
        adapters = self.memory["adapters"]
        for layer in self.model.layers:
            # W and M go on over the tasks; sketch, directions and moments are of one task.
            W = self.parameters.setdefault(f"{layer}/W", make_leaf(torch.zeros(*self.model.base.shape(layer))))
            rows, columns = self._turn_side(W).shape
            self.memory["bases"].setdefault(f"{layer}/M", W.new_zeros(rows, 0))
            self.memory["statistics"][f"{layer}/S"] = W.new_zeros(rows, self.config.r2)
            adapters[f"{layer}/P"] = W.new_zeros(rows, self.config.r1)
            adapters[f"{layer}/m"] = W.new_zeros(self.config.r1, columns)
            adapters[f"{layer}/v"] = W.new_zeros(self.config.r1, columns)
            if self.config.deltas != "none":
                adapters[f"{layer}/start"] = W.detach().clone()
        self.memory["numbers"]["t"] = 0

    def change(self) -> Change:
        return {layer: add_dense(self.parameters[f"{layer}/W"]) for layer in self.model.layers}

    def restart_optimizer(self) -> None:
        """Adam's moments are in `memory`; `begin_task` sets them to zero."""

    @torch.no_grad()
    def step(self) -> None:
        for layer in self.model.layers:
            self._move(layer)
        self.memory["numbers"]["t"] += 1

    def _move(self, layer: str) -> None:
        config, t, adapters = self.config, self.memory["numbers"]["t"], self.memory["adapters"]
        W, M = self.parameters[f"{layer}/W"], self.memory["bases"][f"{layer}/M"]
        assert W.grad is not None
        # Before anything is made of it: neither directions nor sketch may see protected ones.
        G = project_out(self._turn_side(W.grad), M)
        refresh, feed = t % config.refresh == 0, t % (config.sketch_every or config.refresh) == 0
        if refresh or feed:
            draw = self.generator("svd", layer, self.index, t)
            # One decomposition for both, of as many directions as the larger needs.
            U, sigma = left_singular(G, max(config.r1, config.r2), config.svd, draw)
        if refresh:
            self._turn_directions(layer, project_out(U[:, : config.r1], M).to(W.dtype))
        if feed:
            key = f"{layer}/S"
            S, Q = self.memory["statistics"][key] * config.decay, U[:, : config.r2] * sigma[: config.r2]
            self.memory["statistics"][key], _ = sketch(S, Q, config.shrink)
        P, m, v = (adapters[f"{layer}/{role}"] for role in ("P", "m", "v"))
        R = P.T @ G
        m.mul_(BETA1).add_(R, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(R, R, value=1 - BETA2)
        N = (m / (1 - BETA1 ** (t + 1))) / ((v / (1 - BETA2 ** (t + 1))).sqrt() + EPS)
        W.sub_(self._turn_side(P @ N), alpha=self.train.lr)

    def _turn_directions(self, layer: str, P: Tensor) -> None:
        """New directions. A second moment turns as the diagonal of a covariance does, so it stays positive."""
        adapters = self.memory["adapters"]
        if self.config.rotate_moments:
            # What the old directions do not share with the new ones has no place in them, and is dropped.
            rotation = P.T @ adapters[f"{layer}/P"]
            adapters[f"{layer}/m"] = rotation @ adapters[f"{layer}/m"]
            adapters[f"{layer}/v"] = rotation**2 @ adapters[f"{layer}/v"]
        adapters[f"{layer}/P"] = P

    def statistics(self, data: Encoded) -> dict[str, Tensor]:
        """S S^T by layer: the sum over owners is that of all their gradients. `merge_sketches` sends less."""
        return {
            f"{layer}/C": (S := self.memory["statistics"][f"{layer}/S"].double()) @ S.T for layer in self.model.layers
        }

    def end_task(self, statistics: dict[str, Tensor]) -> None:
        for layer in self.model.layers:
            key = f"{layer}/M"
            U = leading_directions(root_of_gram(statistics[f"{layer}/C"], self.config.r2), self.config.eps_th)
            self.memory["bases"][key] = extend_within(self.memory["bases"][key], U, self.config.cap)
            self._keep_change(layer)
        for layer, share in self.saturation().items():
            if share > FULL:
                log.warning(
                    "coso: %.0f %% of the directions of %s are protected; it hardly learns any more. Lower "
                    "eps_th or r2, or set cap.",
                    100 * share,
                    layer,
                )

    def saturation(self) -> dict[str, float]:
        """D / m: the share of each layer's directions that are protected."""
        return {layer: (M := self.memory["bases"][f"{layer}/M"]).shape[1] / M.shape[0] for layer in self.model.layers}

    def stored(self) -> dict[str, int]:
        """Without sketch, directions and moments, which serve one task."""
        # Taken out for the count alone, and put back.
        whole = self.memory
        lasting = {key: value for key, value in whole["adapters"].items() if key.startswith("delta/")}
        self.memory = {**whole, "statistics": {}, "adapters": lasting}
        kept = super().stored()
        self.memory = whole
        return kept

    def _keep_change(self, layer: str) -> None:
        """The change that this task made, whole or as B A with the share that this leaves out."""
        if self.config.deltas == "none":
            return
        adapters, name = self.memory["adapters"], f"delta/{self.index}/{layer}"
        delta = self.parameters[f"{layer}/W"].detach() - adapters[f"{layer}/start"]
        if self.config.deltas == "dense":
            adapters[f"{name}/W"] = delta
            return
        U, sigma, Vt = torch.linalg.svd(delta.double(), full_matrices=False)
        rank = self.config.delta_rank
        adapters[f"{name}/B"] = (U[:, :rank] * sigma[:rank]).to(delta.dtype)
        adapters[f"{name}/A"] = Vt[:rank].to(delta.dtype)
        self.memory["numbers"][f"{name}/residual"] = float(sigma[rank:].norm() / sigma.norm().clamp(min=1e-300))

    def _turn_side(self, value: Tensor) -> Tensor:
        """[out, in] to [side, other] or back."""
        return value if self.config.side == "out" else value.T
