"""CoSO's two projections in factor space, for one learner: each task's LoRA is orthogonal to those of earlier tasks.

The central form of `fedpeft.strategies.sequence.factor_coso`, where the derivation is. With dW = s B A, A frozen:

    in    A with orthonormal rows, orthogonal to the rows of all earlier A          => dW N = 0
    out   B's gradient and B itself pass through I - M M^T, M spans earlier B       => M^T dW = 0

B is projected after every step too, because Adam does not keep a gradient's subspace. Earlier tasks' products stay as
frozen factors; capacity floor(n / r) tasks for `in`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpeft.config import LEARNER, option
from fedpeft.continual.body import Body, make_leaf
from fedpeft.continual.model import Change, low_rank, sum_changes
from fedpeft.continual.parts.orthogonal import draw_outside, extend_basis
from fedpeft.continual.parts.subspace import leading_directions, project_out


class FactorCoSO(Body):
    """A LoRA per task with frozen A, orthogonal to what earlier tasks use."""

    paper = "Cheng et al. 2025, arXiv 2505.11816; factor form derived here"
    needs = ("boundaries",)
    stays_central = ""

    @dataclass
    class Config:
        side: str = option(
            "out", "what is protected: inputs, output directions, or both", choices=("in", "out", "both")
        )
        r: int = option(4, "rank of a task's LoRA; else adapter.r", low=1, only=LEARNER)
        alpha: float = option(4.0, "scale: alpha / r; else adapter.alpha", above=0, only=LEARNER)
        energy: float = option(0.98, "side out: share of B's squared singular values to protect", above=0, high=1)

    def begin_task(self) -> None:
        inputs, outputs = self.config.side != "out", self.config.side != "in"
        bases, adapters = self.memory["bases"], self.memory["adapters"]
        for layer in self.model.layers:
            m, n = self.model.base.shape(layer)
            # The frozen A lies under its own name, so the finished pair is put by here and not in `parts.lora`.
            if self.index > 0:
                A, B = adapters.pop(f"now/{layer}/A"), self.parameters[f"{layer}/B"].detach().clone()
                adapters[f"past/{self.index - 1}/{layer}/A"], adapters[f"past/{self.index - 1}/{layer}/B"] = A, B
                if inputs:
                    bases[f"{layer}/N"] = extend_basis(bases.get(f"{layer}/N"), A.T)
                if outputs:
                    bases[f"{layer}/M"] = extend_basis(
                        bases.get(f"{layer}/M"), leading_directions(B.double(), self.config.energy)
                    )
            rows = draw_outside(bases.get(f"{layer}/N"), n, self.config.r, self.seed, layer, self.index)
            adapters[f"now/{layer}/A"] = rows.T.float().contiguous()
            self.parameters[f"{layer}/B"] = make_leaf(torch.zeros(m, self.config.r))

    def change(self) -> Change:
        scale, adapters = self.config.alpha / self.config.r, self.memory["adapters"]
        if not self.parameters:
            return {}
        past = [
            {
                layer: low_rank(adapters[f"past/{task}/{layer}/B"], adapters[f"past/{task}/{layer}/A"], scale)
                for layer in self.model.layers
            }
            for task in range(self.index)
        ]
        now = {
            layer: low_rank(self.parameters[f"{layer}/B"], adapters[f"now/{layer}/A"], scale)
            for layer in self.model.layers
        }
        return sum_changes(*past, now)

    def after_backward(self) -> None:
        for layer in self.model.layers:
            M, B = self.memory["bases"].get(f"{layer}/M"), self.parameters[f"{layer}/B"]
            if M is not None and B.grad is not None:
                B.grad = project_out(B.grad.double(), M).to(B.grad)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for layer in self.model.layers:
            M, B = self.memory["bases"].get(f"{layer}/M"), self.parameters[f"{layer}/B"]
            if M is not None:
                B.copy_(project_out(B.double(), M).to(B))
