"""LoRA-SB: a trained r x r core between frozen factors, s B R A. Ponkshe et al., arXiv 2411.19557; adapter of Fed-SB.

    W x + s B R A x,   B [out, r] and A [r, in] frozen with orthonormal columns and rows,   R [r, r] trained, R_0 = 0

`init: weights` takes B and A as the top-r singular vectors of the frozen weight, `init: random` as orthonormal bases of
random draws. Both are functions of public things (weight, seed), so that every client makes the same ones.

Deviations: the paper starts from the singular vectors and values of a first full fine-tuning step on the training data.
That reads private data before any privacy budget is spent, so it is not offered; R_0 = 0 starts from the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.adapted import Injected
from fedpeft.config import AdapterConfig, option
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.models.targets import lora_layers
from fedpeft.state import AdaptedLayer


class LoraSB:
    """An r x r core between frozen factors."""

    paper = "Ponkshe et al. 2024, arXiv 2411.19557"

    @dataclass
    class Config:
        init: str = option(
            "weights",
            "frozen factors: singular vectors of the frozen weight, or random orthonormal",
            choices=("weights", "random"),
        )

    def __init__(self, init: str = "weights") -> None:
        self.init = init

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        parameters: dict[str, nn.Parameter] = {}
        sites: dict[str, AdaptedLayer] = {}
        for site, layer in lora_layers(base, config).items():
            weight = base.values(site)
            if config.r > min(weight.shape):
                raise InputError(
                    f"adapter.r={config.r}: {site} is {weight.shape[0]} x {weight.shape[1]}, and frozen orthonormal "
                    f"factors have at most rank {min(weight.shape)}. Lower adapter.r, or leave the site out of "
                    "adapter.target_modules."
                )
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            core = nn.Linear(config.r, config.r, bias=False)
            nn.init.zeros_(core.weight)
            B, A = self.factors(weight, config.r, seeds.torch_generator(seed, "lora_sb", site))
            down.weight.data, up.weight.data = A, B
            # Inside peft's layer, which calls lora_B(lora_A(x)): the core needs no forward of its own.
            layer.lora_B["default"] = nn.Sequential(core, up)
            parameters |= {f"{site}/A": down.weight, f"{site}/B": up.weight, f"{site}/R": core.get_parameter("weight")}
            sites[site] = AdaptedLayer("lora_sb", (B.shape[0], A.shape[1]), float(layer.scaling["default"]))
        return Injected(parameters, sites)

    def factors(self, weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """B [out, r] with orthonormal columns and A [r, in] with orthonormal rows, of a weight's shape; signs fixed."""
        out, width = weight.shape
        if self.init == "random":
            B = torch.linalg.qr(torch.randn(out, r, generator=generator, dtype=torch.float64)).Q
            A = torch.linalg.qr(torch.randn(width, r, generator=generator, dtype=torch.float64)).Q.T
        else:
            U, _, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
            # Every client makes these itself, so they may not hang on signs that LAPACK is free to choose.
            sign = torch.where(Vt[torch.arange(r), Vt[:r].abs().argmax(1)] < 0, -1.0, 1.0).double()
            B, A = U[:, :r] * sign, Vt[:r] * sign[:, None]
        return B.float().contiguous(), A.float().contiguous()
