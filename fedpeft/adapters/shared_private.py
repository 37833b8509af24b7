"""Two LoRAs in each layer: one that all clients share and one that stays with each. After MTLoRA, arXiv 2403.20320.

    y = W x + s (B A + Q P) x,    A, B averaged,    P, Q kept on the client's disk;    B_0 = Q_0 = 0

Both have rank adapter.r. MTLoRA has a LoRA for all tasks beside one for each task; here a client is a task. A round
begins at the average of A and B and at the client's own P and Q. What is sent is half of what trains.

There is no single global model: each client's is evaluated on its own held-out records (`data.holdout`), and has a
folder of its own in the run, a plain LoRA of rank 2 r. The run's own folder has Q = 0, where a new client begins. Under
DP-SGD both parts are trained on noised gradients.

Deviations: MTLoRA adapts a Swin transformer and has the tasks' parts in a few of its layers only; here they are in
every adapted layer. The head is shared, as it is with all adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.adapters.factored import Factored, Tensors, draw_kaiming
from fedpeft.adapters.grouped import Values


class SharedPrivate(Factored):
    """A LoRA that is averaged, and one that stays with each client."""

    paper = "after Agiza et al. 2024, arXiv 2403.20320"
    averages = ("A", "B")
    keeps = ("P", "Q")

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """A and P Kaiming-uniform, B and Q zero."""
        out, width = weight.shape
        A, P = draw_kaiming(r, width, generator), draw_kaiming(r, width, generator)
        return {"A": A, "B": torch.zeros(out, r), "P": P, "Q": torch.zeros(out, r)}

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """[B, Q] and [A; P]."""
        return torch.cat([own["B"], own["Q"]], dim=-1), torch.cat([own["A"], own["P"]], dim=-2)

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """Each LoRA alone: of one that does not train, all groups have the same."""
        return (x @ own["A"].mT) @ own["B"].mT + (x @ own["P"].mT) @ own["Q"].mT
