"""From the `strategy` section of a config to strategy objects, and the combinations that are refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft import registry
from fedpeft.config import Config, method
from fedpeft.data.split import client_name
from fedpeft.errors import InputError
from fedpeft.state import RunContext

if TYPE_CHECKING:
    from fedpeft.strategies.base import FederatedStrategy


def build(
    config: Config, classes: int | None = None, clients: Sequence[str] | None = None, ledger: Path | None = None
) -> FederatedStrategy:
    """The strategy of a config, its wrappers and client-level privacy around it.

    Args:
        classes: of the data, which a sequence of tasks is cut from; None where the strategy is not to be run.
        clients: their names, where the data name them.
        ledger: file for the releases under client-level privacy.
    """
    section = config.strategy
    names = clients or [client_name(index) for index in range(config.data.clients or 0)]
    ranks = dict(zip(names, itertools.cycle(config.adapter.client_ranks or ()), strict=False))
    adapter = registry.load("adapters", config.adapter.name, "adapter.name")
    context = RunContext(
        section.weighting,
        config.data.clients,
        ranks,
        config.run.seed,
        ledger,
        config.adapter.name,
        getattr(adapter, "averages", ()),
        getattr(adapter, "keeps", ()),
    )
    strategy = make_named(section.name, section.options, "strategy", context=context)
    for entry in section.wrap:
        if not isinstance(entry, str) and not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            raise InputError(
                f"strategy.wrap: {entry!r} is not a name or a mapping with a name. Wrappers: {', '.join(wrappers())}."
            )
    for name, options in section.wrappers:
        if not registry.load("strategies", name, "strategy.wrap").wraps:
            raise InputError(
                f"strategy.wrap: '{name}' aggregates by itself and cannot be put around {section.name}. "
                f"Wrappers: {', '.join(wrappers())}."
            )
        strategy = make_named(name, options, f"strategy.wrap.{name}", inner=strategy)
    if config.continual.body is not None:
        from fedpeft.strategies.sequence.build import put_body_around

        strategy = put_body_around(strategy, config, classes)
    if config.privacy.unit == "client":
        from fedpeft.strategies.wrappers.client_dp import ClientDP

        # Outermost, so that nothing inside sees an update that is not noised.
        strategy = ClientDP(strategy, config.privacy, config.run)
    return strategy


def make_named(name: str, options: dict[str, Any], key: str, **given: Any) -> FederatedStrategy:
    """A registered strategy by name, with its `context`; a wrapper with its `inner`, or around FedIT."""
    strategy: FederatedStrategy = method("strategies", name, options, key, **given)
    return strategy


def wrappers() -> list[str]:
    """Names of the registered strategies that go around another one, other packages' among them."""
    return [name for name in registry.names("strategies") if registry.load("strategies", name).wraps]


def check(config: Config) -> None:
    """Refuse what a strategy cannot do, before anything is loaded."""
    from fedpeft.strategies.client import list_layers
    from fedpeft.strategies.wrappers.wrapper import name_of

    strategy = build(config)
    name = config.strategy.name
    count = config.run.clients_per_round or config.data.clients
    if count is not None:  # else as many as the records have groups, which is known once they are read
        require_clients(strategy, count)
    adapter = registry.load("adapters", config.adapter.name, "adapter.name")
    if strategy.adapter != getattr(adapter, "rules_of", config.adapter.name):
        raise InputError(
            f"strategy.name={name} works on adapter.name={strategy.adapter}, not {config.adapter.name}. "
            f"Set adapter.name={strategy.adapter}."
        )
    if config.unequal_ranks and not strategy.unequal_ranks:
        able = [other for other in registry.names("strategies") if registry.load("strategies", other).unequal_ranks]
        raise InputError(
            f"{config.unequal_ranks}: strategy {name} needs equal ranks. "
            f"Strategies for unequal ranks: {', '.join(able)}."
        )
    client = config.client
    if strategy.plain_sgd and (client.optimizer != "sgd" or client.momentum or client.max_grad_norm is not None):
        needing = next(layer for layer in list_layers(strategy) if type(layer).plain_sgd)
        raise InputError(
            f"client.optimizer={client.optimizer}, client.momentum={client.momentum:g}, client.max_grad_norm="
            f"{client.max_grad_norm}: the {needing.client_half.sends} of {name_of(needing)} need plain SGD, as only "
            "of its steps the way over their rates is a mean gradient. Set client.optimizer=sgd, client.momentum=0 and "
            "client.max_grad_norm=null."
        )
    if strategy.keeps and config.data.holdout == 0:
        raise InputError(
            f"strategy.name={name} leaves {', '.join(strategy.keeps)} with each client, so there is no single global "
            "model: it is evaluated on the clients. Set data.holdout (for example 0.2)."
        )
    if config.model.dtype == "bfloat16" and strategy.changes_base:
        raise InputError(
            f"strategy.name={name} changes the base weights; model.dtype={config.model.dtype} would round its changes "
            "away. Set model.dtype=float32."
        )
    if config.model.quantization is not None:
        _require_still_base(config, strategy)


def _require_still_base(config: Config, strategy: FederatedStrategy) -> None:
    """Refuse a strategy, a body or an adapter's start that moves a base which is kept in few bits."""
    from fedpeft.strategies.client import list_layers
    from fedpeft.strategies.sequence.sequence import TaskSequence
    from fedpeft.strategies.wrappers.wrapper import name_of

    # An adapter's start may move the base too (PiSSA takes its leading components out).
    adapter = registry.load("adapters", config.adapter.name, "adapter.name")
    moving = adapter.moving_start(config.adapter.options) if hasattr(adapter, "moving_start") else None
    mover = next((layer for layer in list_layers(strategy) if layer.changes_base), None)
    if isinstance(mover, TaskSequence):
        moving = f"continual.body={config.continual.body}"
    elif mover is not None:
        moving = f"strategy {name_of(mover)}"
    if moving is not None:
        raise InputError(
            f"model.quantization={config.model.quantization}: {moving} moves the base weights, and in few bits a "
            "weight would round its change away. Take one that leaves them as they are, or set "
            "model.quantization=null."
        )


def require_clients(strategy: FederatedStrategy | None, count: int) -> None:
    """Refuse a rule, however deep inside, that needs more updates than a round can have."""
    while strategy is not None:
        strategy.require_clients(count)
        strategy = strategy.inner
