"""A stock Flower strategy (flwr.serverapp.strategy) as the aggregation rule. Each rule's documentation has its paper.

Clients train and send A, B and the head as in FedIT; the stock strategy's `aggregate_train` combines them, on replies
made of the updates (an array per tensor, `num-examples`, and `train_loss` where all clients sent it). What it keeps
between rounds (moments, momentum) is moved into the server state after each call and put back before the next, so that
`aggregate` stays pure and a resumed run goes on the same.

Deviations: the stock `configure_train` is not called, since fedpeft runs the round; the arrays that it would have
remembered are given to the rule. Tensors are float32 (float64 where the adapter is).

    >>> from fedpeft.strategies.rules.flower import FlowerRule
    >>> FlowerRule(rule="FedTrimmedAvg", rule_options={"beta": 0.1}).config.rule
    'FedTrimmedAvg'
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import flwr.serverapp.strategy as stock
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from torch import Tensor

from fedpeft import registry
from fedpeft.config import option
from fedpeft.errors import InputError, RunError
from fedpeft.state import AdapterState, Needs, RunContext, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale

# Rules that aggregate arrays, and what each keeps between rounds, per tensor.
RULES: dict[str, tuple[str, ...]] = {
    "FedAvg": (),
    "FedAvgM": ("momentum_vector",),
    "FedAdam": ("m_t", "v_t"),
    "FedAdagrad": ("m_t", "v_t"),
    "FedYogi": ("m_t", "v_t"),
    "FedMedian": (),
    "FedTrimmedAvg": (),
    "Krum": (),
    "MultiKrum": (),
    "Bulyan": (),
    "QFedAvg": (),
}
FROM_START = ("FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "QFedAvg")


class FlowerRule(FederatedStrategy):
    """A, B and head aggregated by a strategy that comes with Flower."""

    paper = "Beutel et al. 2020, arXiv 2007.14390"
    needs = Needs.INDIVIDUAL
    takes_any_adapter = True

    @dataclass
    class Config:
        rule: str = option("FedAvg", f"class in flwr.serverapp.strategy, of {', '.join(RULES)}")
        rule_options: dict[str, Any] = option({}, "its keyword arguments", options_of=("", "rule"))

    def __init__(self, *, context: RunContext = RunContext(), **options: Any) -> None:
        super().__init__(context=context, **options)
        rule = self.config.rule
        if rule.startswith("DifferentialPrivacy"):
            wrong = "Flower moves an adaptive clip the wrong way, up if too large. " if "Adapt" in rule else ""
            raise InputError(
                f"strategy.rule={rule}: {wrong}Flower's DP wrappers keep no ledger and are not offered. "
                "Use privacy.unit=client for DP at the server, privacy.unit=sample for DP at the clients."
            )
        if rule not in RULES:
            raise InputError(registry.unknown("strategy.rule", rule, RULES))
        self.needs_start = rule in FROM_START
        self._build_rule()

    def _build_rule(self) -> Any:
        """A fresh stock strategy: it is never kept, so nothing hides in it."""
        try:
            return getattr(stock, self.config.rule)(**self.config.rule_options)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"strategy.rule_options={self.config.rule_options}: not taken by {self.config.rule}: {error}"
            ) from error

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        updates = same_scale(server, updates)
        current = server.adapter.select(self.uploads(server))
        rule, keys = self._build_rule(), list(current.tensors)
        if self.config.rule in FROM_START:
            arrays = _to_arrays(current)
            as_dict = "m_t" in RULES[self.config.rule]
            # Flower's rules keep these in two forms.
            rule.current_arrays = {key: array.numpy() for key, array in arrays.items()} if as_dict else arrays
        self._restore_rule(rule, server.memory, keys)
        with _quiet_flower():
            aggregated, _ = rule.aggregate_train(server.round + 1, _to_replies(updates, keys))
        if aggregated is None:
            raise RunError(
                f"round {server.round + 1}: Flower's {self.config.rule} made nothing of {len(updates)} "
                "updates; it needs more of them."
            )
        tensors = {key: torch.from_numpy(aggregated[key].numpy()) for key in keys}
        return replace(server.with_tensors(tensors), memory={**server.memory, **self._save_rule(rule, keys)})

    def _save_rule(self, rule: Any, keys: list[str]) -> dict[str, Tensor]:
        memory: dict[str, Tensor] = {}
        for name in RULES[self.config.rule]:
            values = getattr(rule, name)
            if values is None:
                continue
            named = values if isinstance(values, dict) else dict(zip(keys, values, strict=True))
            memory |= {f"flower/{name}/{key}": torch.tensor(value) for key, value in named.items()}
        return memory

    def _restore_rule(self, rule: Any, memory: dict[str, Tensor], keys: list[str]) -> None:
        for name in RULES[self.config.rule]:
            if f"flower/{name}/{keys[0]}" in memory:
                # A copy: Flower may write into it, and the old state must stay as it is.
                named = {key: memory[f"flower/{name}/{key}"].numpy().copy() for key in keys}
                setattr(rule, name, list(named.values()) if name == "momentum_vector" else named)


def _to_arrays(adapter: AdapterState) -> ArrayRecord:
    return ArrayRecord(
        {
            key: Array((value if value.dtype == torch.float64 else value.float()).numpy())
            for key, value in adapter.tensors.items()
        }
    )


def _to_replies(updates: list[Update], keys: list[str]) -> list[Message]:
    """The updates as reply messages, in their order. With whole metadata no Flower runtime is needed to fill it in."""
    losses = all("train_loss" in update.metrics for update in updates)
    messages = []
    for number, update in enumerate(updates, start=1):
        metrics: dict[str, Any] = {"num-examples": float(update.weight)}
        if losses:
            metrics["train_loss"] = update.metrics["train_loss"]
        sent = AdapterState({key: update.adapter[key] for key in keys}, update.adapter.sites)
        content = RecordDict({"arrays": _to_arrays(sent), "metrics": MetricRecord(metrics)})
        metadata = Metadata(
            run_id=0,
            message_id="",
            src_node_id=number,
            dst_node_id=0,
            reply_to_message_id="",
            group_id="",
            created_at=0.0,
            ttl=1.0,
            message_type="train",
        )
        messages.append(Message(content, metadata=metadata))  # type: ignore[call-overload]
    return messages


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs several lines a call; the round has its own."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
