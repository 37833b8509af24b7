"""The Flower ClientApp: unpack, train, pack. The same app runs here, in worker processes, under Ray and at a site.

    query     -> {"name"}
    train     adapter, task -> update, {"num-examples", "train_loss"}
    evaluate  adapter, task -> {"num-examples", "accuracy", "loss"} on the client's held-out records

Under secure aggregation the four stages of `clients.secagg` take the place of train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients import secagg
from fedpeft.clients.policy import Refused
from fedpeft.clients.private import Guard, fingerprint
from fedpeft.clients.store import Store
from fedpeft.clients.train import CONTROL, Private, evaluate, new_control, on_device, per_sample_loss, train
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.errors import RunError
from fedpeft.privacy.gradients import verify
from fedpeft.privacy.ledger import BudgetExhausted
from fedpeft.state import AdapterState
from fedpeft.strategies.wire import PACKED

log = logging.getLogger("fedpeft")


@dataclass
class Local:
    """What one process holds: the base model once, and the data of the clients that it runs.

    Attributes:
        initial: the strategy's round-0 adapter, drawn from the public seed.
        train_data, holdout: by client name.
    """

    config: Config
    model: Adapted
    initial: AdapterState
    train_data: dict[str, Encoded]
    holdout: dict[str, Encoded]
    store: Store
    guard: Guard
    verified: set[tuple[str, ...]] = field(default_factory=set)

    def compose(
        self, client: str, received: AdapterState, task: dict[str, Any], before: int
    ) -> tuple[AdapterState, dict[str, Tensor]]:
        """The adapter a client starts from: round-0 values, what was sent, what it kept. And its kept tensors.

        Raises:
            RunError: what it drew from the seed is not what the server has.
        """
        static = task.get("static")
        if static and self.initial.select(static["roles"]).sha256() != static["sha256"]:
            raise RunError(
                f"roles {', '.join(static['roles'])} drawn from run.seed={self.config.run.seed} differ from the "
                "server's (another torch or transformers version?). Set strategy.transport=dense."
            )
        kept = self.store.load(client, before)
        tensors = {
            key: value for key, value in received.tensors.items() if ":" not in key and received.role(key) != "M"
        }
        for key, core in received.select(("M",)).tensors.items():
            A = f"{key.removesuffix('/M')}/A"
            tensors[A] = (core.double() @ self.initial[A].double()).to(self.initial[A].dtype)
        tensors |= {key: value for key, value in kept.items() if ":" not in key}
        return self.initial.replace(tensors), kept

    def train(self, client: str, received: AdapterState, task: dict[str, Any]) -> tuple[AdapterState, dict[str, float]]:
        """One round at one client; its kept state is written last.

        Under sample-level DP the client's policy is asked before its records are touched, the noisy steps are in its
        ledger before they are taken, and the same request again gets the same update, which costs nothing more.

        Raises:
            Refused, BudgetExhausted: the client takes no part in this round.
        """
        number = int(task["round"])
        self.guard.admit(client, number)
        start, kept = self.compose(client, received, task, before=number)
        if not self.guard.private:
            update, metrics = self._train(client, received, task, start, kept, None)
            return update, self.guard.allowed(client, metrics)
        request = fingerprint(received, task)
        answered = self.store.reply(client, request)
        if answered is not None:
            return AdapterState(answered, received.sites), self.guard.allowed(client, {})
        try:
            plan = self.guard.plan(client, lambda: len(self.data(self.train_data, client)))
            self._verify(client, task["trains"])
            private = Private(plan, self.guard.spend(client, number, request, plan))
            update, metrics = self._train(client, received, task, start, kept, private)
        except (Refused, BudgetExhausted):
            raise
        except Exception as error:  # whatever went wrong may have to do with a record
            log.exception("%s failed in round %d; the server is not told why", client, number)
            raise RunError("the client failed; the reason stays with it.") from error
        self.store.save_reply(client, request, update.tensors)
        return update, self.guard.allowed(client, metrics)

    def _train(self, client: str, received: AdapterState, task: dict[str, Any], start: AdapterState,
               kept: dict[str, Tensor], private: Private | None) -> tuple[AdapterState, dict[str, float]]:
        number, data = int(task["round"]), self.data(self.train_data, client)
        self.model.write(start)
        control, corrections = received.select(("control",)).tensors, None
        own = {key: kept.get(key, torch.zeros_like(value)) for key, value in control.items()}
        if control:
            corrections = {key.removeprefix(CONTROL): value - own[key] for key, value in control.items()}
        seed = seeds.derive(self.config.run.seed, "round", number, "client", client)
        steps, loss = train(
            self.model,
            data,
            task["trains"],
            self.config.client,
            seed,
            prox_mu=float(task.get("prox_mu", 0.0)),
            control=corrections,
            private=private,
        )
        after = self.model.read(start.select(task["trains"]))
        if after.distance(start) == 0:
            raise RunError(f"no trained tensor moved in {steps} steps; check client.lr and the adapter.")
        update = after.select(task["uploads"])
        keep = after.select(task["keeps"]).tensors
        if control:
            lr = self.config.client.lr
            before = {f"{CONTROL}{key}": value for key, value in start.tensors.items()}
            ended = {f"{CONTROL}{key}": value for key, value in after.tensors.items()}
            new = new_control(own, control, before, ended, steps, lr)
            update = update.replace({key: new[key] - own[key] for key in new})
            keep = {**keep, **new}
        if keep:  # what this round did not touch (the inactive factor's control) stays
            self.store.save(client, number, {**kept, **keep})
        return update, {"num-examples": float(len(data)), "train_loss": loss}

    def _verify(self, client: str, trains: list[str]) -> None:
        """Compare per-sample gradients of two records with autograd, once for each set of trained roles."""
        if tuple(trains) in self.verified:
            return
        data, parameters = self.train_data[client], self.model.train_roles(trains)
        device = next(iter(parameters.values())).device
        inputs, labels = on_device(data, np.array([0, len(data) - 1]), device)
        self.model.training_mode()
        verify(self.model.modules, parameters, lambda *batch: per_sample_loss(self.model, *batch)[0], inputs, labels)
        self.model.base.backbone.eval()
        self.verified.add(tuple(trains))

    def evaluate(self, client: str, received: AdapterState, task: dict[str, Any]) -> dict[str, float]:
        self.guard.admit(client, int(task["round"]))
        self.guard.admit_evaluation(client)
        data = self.data(self.holdout, client)
        start, _ = self.compose(client, received, task, before=int(task["round"]) + 1)
        self.model.write(start)
        return evaluate(self.model, data)

    def data(self, table: dict[str, Encoded], client: str) -> Encoded:
        if client not in table or len(table[client]) == 0:
            raise RunError(f"{client} has no records here.")
        return table[client]


def client_app(local: Callable[[], Local], name: Callable[[Context], str], mods: list[Mod] | None = None) -> ClientApp:
    """The ClientApp. `local` is called once a message, in the process that trains; it should not load anything then."""
    app = ClientApp()

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        return Message(RecordDict({"identity": ConfigRecord({"name": name(context)})}), reply_to=message)

    @app.train(mods=mods or [])
    def fit(message: Message, context: Context) -> Message:
        secagg.refuse_clear(local().config)
        received, task = PACKED.open(message.content)
        update, metrics = local().train(name(context), received, task)
        return Message(PACKED.reply(update, metrics, int(task["round"])), reply_to=message)

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        received, task = PACKED.open(message.content)
        metrics = local().evaluate(name(context), received, task)
        return Message(RecordDict({"metrics": MetricRecord({**metrics})}), reply_to=message)

    def update(context: Context, received: AdapterState, task: dict[str, Any]) -> AdapterState:
        return local().train(name(context), received, task)[0]

    secagg.register(app, lambda: local().config, name, update, mods or [])
    return app
