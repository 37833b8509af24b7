"""LoRA-FA: A stays as it is drawn, and B steps by the gradient that brings B A nearest to the whole weight's step.

    g_B* = g_B (A A^T + d I)^-1 / s^2        (s of s B A)
    B by AdamW on g_B*; the head by AdamW

Zhang et al., arXiv 2308.03303, as in peft's optimizer of that name: s g_B* A is the gradient G of the whole weight,
projected on the rows of A.

In a federation a factor that stays is not to be sent, noised or clipped along with the other, so that is the strategy's
part: `ffa_lora` (or another that trains B alone) is required, and averaging is then exact. Against AdamW under
`ffa_lora` what this adds is the product with (A A^T)^-1, which takes away how A is drawn: nothing where rows of A are
orthonormal (`fedsvd`), as AdamW does not see a factor that is the same for all entries, and little where A is drawn
with far more columns than rows.

Deviations, from peft's code: d times the identity is added where peft adds d to every entry and takes a
pseudo-inverse; d has what rounding leaves of an eigenvalue added, as in `riemannian`; no bfloat16; weight decay before
the step, as elsewhere here, where peft has it after.

    >>> from fedpeft.config import ClientConfig
    >>> LoRAFA().has_state(ClientConfig())
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedpeft.clients.optimizers.adamw import AdamConfig
from fedpeft.clients.optimizers.base import ClientOptimizer, Layout
from fedpeft.clients.optimizers.stacked import Gram, Moving, Stacked, adam_direction
from fedpeft.config import ClientConfig, option


class LoRAFA(ClientOptimizer):
    """AdamW on B alone, its gradient freed of how A is drawn."""

    paper = "Zhang et al. 2023, arXiv 2308.03303"
    reads_fixed_A = True

    @dataclass
    class Config(AdamConfig):
        damping: float = option(1e-8, "d, added to the diagonal of A A^T", above=0)

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        config = self.config
        # Once a round: A stays, and so does its Gram matrix.
        grams = {
            name: Gram.of(layout.fixed[f"{site}/A"][None].to(weights[0]), config.damping)
            for name in layout.shapes
            for site, _, role in [name.rpartition("/")]
            if role == "B"
        }

        def move(tensors: dict[str, Moving], lr: float, step: int) -> None:
            for name, tensor in tensors.items():
                seen = tensor
                if name in grams:
                    free = grams[name].solve(tensor.gradient.mT).mT / layout.scales[name.rpartition("/")[0]] ** 2
                    seen = replace(tensor, gradient=free)
                tensor.value.mul_(1 - lr * client.weight_decay)
                tensor.value.sub_(lr * adam_direction(seen, step, config.beta1, config.beta2, config.eps))

        return Stacked(weights, client.lr, layout, ("exp_avg", "exp_avg_sq"), move)
