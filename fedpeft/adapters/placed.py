"""What adapters of ours have in common: a layer of ours around each frozen layer, with parameters that start the same
for all.

A method says in one file where its tensors start (`start`), which of them train (`averages`) and what the layer
computes (`act`). Putting it into a model, the tensors of the state and groups of samples with their own parameters
(`grouped.OwnLayer`) come from here.

    site/ROLE           trained, or the same for all and sent, as a singular basis that other machines would turn
    site.NAME/frozen    drawn from the run's seed by every client; its hash is compared

Where the change of a weight is a product of low rank, a run leaves a plain LoRA (`factored`); of all others the tensors
as they are, with the section of the config that they were trained by (`placed_folder`).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedpeft import registry, seeds
from fedpeft.adapters.adapted import Injected
from fedpeft.adapters.grouped import OwnLayer, Values
from fedpeft.config import AdapterConfig, Configured
from fedpeft.errors import InputError
from fedpeft.models.base import Base, orient
from fedpeft.models.targets import ATTENTION, resolve
from fedpeft.state import FROZEN, AdaptedLayer

Tensors = dict[str, Tensor]
OWN = "FEDPEFT_"  # before the peft_type of folders that stock peft has no tuner for


class Placed(Configured):
    """A parameterisation of layers.

    Attributes:
        averages: roles of what trains and is averaged.
        keeps: roles of what trains and stays with each client.
        drawn: names of what every client draws itself.
        places: where adapter.target_modules is null, endings of layers' names; the first of which a model has all.
        leaves: what a run leaves, in words.
        affine: a layer of it computes W' x + b', so that it can be merged.
    """

    averages: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ()
    drawn: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[tuple[str, ...], ...]] = ATTENTION
    leaves: ClassVar[str] = "leaves a folder of its own, which `fedpeft predict` opens and stock peft does not"
    affine: ClassVar[bool] = True

    def start(self, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """The tensors of a layer before training, by role or name.

        Args:
            weight: the frozen one [out, in].
            scale: s = alpha / r.
            generator: of this layer's draws, on the CPU.
        """
        raise NotImplementedError

    def start_at(self, base: Base, site: str, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Likewise, of a layer of the base: for whoever needs more of it than its weight."""
        return self.start(base.values(site).float(), r, scale, generator)

    def find_sites(self, base: Base, wanted: list[str] | None) -> list[str]:
        """Full names of the layers to adapt, sorted.

        Args:
            wanted: `adapter.target_modules`.
        """
        return resolve(base, wanted, self.places)

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """Outputs [..., n, out] of inputs [..., n, in], with the layer's tensors in `own`."""
        raise NotImplementedError

    def least(self, weight: Tensor) -> int:
        """The largest rank that a layer can have."""
        return min(weight.shape)

    def residual(self, tensors: Tensors, shape: tuple[int, int], scale: float) -> Tensors:
        """What the start has and the base shall lack, as factors by role; empty where it has nothing."""
        return {}

    def merge(self, layer: PlacedLayer) -> None:
        """Write W' and b' into the layer's frozen one, as they are found of what an affine layer computes."""
        # An affine map is what it makes of zero and of the unit vectors; in evaluation mode, or dropout would be
        # merged.
        frozen, exact = layer.base_layer, copy.deepcopy(layer).double().eval()
        one = torch.eye(layer.shape[1], dtype=torch.float64)
        at_zero, at_one = exact(0 * one[:1]), exact(one)
        orient(frozen, frozen.get_parameter("weight").data).copy_((at_one - at_zero).T)
        if getattr(frozen, "bias", None) is not None:
            frozen.get_parameter("bias").data.copy_(at_zero[0])

    def usage(self, scale: float) -> list[str] | None:
        """Lines of Python for whoever has no fedpeft: a forward hook `adapt(layer, args, y, own)` that computes with a
        layer's tensors; None where the folder is a plain LoRA.
        """
        raise NotImplementedError

    @classmethod
    def moving_start(cls, options: dict[str, Any]) -> str | None:
        """What makes a start that moves the base weights; None where they stay."""
        return None

    @classmethod
    def kind(cls) -> str:
        """The name that it is registered under: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def notes(cls) -> list[str]:
        """What `fedpeft show` says of it beside what was measured."""
        return [cls.leaves]

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        """Put a layer around each target."""
        from fedpeft.adapters.averages import warn_of_error

        kind = self.kind()
        warn_of_error(config)
        scale = find_scale(config)
        parameters, sites, fixed = dict[str, nn.Parameter](), dict[str, AdaptedLayer](), Tensors()
        base.backbone.requires_grad_(False)
        for site in self.find_sites(base, config.target_modules):
            weight = base.values(site).float()
            if config.r > self.least(weight):
                raise InputError(
                    f"adapter.r={config.r}: {site} is {weight.shape[0]} x {weight.shape[1]}, and adapter.name={kind} "
                    f"has at most rank {self.least(weight)} there. Lower adapter.r, or leave the layer out of "
                    "adapter.target_modules."
                )
            tensors = self.start_at(base, site, config.r, scale, seeds.torch_generator(seed, kind, site))
            shape = (weight.shape[0], weight.shape[-1])  # a norm has as many inputs as outputs
            layer = PlacedLayer(base.layer(site), self, tensors, shape, scale, config.dropout)
            parent, _, name = site.rpartition(".")
            setattr(base.backbone.get_submodule(parent), name, layer)
            parameters |= {f"{site}/{role}": value for role, value in layer.named_parameters(recurse=False)}
            fixed |= {f"{site}.{name}/{FROZEN}": tensors[name] for name in self.drawn if name in tensors}
            sites[site] = AdaptedLayer(kind, shape, scale)
            fixed |= {f"{site}/{role}": value for role, value in self.residual(tensors, shape, scale).items()}
        return Injected(parameters, sites, fixed, self._describe(config, sorted(sites), scale))

    def _describe(self, config: AdapterConfig, sites: list[str], scale: float) -> dict[str, Any] | None:
        """adapter_config.json; None is a plain LoRA's."""
        if self.usage(scale) is None:
            return None
        section = {"name": self.kind(), "r": config.r, "alpha": config.alpha, "rslora": config.rslora}
        section |= {**vars(self.config), "target_modules": sites}
        return {"peft_type": f"{OWN}{self.kind().upper()}", "adapter": section}


class PlacedLayer(OwnLayer):
    """A frozen layer as the method has it compute.

    Attributes:
        scale: s = alpha / r.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        method: Placed,
        tensors: Tensors,
        shape: tuple[int, int],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(base_layer)
        self.method, self.shape, self.scale = method, shape, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        trains = (*method.averages, *method.keeps)
        for name, value in tensors.items():
            if name in method.drawn:
                # In no state_dict: whoever loads the model draws it anew.
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=name in trains))

    def act(self, x: Tensor, own: Values) -> Tensor:
        """Outputs [..., n, out] of inputs [..., n, in]."""
        return self.method.act(self, x, {**dict(self.named_buffers(recurse=False)), **own})

    def prepare(self, x: Tensor, own: Values) -> Tensor:
        """An input with dropout, in the dtype of the layer's tensors: they may be more precise than the base."""
        dtype = next(value.dtype for value in own.values() if value.is_floating_point())
        dropped: Tensor = self.dropout(x.to(dtype))
        return dropped


def find_scale(config: AdapterConfig) -> float:
    """s."""
    return config.alpha / (config.r**0.5 if config.rslora else config.r)


def find_placed(kind: str) -> type[Placed] | None:
    """The method of a kind of layer, where it is one of ours."""
    cls = registry.load("adapters", kind) if kind in registry.names("adapters") else None
    return cls if isinstance(cls, type) and issubclass(cls, Placed) else None
