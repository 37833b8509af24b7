"""Plain data of a run: adapters, updates, the server's state, the rules of its rounds, and how a round can fail.

AdapterState is the only thing on the wire and on disk: named tensors, and per adapted module (site) what they mean.

A tensor is named `site/role`: the module's path in the base model, and what the tensor is there. Roles of a LoRA site:

    A            [r, in]     as peft's lora_A.weight
    B            [out, r]    as peft's lora_B.weight
    R            [r, r]      core of LoRA-SB: the product is scaling * B R A
    peft         any         what another tuner of peft trains; the site is its name in peft's files
    frozen       any         what else is in that tuner's file: every client draws it from the run's seed
    residual_B, residual_A   factored change of the frozen weight: W <- W + residual_B residual_A (scaling included)

Tensors of a trained head keep their parameter names as roles; asking for the role "head" means all of them. What a
method sends beside the adapter (control variates, sums for a head) is no adapter: it travels in `extra`, which no
role selects, no distance measures and no rule averages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.errors import InputError, RunError

FROZEN = "frozen"  # role of what no client trains and each draws itself
DROPS = 3  # rounds dropped one after another, after which a run stops
DROPPED = "dropped"  # how many have been, in the state's numbers


class StateMismatch(InputError):
    """Two adapter states do not have the same tensors; the message names the difference."""


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted module: `kind` is lora or head, `shape` its frozen weight's [out, in], `scaling` alpha / r.

    Of kind peft it is a tensor of a tuner of peft's, and `shape` the tensor's, or a layer whose base has a residual.
    """

    kind: str
    shape: tuple[int, ...] = ()
    scaling: float = 1.0


@dataclass(frozen=True)
class AdapterState:
    """Tensors by `site/role`, in sorted order, and the sites they belong to. Treat the dicts as read-only.

    Attributes:
        extra: what travels beside the adapter, by names of the method's own.
    """

    tensors: dict[str, Tensor]
    sites: dict[str, AdaptedLayer] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Sorted here, once: packed arrays, hashes and sums all go by this order.
        for name in ("tensors", "extra"):
            values = getattr(self, name)
            object.__setattr__(self, name, {key: values[key] for key in sorted(values)})

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def role(self, key: str) -> str:
        """What the tensor is: "head" for every tensor of a head."""
        site, _, role = key.rpartition("/")
        return "head" if site in self.sites and self.sites[site].kind == "head" else role

    def lora_sites(self) -> list[str]:
        """Sites of all kinds but heads, in their order."""
        return [name for name, site in self.sites.items() if site.kind != "head"]

    def rank(self, site: str) -> int:
        """Rank of a site: rows of its A."""
        return self.tensors[f"{site}/A"].shape[0]

    def select(self, roles: Iterable[str]) -> AdapterState:
        """The tensors whose role is one of `roles`; sites and `extra` stay, so that nothing loses its meaning."""
        roles = set(roles)
        tensors = {key: value for key, value in self.tensors.items() if self.role(key) in roles}
        return AdapterState(tensors, self.sites, self.extra)

    def without(self, roles: Iterable[str]) -> AdapterState:
        """The tensors whose role is none of `roles`; sites and `extra` stay, as in `select`."""
        roles = set(roles)
        tensors = {key: value for key, value in self.tensors.items() if self.role(key) not in roles}
        return AdapterState(tensors, self.sites, self.extra)

    def beside(self, extra: dict[str, Tensor]) -> AdapterState:
        """A copy that also takes these tensors along."""
        return AdapterState(self.tensors, self.sites, {**self.extra, **extra})

    def replace(self, tensors: dict[str, Tensor] | AdapterState) -> AdapterState:
        """A copy with these tensors put in, or added; of another state also what travels beside it."""
        if isinstance(tensors, AdapterState):
            return replace(self, tensors={**self.tensors, **tensors.tensors}, extra={**self.extra, **tensors.extra})
        return replace(self, tensors={**self.tensors, **tensors})

    def map(self, function: Callable[[Tensor], Tensor]) -> AdapterState:
        """A copy with the function's value for each tensor; `extra` stays as it is."""
        return replace(self, tensors={key: function(value) for key, value in self.tensors.items()})

    def clone(self) -> AdapterState:
        """A copy with tensors of its own, without a graph; `extra` is shared."""
        return self.map(lambda value: value.detach().clone())

    @property
    def parameters(self) -> int:
        """Values in all tensors together, `extra` not counted."""
        return sum(value.numel() for value in self.tensors.values())

    @property
    def payload(self) -> list[Tensor]:
        """All values that travel: tensors, then `extra`, each in the order of names."""
        return [*self.tensors.values(), *self.extra.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all values that travel, `extra` counted."""
        return sum(value.numel() * value.element_size() for value in self.payload)

    def distance(self, other: AdapterState) -> float:
        """L2 distance over the tensors of `self`."""
        squares = [(value.double() - other[key].double()).square().sum() for key, value in self.tensors.items()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def sha256(self) -> str:
        """Hash of names, dtypes, shapes and bits."""
        digest = hashlib.sha256()
        named = [*self.tensors.items(), *((f"extra {key}", value) for key, value in self.extra.items())]
        for key, value in named:
            digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(_tensor_bytes(value))
        return digest.hexdigest()

    def require_same_form(self, other: AdapterState, what: str) -> None:
        """Raise StateMismatch unless `other` has exactly what `self` has, in the same shapes and dtypes."""
        mine, others = [
            {**state.tensors, **{f"extra {key}": value for key, value in state.extra.items()}}
            for state in (self, other)
        ]
        missing = [key for key in mine if key not in others]
        unexpected = [key for key in others if key not in mine]
        if missing or unexpected:
            raise StateMismatch(f"{what}: missing {_name_few(missing)}; unexpected {_name_few(unexpected)}.")
        for key, value in mine.items():
            given = others[key]
            if given.shape != value.shape:
                raise StateMismatch(f"{what}: {key} has shape {list(given.shape)}, expected {list(value.shape)}.")
            if given.dtype != value.dtype:
                raise StateMismatch(f"{what}: {key} has dtype {given.dtype}, expected {value.dtype}.")


def _name_few(keys: list[str]) -> str:
    return "nothing" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _tensor_bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_dict(state: AdapterState) -> dict[str, Any]:
    """The sites as JSON-ready data; the tensors go to safetensors beside it."""
    return {name: asdict(site) for name, site in state.sites.items()}


def from_dict(tensors: dict[str, Tensor], sites: dict[str, Any]) -> AdapterState:
    """The inverse of `to_dict`, with the tensors that lay beside it."""
    return AdapterState(
        tensors,
        {name: AdaptedLayer(site["kind"], tuple(site["shape"]), site["scaling"]) for name, site in sites.items()},
    )


class Needs(Enum):
    """SUM: only the weighted sum of updates (secure aggregation is possible). INDIVIDUAL: each update in the clear."""

    SUM = "sum"
    INDIVIDUAL = "individual"


# (grid, roster, strategy, server, sent, contents, rules) -> updates, reason for each client without one, traffic
Exchange = Callable[..., tuple[list["Update"], dict[str, str], dict[str, Any]]]


class RoundFailed(RunError):
    """Too few good replies; the message names every client that failed and why."""


class RoundDropped(RoundFailed):
    """Updates may have been sent, and no sum that counts came of them: its number is not tried again."""


class StillMasked(RoundDropped):
    """Updates were sent under masks of which none was removed: the round may begin anew while its clients are there."""


@dataclass(frozen=True)
class Update:
    """One client's checked reply: what it uploaded, its weight (> 0) and its metrics.

    `count` is how many clients it stands for: more than one after a robust statistic has merged their updates.
    """

    client: str
    weight: float
    adapter: AdapterState
    metrics: dict[str, float] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class ServerState:
    """What the server knows between rounds: the global adapter, the strategy's own tensors and numbers (JSON-ready)."""

    adapter: AdapterState
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def with_tensors(self, tensors: dict[str, Tensor]) -> ServerState:
        """A copy whose adapter has these tensors, each in the dtype that it had before (new ones in float32)."""
        old = self.adapter.tensors
        cast = {
            key: value.to(old[key].dtype if key in old else torch.float32).contiguous()
            for key, value in tensors.items()
        }
        return replace(self, adapter=self.adapter.replace(cast))


@dataclass(frozen=True)
class RunContext:
    """What a strategy knows of its run, given once, when it is built.

    Attributes:
        weighting: "examples", by the number of records, or "uniform".
        population: clients of the federation, of which a round may ask some; None where nobody has counted them.
        client_ranks: by client, where they differ from the server's.
        ledger: file that client-level privacy writes every release to before it is used.
        adapter: name of the adapter, and `averages`, its roles that any plain average takes.
        keeps: of its roles those that stay with each client.
    """

    weighting: str = "examples"
    population: int | None = None
    client_ranks: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    ledger: Path | None = None
    adapter: str = "lora"
    averages: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """How rounds are run: the config's `run` section. `clients` is how many nodes must have joined before round 1.

    `secagg` is the exchange of a round under secure aggregation, None in the clear. `folder` is where the updates of a
    round are kept while they are gathered, None where they are in this process's memory anyway. `again` is how often a
    round of secure sums begins anew that has lost too many before a mask was removed.
    """

    rounds: int
    seed: int = 0
    clients: int | None = None
    clients_per_round: int | None = None
    deadline_s: float | None = None
    quorum: float = 0.5
    max_update_norm: float | None = None
    evaluate_every: int = 1
    evaluate_clients: bool = False
    secagg: Exchange | None = None
    folder: Path | None = None
    again: int = 0
