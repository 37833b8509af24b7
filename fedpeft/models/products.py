"""Products of a frozen float32 base by oneDNN, on processors of AMD with AVX-512.

    y = x W^T + b,   dL/dx = dL/dy W

torch multiplies float32 by MKL, which takes AVX2 on AMD's processors, whatever they have: of 235 GFLOP/s that one core
of an EPYC reaches by oneDNN, which torch has for bfloat16 and convolutions, MKL reaches 100. What the processor is
decides, and never a clock, so that two runs on a machine are the same. Products of small layers or few rows stay
torch's: calling oneDNN costs 15 us.

oneDNN keeps compiled code, 0.5 MB, for every number of rows that it has seen. So rows are filled up with zeros to one
of few numbers; a multiple of 128, as most often comes of records of one length, is left as it is.

    >>> model = nn.Linear(256, 256).requires_grad_(False)
    >>> hasten_products(model)
    >>> bool((model(torch.ones(128, 256)) - model(torch.ones(1, 256))).abs().max() < 1e-5)
    True
"""

from __future__ import annotations

import platform
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST = 2**23  # multiplications of a product
NARROWEST = 64  # of a weight's two sides
ROWS = 128  # of a product at least, and what their number is a multiple of
SHARE = 8  # of rows that may be filled up: one in so many, where there are thousands


@cache
def gains_by_onednn() -> bool:
    """Whether this processor is one of those, and torch has oneDNN's product."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    about = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (about.read_text() if about.is_file() else platform.processor())


def hasten_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by `multiply` while they are frozen, where this processor gains by it.

    Modules and weights stay what they are; what is trained later multiplies as torch does.
    """
    for module in model.modules() if gains_by_onednn() else ():
        # Exact types: a subclass may multiply otherwise.
        if type(module) is nn.Linear and min(module.weight.shape) >= NARROWEST:
            vars(module)["forward"] = partial(_multiply_frozen, module)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., in] and a frozen W [out, in], the fastest way that this processor has.

    Differentiable in x alone.
    """
    if gains_by_onednn() and _fits(x, weight):
        product: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return functional.linear(x, weight, bias)


def _multiply_frozen(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return functional.linear(x, weight, bias)
    return multiply(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= ROWS and min(weight.shape) >= NARROWEST and rows * weight.numel() >= LEAST


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        rows = x.numel() // x.shape[-1]
        missing = -rows % max(ROWS, 2 ** (rows.bit_length() - 1) // SHARE)
        flat = functional.pad(x.reshape(rows, -1), (0, 0, 0, missing)) if missing else x.reshape(rows, -1)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
        return product[:rows].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # By itself, so that it has a slope too.
        return _Product.apply(slopes[0], weight.T, None), None, None  # type: ignore[no-untyped-call]
