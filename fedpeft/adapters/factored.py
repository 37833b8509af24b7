"""What adapters of ours have in common whose change of a weight is a product of low rank, dW = s B(theta) A(theta).

A method says in one file where its tensors start (`start`), which of them train (`averages`), how an input goes through
them (`product`), and which B and A that is (`fold`). The layer around the frozen weight, groups of samples with their
own parameters (`grouped.OwnLayer`), the tensors of the state and the plain LoRA that a run leaves come from here.

    site/ROLE           trained, or the same for all and sent, as a singular basis that other machines would turn
    site.NAME/frozen    drawn from the run's seed by every client; its hash is compared

s is LoRA's, alpha / r; adapter.alpha = adapter.r makes it 1. A start whose product is not zero (`moves`) is taken off
the base by a residual of the state, -s B_0 A_0: the untrained model is the base, and the folder has further ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedpeft import registry, seeds
from fedpeft.adapters.adapted import Injected
from fedpeft.adapters.grouped import OwnLayer, Values
from fedpeft.config import AdapterConfig, Configured
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.models.targets import resolve
from fedpeft.state import FROZEN, AdaptedLayer, AdapterState

Tensors = dict[str, Tensor]


class Factored(Configured):
    """A parameterisation of low rank.

    Attributes:
        averages: roles of what trains.
        drawn: names of what every client draws itself.
        moves: its start has a product, which is taken off the base.
    """

    averages: ClassVar[tuple[str, ...]] = ()
    drawn: ClassVar[tuple[str, ...]] = ()
    moves: ClassVar[bool] = False

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """The tensors of a layer before training, by role or name.

        Args:
            weight: the frozen one [out, in].
            scale: s.
            generator: of this layer's draws, on the CPU.
        """
        raise NotImplementedError

    @classmethod
    def fold(cls, own: Values, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B [..., out, k] and A [..., k, in] of the tensors of one layer [out, in], without s."""
        raise NotImplementedError

    @classmethod
    def product(cls, x: Tensor, own: Values, shape: tuple[int, int]) -> Tensor:
        """B A x, [..., n, out], of inputs [..., n, in]."""
        B, A = cls.fold(own, shape)
        return (x @ A.mT) @ B.mT

    def least(self, weight: Tensor) -> int:
        """The largest rank that a layer can have."""
        return min(weight.shape)

    @classmethod
    def moving_start(cls, options: dict[str, Any]) -> str | None:
        """What makes a start that moves the base weights; None where they stay."""
        return f"adapter.name={cls.kind()}" if cls.moves else None

    @classmethod
    def kind(cls) -> str:
        """The name that it is registered under: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def notes(cls) -> list[str]:
        """What `fedpeft show` says of its averages."""
        from fedpeft.adapters.averages import describe_own

        return describe_own(cls.kind())

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        """Put a layer around each target."""
        from fedpeft.adapters.averages import warn_of_error

        kind = self.kind()
        warn_of_error(config)
        scale = config.alpha / (config.r**0.5 if config.rslora else config.r)
        parameters, sites, fixed = dict[str, nn.Parameter](), dict[str, AdaptedLayer](), Tensors()
        base.backbone.requires_grad_(False)
        for site in resolve(base, config.target_modules):
            weight = base.values(site).float()
            if config.r > self.least(weight):
                raise InputError(
                    f"adapter.r={config.r}: {site} is {weight.shape[0]} x {weight.shape[1]}, and adapter.name={kind} "
                    f"has at most rank {self.least(weight)} there. Lower adapter.r, or leave the layer out of "
                    "adapter.target_modules."
                )
            tensors = self.start(weight, config.r, scale, seeds.torch_generator(seed, kind, site))
            shape = (weight.shape[0], weight.shape[1])
            layer = FactoredLayer(base.layer(site), type(self), tensors, shape, scale, config.dropout)
            parent, _, name = site.rpartition(".")
            setattr(base.backbone.get_submodule(parent), name, layer)
            parameters |= {f"{site}/{role}": value for role, value in layer.named_parameters(recurse=False)}
            fixed |= {f"{site}.{name}/{FROZEN}": tensors[name] for name in self.drawn if name in tensors}
            sites[site] = AdaptedLayer(kind, shape, scale)
            if self.moves:
                # A start of zero needs no residual: its ranks would be in every folder.
                B, A = self.fold({role: value.double() for role, value in tensors.items()}, shape)
                residual = {f"{site}/residual_B": (-scale * B).float(), f"{site}/residual_A": A.float().contiguous()}
                fixed |= residual if bool(B.any()) else {}
        return Injected(parameters, sites, fixed)


class FactoredLayer(OwnLayer):
    """W x + s B A x, as the method computes it."""

    def __init__(
        self,
        base_layer: nn.Module,
        method: type[Factored],
        tensors: Tensors,
        shape: tuple[int, int],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(base_layer)
        self.method, self.shape, self.scale = method, shape, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for name, value in tensors.items():
            if name in method.drawn:
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=name in method.averages))

    def act(self, x: Tensor, own: Values) -> Tensor:
        """Outputs [..., n, out] of inputs [..., n, in]."""
        y: Tensor = self.base_layer(x)
        own = {**dict(self.named_buffers(recurse=False)), **own}
        # Factors may be more precise than the base.
        x = self.dropout(x.to(next(value.dtype for value in own.values() if value.is_floating_point())))
        return (y + self.scale * self.method.product(x, own, self.shape)).to(y.dtype)


def find_method(kind: str) -> type[Factored] | None:
    """The method of a kind of layer, where it is one of these."""
    cls = registry.load("adapters", kind) if kind in registry.names("adapters") else None
    return cls if isinstance(cls, type) and issubclass(cls, Factored) else None


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
