"""A method's client half: what it does at a client beside training. It stands below the server half, in the same file.

A client makes the halves from its *own* config (`halves` of the strategy that its config names), never from a message,
so a server cannot ask for what the client's config does not do. Training asks them in the order from the rule outwards:

    start              the adapter that training begins with        (FedSVD: A = M A_0)
    proximal           mu of (mu / 2) ||theta - theta_0||^2          (FedProx)
    gradient_offset    what is added to every gradient              (control variates: c - c_k)
    finish             what is sent beside the update, and what the client keeps on its disk
    equip              a test-time method gets what the federation learned for it

What a half sends travels in `AdapterState.extra`, under the names and in the shapes of what the server sent there:
norms, distances and rules do not see it, unless the half says that it adds up like an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedpeft.clients.rates import ONE_ROUND, Clock
from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import Adapted
    from fedpeft.config import ClientConfig, Config
    from fedpeft.data.encode import Encoded
    from fedpeft.state import AdapterState, ServerState
    from fedpeft.strategies.base import FederatedStrategy
    from fedpeft.tta.deployed import Deployed
    from fedpeft.tta.method import TTAMethod

Tensors = dict[str, Tensor]


@dataclass
class Visit:
    """A client's round as a half sees it.

    Attributes:
        received: what the server sent; beside the adapter, in `extra`.
        start: the adapter that training begins with.
        kept: what the client kept on its disk from earlier rounds, by name.
        data: its records of the round.
        seed: of the client's round.
        steps: local steps taken, once training is over.
        clock: the round, which a schedule of rates goes by.
    """

    client: str
    config: ClientConfig
    model: Adapted
    received: AdapterState
    start: AdapterState
    kept: Tensors
    data: Encoded
    seed: int
    steps: int = 0
    clock: Clock = ONE_ROUND

    @property
    def rates(self) -> float:
        """Sum of the learning rates of the steps taken."""
        return self.clock.total(self.config, self.steps)


class ClientHalf:
    """Does nothing beside training; a method overrides what it needs.

    Attributes:
        sends: in words, what it sends beside the update; empty where it sends nothing.
        covered_by_dp: whether sample-level DP covers that: it is a function of noised or public values.
        adds_up: whether that is a change like an update's, so that norms and distances count it in.
        alone: whether a client without this half trains the same, as a stock Flower app must.
    """

    sends: ClassVar[str] = ""
    covered_by_dp: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
    alone: ClassVar[bool] = True

    def __init__(self, strategy: FederatedStrategy) -> None:
        self.strategy = strategy

    def start(self, adapter: AdapterState) -> AdapterState:
        """The adapter to begin with, from what was composed of round 0, the message and the client's disk."""
        return adapter

    def proximal(self, visit: Visit) -> float:
        """Weight of the proximal term around the start."""
        return 0.0

    def gradient_offset(self, visit: Visit) -> Tensors:
        """By parameter name, what is added to every gradient."""
        return {}

    def finish(self, visit: Visit, trained: AdapterState) -> tuple[Tensors, Tensors]:
        """What is sent beside the update, and what is kept; the model holds the trained adapter, and must again."""
        return {}, {}

    def equip(
        self, method: TTAMethod, model: Adapted, deployed: Deployed, received: AdapterState, data: Encoded
    ) -> bool:
        """Give a test-time method what the federation learned for it; False where it is not this half's method."""
        return False


def list_layers(strategy: FederatedStrategy) -> list[FederatedStrategy]:
    """The rule and what is around it, from the inside out."""
    inner = strategy.inner
    return [*([] if inner is None else list_layers(inner)), strategy]


def client_halves(strategy: FederatedStrategy) -> list[ClientHalf]:
    """The client halves of a strategy and of what is inside it, from the rule outwards."""
    return [layer.client_half(layer) for layer in list_layers(strategy)]


def names_that_add_up(strategy: FederatedStrategy, server: ServerState) -> set[str]:
    """Names in `extra` of which a half says that they are changes like an update's."""
    return {name for layer in list_layers(strategy) if layer.client_half.adds_up for name in layer.extra(server)}


def check(config: Config) -> None:
    """Refuse a method whose clients send what sample-level privacy does not cover, before anything is loaded."""
    from fedpeft.strategies.build import build
    from fedpeft.strategies.wrappers.wrapper import name_of

    if config.privacy.unit != "sample":
        return
    for half in client_halves(build(config)):
        if half.sends and not half.covered_by_dp:
            name = name_of(half.strategy)
            raise InputError(
                f"strategy.wrap: {name} has clients send {half.sends}, and privacy.unit=sample does not "
                f"cover them. Set privacy.unit=none, or take {name} out."
            )
