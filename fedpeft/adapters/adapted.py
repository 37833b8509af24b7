"""A base model with its adapter: named parameters that can be read, written and switched on, over one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.adapters.grouped import without_adapter
from fedpeft.adapters.penalties.base import OverScores, Penalised, bind_penalty, find_penalty
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.data.ragged import cut_runs
from fedpeft.models.base import Base
from fedpeft.models.loading import load as load_base
from fedpeft.state import AdaptedLayer, AdapterState

NEVER = -1e4
TOKENS = 2**15  # of a pass for features


# Of a step's number: by parameter name, what values are multiplied by while its gradient is taken.
Thinning = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Injected:
    """What an adapter put into the backbone: parameters by `site/role`, and sites by the name of their layer.

    Attributes:
        fixed: what a state has beside the parameters, by `site/role`: it never trains.
        folder: adapter_config.json of its folder, but for base, task and head; None is plain LoRA's.
        thin: of an adapter that trains a part of itself in each step; takes what a client starts from, and the seed
            of its round.
    """

    parameters: dict[str, nn.Parameter]
    sites: dict[str, AdaptedLayer]
    fixed: dict[str, Tensor] = field(default_factory=dict)
    folder: dict[str, Any] | None = None
    thin: Callable[[AdapterState, int], Thinning] | None = None


class Adapter(Protocol):
    """A registered adapter method.

    Attributes:
        averages: roles of what trains, where a plain average takes them whatever they mean; a class without it is for
            the rules that name it.
        keeps: roles of what trains and stays with each client, likewise.
        rules_of: the registered adapter whose rules take it, where it has the same tensors; its own name otherwise.
        moving_start: of a class that can begin by moving the base weights: from its options what says so, or None.
    """

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        """Put the adapter into the base's target modules; its untrained product is zero."""


class Adapted:
    """One base model in memory; clients' adapters are written into it one after another.

    `compete` names the classes whose logits count; None is all. The others' are NEVER, so low that softmax gives them
    exactly 0, and finite, so that entropies are too. `tail` are the layers that need one token only; None until
    `adapters.tail` has looked for them. `kept` is what a training pass keeps of each token, in bytes, by trained roles
    and tokens of a record, as far as `clients.cohort.room` has counted it. `penalty` is a term of the loss over the
    factors, `over_scores` one of each record over its scores; None is none.

    Adapter and head are float32 whatever the dtype of the base.

    Tensors of a state that have a smaller rank than the model's are padded with zeros: a zero row of A beside a zero
    column of B gets no gradient, so training then equals training at the smaller rank.
    """

    def __init__(self, base: Base, injected: Injected, train_head: bool) -> None:
        self.base = base
        self.parameters = dict(injected.parameters)
        self.sites = dict(injected.sites)
        self.fixed, self.folder, self.thin = injected.fixed, injected.folder, injected.thin
        self.originals: dict[str, Tensor] = {}
        self.compete: list[int] | None = None
        self.tail: list[nn.Module] | None = None
        self.kept: dict[tuple[tuple[str, ...], int], float] = {}
        self.penalty: Penalised | None = None
        self.over_scores: OverScores | None = None
        if train_head:
            for name, module in base.heads.items():
                module.register_forward_pre_hook(_as_own_dtype)
                for path, parameter in module.named_parameters():
                    site, _, role = f"{name}.{path}".rpartition(".")
                    self.sites[site] = AdaptedLayer("head", tuple(parameter.shape))
                    self.parameters[f"{site}/{role}"] = parameter
        for parameter in self.parameters.values():
            # Small steps would vanish in half precision.
            parameter.data = parameter.data.float()
        self.form = AdapterState({**self.fixed, **self.parameters}, self.sites)

    def state(self) -> AdapterState:
        """A copy of the current adapter (and head) on the CPU, where strategies work."""
        return self.form.map(lambda value: value.detach().cpu().clone())

    def read(self, like: AdapterState) -> AdapterState:
        """A copy of the current values of the tensors of `like`, cut to their shapes."""
        return AdapterState(
            {
                key: self.form[key].detach()[tuple(map(slice, value.shape))].cpu().clone()
                for key, value in like.tensors.items()
            },
            like.sites,
        )

    @torch.no_grad()
    def write(self, state: AdapterState) -> None:
        """Put a state's tensors into the model, its residual into the base weights (or the originals back).

        Raises:
            KeyError: the state has a tensor that this model has no place for.
        """
        for key, value in state.tensors.items():
            if key in self.fixed or state.role(key) in ("residual_A", "residual_B"):
                continue
            parameter = self.parameters[key]
            if value.shape != parameter.shape:
                # What a smaller rank leaves out may still hold another client's values.
                parameter.zero_()
            parameter[tuple(map(slice, value.shape))] = value.to(parameter.device)
        for site in self.form.lora_sites():
            if f"{site}/residual_B" in state:
                weight = self.base.weight(site)
                # Kept, and added to each time: subtracting a change again would leave its rounding in the base.
                original = self.originals.setdefault(site, weight.clone())
                change = state[f"{site}/residual_B"].double() @ state[f"{site}/residual_A"].double()
                weight.copy_(original + change.to(original))
            elif site in self.originals:
                self.base.weight(site).copy_(self.originals.pop(site))

    def train_roles(self, roles: Iterable[str]) -> dict[str, nn.Parameter]:
        """Switch gradients on for these roles and off for all others; the parameters that train."""
        chosen = self.form.select(roles).tensors
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in chosen)
        return {key: self.parameters[key] for key in chosen}

    def thinning(self, start: AdapterState, seed: int) -> Thinning | None:
        """What each step of a round trains of the adapter, from its start and its seed; None is all of it."""
        return None if self.thin is None else self.thin(start, seed)

    def still(self) -> dict[str, Tensor]:
        """Rows of the last layer, by parameter name, whose classes do not compete: no record has a gradient there.

        Each is a mask of the rows [labels]; empty where all compete. Noise there would tell nothing and only do harm.
        """
        if self.compete is None:
            return {}
        last = self.base.head_layers[-1]
        mask = torch.ones(last.out_features, dtype=torch.bool, device=last.weight.device)
        mask[self.compete] = False
        mine = {id(value) for value in last.parameters()}
        return {key: mask for key, value in self.parameters.items() if id(value) in mine}

    def training_mode(self) -> None:
        """Dropout on. Batch norms stay in evaluation mode: their running statistics belong to the frozen base, and one
        client's data would reach all others through them.
        """
        self.base.backbone.train()
        for module in self.base.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch on the model's device, with a graph; NEVER at classes that do not compete."""
        return self._among_competing(self.base.forward(batch))

    @torch.no_grad()
    def bare_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch by the base alone, without dropout; the head is the one that there is."""
        with without_adapter(self.base.modules):
            return self.logits(batch)

    @torch.no_grad()
    def features(self, data: Encoded, size: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features [N, D], logits [N, labels] and labels [N] of all records in order, in batches, on the CPU."""
        device = next(self.base.head.parameters()).device
        self.base.backbone.eval()
        for places in cut_runs(data.lengths, size, TOKENS):
            inputs, labels = data.batch(places)
            features, logits = self.base.features_and_logits({key: value.to(device) for key, value in inputs.items()})
            yield features.cpu(), self._among_competing(logits).float().cpu(), labels

    def _among_competing(self, logits: Tensor) -> Tensor:
        if self.compete is None:
            return logits
        others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        others[self.compete] = False
        return logits.masked_fill(others, NEVER)

    @contextmanager
    def competing(self, classes: Sequence[int] | None) -> Iterator[None]:
        """Let only these classes compete for a while; None is all."""
        # A list, since that picks rows of a mask: a tuple would be one index.
        before, self.compete = self.compete, None if classes is None else list(classes)
        try:
            yield
        finally:
            self.compete = before

    def to(self, device: torch.device) -> Adapted:
        """Move the base, with all that was injected into it, in place; the same object comes back."""
        self.base.to(device)
        return self


def build(model: ModelConfig, adapter: AdapterConfig, labels: int, seed: int) -> Adapted:
    """Load the base, inject the adapter; fresh weights are a function of `seed` alone."""
    return adapt(load_base(model, labels, seed), adapter, seed)


def adapt(base: Base, adapter: AdapterConfig, seed: int) -> Adapted:
    """Inject an adapter into a base that is there already, and is changed by it."""
    method: Adapter = configs.method(
        "adapters", adapter.name, {key: value for key, value in adapter.options.items()}, "adapter"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "adapter"))
        injected = method.inject(base, adapter, seed)
    adapted = Adapted(base, injected, adapter.train_head)
    adapted.penalty = bind_penalty(adapter, base, adapted.form)
    penalty = find_penalty(adapter)
    adapted.over_scores = penalty if isinstance(penalty, OverScores) else None
    return adapted


def _as_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of a float32 head behind a base in a smaller dtype."""
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) for value in inputs)
