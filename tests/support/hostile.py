"""Hostile requests, and pairs of private sites whose data differ in one extreme record."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedpeft.clients.app import Local, client_app
from fedpeft.clients.guard import Guard
from fedpeft.clients.store import Store
from fedpeft.config import (
    ClientConfig,
    Config,
    ContinualConfig,
    DataConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    SecAggConfig,
    StrategyConfig,
    TTAConfig,
)
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE
from fedpeft.simulations.workers import handle_message
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions, Lesson
from support import instructed
from support import small_models as small

COUNT = 12
CLASSES = small.LABELS
TEXT = {"word": 10**6, "negative": -5, "long": "long", "bare": "bare", "gone": None}
RECORDS = {  # kind of model -> name -> what is done to the last of the records
    "vit": {"huge": 1e30, "nan": torch.nan, "inf": -torch.inf, "label": 77, "rare": 2, "gone": None},
    "bert": {**TEXT, "label": -3},
    "llama": {**TEXT, "label": 10**6, "silent": IGNORE},
}
STRATEGIES = {
    "fedit": {},
    "fedsa": {},
    "rolora": {},
    "fedex": {},
    "scaffold": {"wrap": ["scaffold"]},
    "prox": {"name": "fedprox"},
    "fedsvd": {"name": "fedsvd"},
    "tasks": {},
}


def data(kind: str, extreme: str | None, count: int = COUNT) -> Encoded:
    """Records of two of three classes, the last one as RECORDS says; None is the plain one."""
    if kind == "vit":
        pixels = torch.linspace(-1, 1, COUNT * 64)[: count * 64].reshape(count, 1, 8, 8).roll(3, 0)
        made = Encoded({"pixel_values": pixels}, torch.arange(count) % (CLASSES - 1))
    else:
        made = small.texts(count, causal=kind == "llama")
        made = made if kind == "llama" else Encoded(made.inputs, torch.arange(count) % (CLASSES - 1))
    if extreme is None:
        return made
    if extreme == "gone":
        return made.view(np.arange(count - 1))
    what: Any = RECORDS[kind][extreme]
    inputs, labels = {name: value.clone() for name, value in made.inputs.items()}, made.labels.clone()
    if extreme in ("label", "rare", "silent"):
        labels[-1] = what
    elif kind == "vit":
        inputs["pixel_values"][-1] = what
    elif extreme == "long":
        inputs = {name: torch.nn.functional.pad(value, (0, 57)) for name, value in inputs.items()}
        labels = labels if labels.ndim == 1 else torch.nn.functional.pad(labels, (0, 57), value=IGNORE)
        inputs["input_ids"][-1], inputs["attention_mask"][-1] = 9, 1
    elif extreme == "bare":
        inputs["attention_mask"][-1] = 0
    else:
        inputs["input_ids"][-1, 0] = what
    return Encoded(inputs, labels)


class Site:
    """A private client "a" with a public number of records.

    Args:
        sections: options of the config's `client`, `privacy`, `secagg` and `tta`.
    """

    def __init__(
        self, kind: str, model: Any, folder: Any, strategy: str, own: Encoded, held: Encoded, **sections: dict[str, Any]
    ) -> None:
        section = {"name": strategy if strategy not in ("scaffold", "tasks") else "fedit", **STRATEGIES[strategy]}
        tasks = {"body": "sequential", "tasks": 3, "head": "lda", "statistics_noise": 2.0, "shuffle": False}
        fast = {"optimizer": "sgd", "lr": 0.1, "local_steps": 2, "local_epochs": None, "batch_size": 4}
        settings = {"noise_multiplier": 1.0, "accountant": "rdp", "records": COUNT}
        secagg = sections.get("secagg", {})
        self.config = Config(
            model=ModelConfig(task=small.KINDS[kind][0]),
            data=DataConfig(clients=4 if secagg else 1),
            client=ClientConfig(**{**fast, **sections.get("client", {})}),
            run=RunConfig(rounds=3),
            privacy=PrivacyConfig(unit="sample", randomness="seeded", **{**settings, **sections.get("privacy", {})}),
            strategy=StrategyConfig(weighting="uniform", **section),
            secagg=SecAggConfig(**secagg),
            continual=ContinualConfig(**tasks) if strategy == "tasks" else ContinualConfig(),
            tta=TTAConfig(**{"corruption": "clean", **sections.get("tta", {})}),
        )
        self.local = Local(
            self.config,
            model,
            small.randomised(model),
            {"a": own},
            {"a": held},
            Store(folder / "store", 3),
            Guard(self.config, folder / "ledger", "run"),
        )
        self.context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict({}), run_config={})
        self.app = client_app(lambda: self.local, lambda context: "a")

    def request(self, kind: str, number: int) -> tuple[AdapterState, Instructions]:
        """What an honest server would send."""
        own = self.local.own
        server = replace(own.start, round=max(number - (kind == "train"), 0))
        if kind == "query.sums":
            return own.start.adapter, Instructions(number, learn=self.lesson(number), sums="head", view="online")
        told = replace(own.strategy.instructions(server), round=number, learn=self.lesson(number))
        return own.strategy.broadcast(server, "a"), told

    def lesson(self, number: int) -> Lesson | None:
        found = self.local.sequence
        return None if found is None else found.make_lesson(found.curriculum.task(max(number, 1)))

    def ask(self, kind: str, content: RecordDict) -> Message:
        """The reply. What a failed message did to the client's Flower state is lost, as it is there."""
        context = copy.deepcopy(self.context)
        reply, state = handle_message(self.app, Message(content, 2, kind), context)
        if state is not None:
            self.context.state = state
        return reply

    def answer(self, kind: str, received: AdapterState, told: instructed.Told) -> tuple[Any, ...]:
        return self.seen(self.ask(kind, instructed.content(received, told)))

    def seen(self, reply: Message) -> tuple[Any, ...]:
        """Everything of a reply but the values of its arrays, which are the noised sums, of secrets, which are random,
        and of metrics that the config releases. All numbers have one length, whatever they are.
        """
        if reply.has_error():
            return "error", reply.error.code, reply.error.reason
        content = reply.content
        config = {
            key: {name: _without_values(value) for name, value in record.items()}
            for key, record in content.config_records.items()
        }
        metrics = {
            key: {
                name: type(value).__name__ if self.config.privacy.release_metrics else (type(value), value)
                for name, value in record.items()
            }
            for key, record in content.metric_records.items()
        }
        arrays = {
            name: [(key, value.dtype, tuple(value.shape), len(value.data)) for key, value in record.items()]
            for name, record in content.array_records.items()
        }
        return "ok", str(config), str(metrics), str(arrays), recorddict_to_proto(content).ByteSize()

    def entries(self) -> list[tuple[Any, ...]]:
        """The ledger, without the names of releases, which are hashes of what was sent."""
        return [
            (path.name, entry.round, entry.sample_rate, entry.noise_multiplier, entry.steps)
            for path in sorted(self.local.guard.folder.glob("*.jsonl"))
            for entry in self.local.guard.ledger(path.stem).entries()
        ]


def _without_values(value: Any) -> Any:
    if isinstance(value, bytes):
        return len(value)
    return list(map(_without_values, value)) if isinstance(value, list) else value


VALUES = (torch.nan, torch.inf, -torch.inf, 1e30, 1e20, -1e9, 1e8, 1e5, 30.0, 0.0, 1e-30)


def spoiled(received: AdapterState, honest: Instructions, draw: random.Random) -> tuple[AdapterState, dict[str, Any]]:
    """The request, its instructions as JSON, with one to three things wrong with it, or only unusual."""
    whole = {**received.tensors, **received.extra}
    tensors, told = {key: value.clone() for key, value in whole.items()}, honest.to_json()
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(sorted(tensors)) if tensors else "none"
        draw.choice((_value, _value, _value, _whole, _tensor, _extra, _task, _task, _roles))(tensors, told, key, draw)
    beside = {key for key in tensors if key in received.extra or ":" in key}
    return AdapterState(
        {key: value for key, value in tensors.items() if key not in beside},
        received.sites,
        {key: tensors[key] for key in beside},
    ), told


def _value(tensors, task, key, draw):
    if key in tensors and tensors[key].numel():
        tensors[key].view(-1)[draw.randrange(tensors[key].numel())] = draw.choice(VALUES)


def _whole(tensors, task, key, draw):
    scale = draw.choice(VALUES)
    for name in tensors:
        if draw.random() < 0.7 and tensors[name].is_floating_point():
            tensors[name] = tensors[name] * scale


def _tensor(tensors, task, key, draw):
    if key not in tensors:
        return
    value = tensors.pop(key)
    changed = draw.choice(
        (
            None,
            value[:1],
            value.flatten(),
            value.half(),
            value.double(),
            torch.zeros(0),
            value.long(),
            torch.zeros(2, 0, 3),
        )
    )
    if changed is not None:
        tensors[key] = changed.clone()


def _extra(tensors, task, key, draw):
    site = key.rpartition("/")[0].rpartition(":")[2]
    name = draw.choice(
        (
            f"{site}/residual_B",
            f"{site}/residual_A",
            f"control:{key}",
            f"rates:{key}",
            "mean:features",
            f"{site}/M",
            f"{site}/R",
            "x",
            "../a/A",
            f"{site}/C",
            "",
        )
    )
    tensors[name] = draw.choice((1.0, 1e30)) * torch.ones(draw.choice(((), (0,), (4, 4), (16, 1), (1, 16))))


def _task(tensors, task, key, draw):
    name = draw.choice((*task, "prox_mu", "scaffold", "atp", "static", "learn", "sums", "view", "mode", "seed"))
    if draw.random() < 0.3:
        task.pop(name, None)
    else:
        task[name] = draw.choice(
            (
                None,
                True,
                -1,
                0,
                1,
                2,
                99,
                10**9,
                1e30,
                0.5,
                "A",
                "sketch",
                "../../x",
                [],
                ["A"],
                [1],
                {},
                {"roles": ["A"], "sha256": "0" * 64},
                {"task": 0, "classes": [0]},
                [["A"]],
            )
        )


def _roles(tensors, task, key, draw):
    name = draw.choice(("trains", "uploads", "keeps"))
    task[name] = draw.choice((["A"], ["B"], ["head"], ["A", "head"], ["R"], ["A", "A"], ["control"], ["mean"]))
