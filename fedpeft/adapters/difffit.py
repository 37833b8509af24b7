"""DiffFit: biases, what norms scale and shift by, and a factor on what each block adds. Xie et al. 2023, arXiv
2304.06648; biases alone are BitFit's, Ben Zaken et al. 2021, arXiv 2106.10199.

    linear layer with a bias            y' = y + d
    last linear layer of a block        y' = (1 + g) y + d,   g [1]; d only where it has a bias
    norm                                y' = (1 + g) * y + d, g [out]; d only where it has a bias

g and d begin at zero: the untrained model is the base. A change of a layer's output is linear in them: an average of
clients' adapters is exact. A block is attention or feed-forward network, and its last layer the one in front of what it
is added to, where `bottleneck` stands. By default all such layers and norms of the model are adapted, the head's
excepted; `adapter.target_modules` names some of them.

Where positions do not turn them, a bias of keys is one number for all scores of a softmax: it has no gradient, and
whatever noise makes of it changes no answer.

What trains has no rank: `adapter.r`, `alpha`, `rslora` and `dropout` do nothing here. `fedpeft export --merge` writes
all of it into norms, weights and biases.

Deviations: the paper's factors begin at 1 and its norms train their own weight w, where here both are what is added to
1: w' = (1 + g) w has the slopes of w, times w, and weight decay pulls to the base. The paper adapts diffusion
transformers and has factors in some of their blocks, here all blocks have one.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor

from fedpeft.adapters.bottleneck import Bottleneck
from fedpeft.adapters.grouped import Values
from fedpeft.adapters.placed import Placed, PlacedLayer, Tensors
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.models.targets import find_norms, linear_layers, resolve


class DiffFit(Placed):
    """Biases, norms and a factor on what each block adds train."""

    paper = "Xie et al. 2023, arXiv 2304.06648"
    averages = ("g", "d")
    places = Bottleneck.places

    def find_sites(self, base: Base, wanted: list[str] | None) -> list[str]:
        """Norms, layers that end a block, and layers with a bias; of these, those whose names end so."""
        biased = [name for name, layer in linear_layers(base).items() if has_bias(layer)]
        every = sorted({*biased, *resolve(base, None, self.places), *find_norms(base)})
        chosen = set[str]()
        for ending in wanted or []:
            found = [name for name in every if f".{name}".endswith(f".{ending}")]
            if not found:
                raise InputError(
                    f"adapter.target_modules: no norm, layer with a bias or end of a block ends in '{ending}'. There "
                    f"are: {', '.join(sorted({name.rpartition('.')[2] for name in every}))}."
                )
            chosen |= {*found}
        return every if wanted is None else sorted(chosen)

    def start_at(self, base: Base, site: str, r: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros, for what the layer has."""
        weight, tensors = base.values(site), Tensors()
        if weight.ndim == 1:
            tensors["g"] = torch.zeros(len(weight))
        elif any(f".{site}".endswith(f".{ending}") for group in self.places for ending in group):
            tensors["g"] = torch.zeros(1)
        return {**tensors, "d": torch.zeros(len(weight))} if has_bias(base.layer(site)) else tensors

    def least(self, weight: Tensor) -> int:
        """Any: nothing here has a rank."""
        return sys.maxsize

    def act(self, layer: PlacedLayer, x: Tensor, own: Values) -> Tensor:
        """The layer's outputs, scaled and shifted."""
        y: Tensor = layer.base_layer(x)
        moved = y * (1 + own["g"].unsqueeze(-2)) if "g" in own else y
        return (moved + own["d"].unsqueeze(-2) if "d" in own else moved).to(y.dtype)

    def merge(self, layer: PlacedLayer) -> None:
        """Likewise; of a norm, scale its weight and bias, and shift that.

        Raises:
            InputError: the norm does not multiply by its weight, but by 1 and its weight.
        """
        frozen, own = layer.base_layer, dict(layer.named_parameters(recurse=False))
        if frozen.get_parameter("weight").ndim > 1:
            return super().merge(layer)
        # Any input will do that is not the same everywhere: a norm makes nothing of a constant.
        x = torch.arange(layer.shape[1], dtype=torch.float64).sin()
        exact = copy.deepcopy(layer).double()
        wanted = exact(x)
        for value in (frozen, exact.base_layer):
            value.get_parameter("weight").data.mul_(1 + own["g"].data)
            if "d" in own:
                value.get_parameter("bias").data.mul_(1 + own["g"].data).add_(own["d"].data)
        if not torch.allclose(exact.base_layer(x), wanted, atol=1e-6):
            raise InputError(
                f"adapter.name=difffit: {type(frozen).__name__} is more than its weight times a norm, so that it "
                "cannot be merged. Leave --merge out."
            )

    def usage(self, scale: float) -> list[str]:
        """The scale and the shift as a forward hook."""
        return ["def adapt(layer, args, y, own):", '    return y * (1 + own.get("g", 0)) + own.get("d", 0)']


def has_bias(layer: torch.nn.Module) -> bool:
    """Whether a layer adds one."""
    return getattr(layer, "bias", None) is not None
