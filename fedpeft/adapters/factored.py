"""Adapters of ours whose change of a weight is a product of low rank, dW = s B(theta) A(theta).

A method says in one file where its tensors start (`start`), which of them train (`averages`), how an input goes through
them (`product`), and which B and A that is (`fold`). The layer around the frozen weight and the tensors of the state
come from `placed`, the plain LoRA that a run leaves from here.

s is LoRA's, alpha / r; adapter.alpha = adapter.r makes it 1. A start whose product is not zero (`moves`) is taken off
the base by a residual of the state, -s B_0 A_0: the untrained model is the base, and the folder has further ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.adapters.grouped import Values
from fedpeft.adapters.placed import Placed, PlacedLayer, find_placed
from fedpeft.adapters.placed import Tensors as Tensors
from fedpeft.state import FROZEN, AdapterState


class Factored(Placed):
    """A parameterisation of low rank.

    Attributes:
        moves: its start has a product, which is taken off the base.
    """

    moves: ClassVar[bool] = False
    leaves: ClassVar[str] = "leaves a plain LoRA"

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B [..., out, k] and A [..., k, in] of the tensors of one layer [out, in], without s."""
        raise NotImplementedError

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """B A x, [..., n, out], of inputs [..., n, in]."""
        B, A = cls.fold(own, shape)
        return (x @ A.mT) @ B.mT

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """W x + s B A x, as the method computes it."""
        y: Tensor = layer.base_layer(x)
        return (y + layer.scale * self.product(layer.prepare(x, own), own, layer.shape)).to(y.dtype)

    @classmethod
    def moving_start(cls, options: dict[str, Any]) -> str | None:
        """What makes a start that moves the base weights; None where they stay."""
        return f"adapter.name={cls.kind()}" if cls.moves else None

    def residual(self, tensors: Tensors, shape: tuple[int, int], scale: float) -> Tensors:
        """-s B_0 and A_0; nothing of a start of zero, whose ranks would be in every folder."""
        if not self.moves:
            return {}
        B, A = self.fold({role: value.double() for role, value in tensors.items()}, shape)
        residual = {"residual_B": (-scale * B).float(), "residual_A": A.float().contiguous()}
        return residual if bool(B.any()) else {}

    def usage(self, scale: float) -> list[str] | None:
        """None: stock peft loads the folder."""
        return None


def find_method(kind: str) -> type[Factored] | None:
    """The method of a kind of layer, where it is one of these."""
    cls = find_placed(kind)
    return cls if cls is not None and issubclass(cls, Factored) else None


def tensors_at(adapter: AdapterState, site: str) -> Tensors:
    """The tensors of one layer, by role or name."""
    found = {}
    for key, value in adapter.tensors.items():
        place, _, role = key.rpartition("/")
        if place == site and not role.startswith("residual"):
            found[role] = value
        elif role == FROZEN and place.rpartition(".")[0] == site:
            found[place.rpartition(".")[2]] = value
    return found


def singular_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and V [k, in] of a weight in float32, k = min(out, in); the largest entry of each row of V is
    positive.
    """
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    sign = torch.where(V[torch.arange(len(V)), V.abs().argmax(1)] < 0, -1.0, 1.0).double()
    return (U * sign).float(), S.float(), (V * sign[:, None]).float()


def draw_kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """As peft draws A: uniform within 1 / sqrt(columns)."""
    bound: float = columns**-0.5
    return bound * (2 * torch.rand(rows, columns, generator=generator) - 1)
