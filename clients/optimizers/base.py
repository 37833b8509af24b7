"""What a client's optimizer is: `client.optimizer` names it, and a client makes a new one every round; its state begins
anew, or with `client.keep_optimizer` goes on from what the client kept on its disk (`write_state`, `read_state`).

A new one is a file here and a line in `fedpeft.registry`: a subclass of `ClientOptimizer` with its options in `Config`
(they stand under `client.optimizer_options`) and a `make` that gives a `torch.optim.Optimizer`.

What `make` gets trains in one of two forms, and the optimizer must do the same in both:

    alone    the model's parameters, one for each name of the layout, in its order
    cohort   one matrix [K, P], a row for each of K clients: the values of the same names, flattened, in the same order

Rows never meet: what a client does may not depend on who trains beside it, and rows leave in mid-round (the matrix and
all state with K rows are then cut to the first rows, as views). So state is changed in place, is named after what it is
(`exp_avg`), has the form of the weights, and is zero for a client that has none; `step`, a count without rows, is the
same for all rows. An elementwise rule of torch is right as it is. A rule that sees a tensor as a matrix, or that treats
some roles unlike others, is a `Stacked`: it steps on [K, ...] views of each named tensor, in both forms, by products
that are batched over the clients.

Weights are what the next gradient is taken at. An optimizer that sends something else (an average of where it has been)
is a `Settling`, and puts that there when the round is over (`settle`).

The rate of a step is set from outside (`set_rate`). Gradients come with all that is added to them. Under DP-SGD they
are noised before an optimizer sees them, so what one computes or keeps of them costs no privacy; it sees no record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fedpeft import config as configs
from fedpeft.config import ClientConfig, Configured
from fedpeft.errors import InputError

Tensors = dict[str, Tensor]
STEP = "step"

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import Adapted


@dataclass(frozen=True)
class Layout:
    """The tensors that train, in their order.

    Attributes:
        shapes: by name, `site/role`.
        scales: s of a site's product s B A, by site.
        fixed: what does not train and is the same for all clients, by name; what is a client's own is not there.
    """

    shapes: Mapping[str, torch.Size]
    scales: Mapping[str, float]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)


class Settling(torch.optim.Optimizer):
    """One whose weights are not yet what a client sends while steps are taken."""

    def settle(self) -> None:
        """Put what is sent into the weights, of all rows that there are."""


class ClientOptimizer(Configured):
    """Makes a client's optimizer.

    Attributes:
        pairs_factors: it needs A and B of a site to train together.
        reads_fixed_A: it needs an A that stays, and B to train without it.
    """

    pairs_factors: ClassVar[bool] = False
    reads_fixed_A: ClassVar[bool] = False

    def require(self, client: ClientConfig) -> None:
        """Raise InputError where a key of the section contradicts this optimizer: one but `sgd` takes no momentum."""
        if client.momentum:
            raise InputError(
                f"client.momentum={client.momentum:g} is of sgd; client.optimizer={client.optimizer} has options of "
                f"its own (fedpeft show {client.optimizer}). Set client.momentum=0."
            )

    def has_state(self, client: ClientConfig) -> bool:
        """Whether a step leaves something behind for the next one."""
        return True

    def make(self, weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
        """A new optimizer without state, at the rate `client.lr`."""
        raise NotImplementedError


def find_optimizer(client: ClientConfig) -> ClientOptimizer:
    """The optimizer that a config names, with its options."""
    found: ClientOptimizer = configs.method(
        "optimizers", client.optimizer, client.optimizer_options, "client.optimizer_options"
    )
    return found


def make_optimizer(weights: Sequence[nn.Parameter], client: ClientConfig, layout: Layout) -> torch.optim.Optimizer:
    """A new optimizer of a client's round, or of those of a cohort."""
    return find_optimizer(client).make(weights, client, layout)


def make_layout(model: Adapted, trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Layout:
    """The layout of what trains of a model; of `values`, by name, it has those that do not train as they now are."""
    return Layout(
        {key: value.shape for key, value in trained.items()},
        {name: site.scaling for name, site in model.sites.items()},
        {key: value.detach() for key, value in values.items() if key not in trained},
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Leave in the weights what a client sends; whoever takes steps does this after the last one."""
    if isinstance(optimizer, Settling):
        optimizer.settle()


def write_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], kept: Tensors) -> None:
    """Let a new optimizer of a client alone go on from what `read_state` gave; from nothing where that is empty."""
    for key, parameter in parameters.items():
        state = {}
        for what in kinds_of(kept):
            state[what] = torch.zeros_like(parameter)
            # A smaller rank than the model's, as of what it is the state of.
            value = kept[f"{what}:{key}"]
            state[what][tuple(map(slice, value.shape))] = value.to(parameter)
        if STEP in kept:
            state[STEP] = kept[STEP].clone()
        optimizer.state[parameter] = state


def read_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """The state of a client alone: `exp_avg:site/role` and the like, and `step` where it counts; copies, on the CPU."""
    found = {}
    for key, parameter in parameters.items():
        for what, value in optimizer.state[parameter].items():
            if torch.is_tensor(value):
                found[STEP if what == STEP else f"{what}:{key}"] = value.detach().cpu().clone()
    return found


def kinds_of(kept: Tensors) -> set[str]:
    """What of each tensor is kept: `exp_avg` and the like."""
    return {name.partition(":")[0] for name in kept} - {STEP}


def count_of(kept: Tensors | None) -> int:
    """Steps that a kept state has behind it; 0 where none is kept or none are counted."""
    return int(kept[STEP]) if kept and STEP in kept else 0
