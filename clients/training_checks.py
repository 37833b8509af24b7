"""Combinations of how clients train, and from what, that cannot work, refused before anything is loaded."""

from __future__ import annotations

from fedpeft import registry
from fedpeft.adapters.penalties.base import OverFactors, OverScores, find_penalty
from fedpeft.clients import rates
from fedpeft.clients.optimizers.base import ClientOptimizer, find_optimizer
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.objectives.tokens import TokenObjective


def check(config: Config) -> None:
    """Refuse what contradicts itself in a client's training; each message names the keys and the way out."""
    client = config.client
    optimizer = find_optimizer(client)
    optimizer.require(client)
    _require_roles_fit(config, optimizer)
    _require_penalty_fits(config)
    if client.keep_optimizer:
        _require_lasting_state(config)
    rates.require(client, config.run.rounds)
    if config.adapter.start is not None:
        _require_fresh_is_not_needed(config)
    if client.micro_batch is not None and client.micro_batch > client.batch_size:
        raise InputError(
            f"client.micro_batch={client.micro_batch} is a part of client.batch_size={client.batch_size}, and above "
            "it. Lower it, or set it to null."
        )


def _require_roles_fit(config: Config, optimizer: ClientOptimizer) -> None:
    """Refuse an optimizer that needs A and B to train together, or B alone, where a round does not train these."""
    if not (optimizer.pairs_factors or optimizer.reads_fixed_A):
        return
    rounds = _roles_trained_first(config)
    where = f"strategy {config.strategy.name} over adapter.name={config.adapter.name}"
    if optimizer.pairs_factors and any(not {"A", "B"} <= {*roles} for roles in rounds):
        reason = f"steps A and B of a layer by each other, but {where} does not train both in every round. Take fedit"
    elif optimizer.reads_fixed_A and any("A" in roles or "B" not in roles for roles in rounds):
        reason = f"steps B by an A that stays, but {where} trains A, or no B. Take ffa_lora"
    else:
        return
    raise InputError(f"client.optimizer={config.client.optimizer} {reason} over lora, or another optimizer.")


def _require_penalty_fits(config: Config) -> None:
    """Refuse a penalty that has nothing to act on, or nothing to compare with."""
    adapter, strategy = config.adapter, config.strategy.name
    penalty = find_penalty(adapter)
    if isinstance(penalty, OverFactors):
        if any(not {*penalty.roles} & {*roles} for roles in _roles_trained_first(config)):
            reason = f"it is over {', '.join(penalty.roles)}, of which strategy {strategy} over adapter.name="
            reason += f"{adapter.name} does not train one in every round. Take fedit over lora or sorsa"
        elif adapter.client_ranks:
            reason = "clients of lower ranks (adapter.client_ranks) have zeros in the ranks that they lack, which it "
            reason += "would be over too. Set adapter.client_ranks=null"
        else:
            return
    elif isinstance(penalty, OverScores):
        from fedpeft.strategies.build import build

        moving = getattr(registry.load("adapters", adapter.name), "moving_start", lambda options: None)
        if not issubclass(registry.load("objectives", config.model.task), TokenObjective):
            reason = "it compares what a language model says with what it said before it was trained, and model.task="
            reason += f"{config.model.task} has no such words. Set model.task=causal-lm"
        elif (what := moving(adapter.options)) or build(config).changes_base:
            reason = f"{what or f'strategy {strategy}'} moves the base weights, so that the base alone is not what it "
            reason += "was before training. Take fedit over lora"
        else:
            return
    else:
        return
    raise InputError(f"adapter.penalty={adapter.penalty}: {reason}, or set adapter.penalty=null.")


def _require_lasting_state(config: Config) -> None:
    """Refuse to keep an optimizer's state from round to round where there is none, or where it would be of other
    coordinates in the next round.

    It is allowed under sample-level privacy: the state is made of noised gradients, and stays with the client.
    """
    from fedpeft.strategies.build import build

    client, name = config.client, config.strategy.name
    strategy = build(config)
    if not find_optimizer(client).has_state(client):
        reason = f"client.optimizer={client.optimizer} has no state here. Take adamw, or sgd with client.momentum"
    elif config.continual.body is not None:
        reason = f"continual.body={config.continual.body}: a task would begin with the state of the one before. Set"
        reason += " continual.body=null"
    elif not strategy.fixed_basis:
        reason = (
            f"strategy {name} changes what the coordinates mean between rounds (new factors or a moved base), so the "
            "state would be of others. Take fedit or ffa_lora"
        )
    elif len(_roles_trained_first(config)) > 1:
        reason = f"strategy {name} trains other factors in every second round, and each changes what the other's state"
        reason += " is of. Take fedit or ffa_lora"
    else:
        return
    raise InputError(f"client.keep_optimizer=true: {reason}, or set client.keep_optimizer=false.")


def _require_fresh_is_not_needed(config: Config) -> None:
    """Refuse what cannot begin from an adapter that has been trained."""
    where = f"adapter.start={config.adapter.start}"
    if config.continual.body is not None:
        raise InputError(
            f"{where}: with continual.body={config.continual.body} the sequence of tasks begins from a fresh adapter. "
            "Merge the folder into the base model (`fedpeft export RUN --merge`) and give that as model.name, or set "
            "adapter.start=null."
        )
    if unequal := config.unequal_ranks.partition("=")[0]:
        raise InputError(
            f"{where}: clients of lower ranks ({unequal}) would begin from a part of it. Set {unequal}=null."
        )


def _roles_trained_first(config: Config) -> set[tuple[str, ...]]:
    """The roles that the first rounds train; what goes in turn does so from the second on."""
    from fedpeft.state import AdapterState, ServerState
    from fedpeft.strategies.build import build

    strategy = build(config)
    return {strategy.trained(ServerState(AdapterState({}), round=number)) for number in range(2)}
