"""What `fedpeft bench scale` measures at one point: a simulation of given sizes, or a sequence of tasks.

Of a simulation: CPU seconds from the command to the first round ("start s": model, data, clients), of a round ("round
s": the mean of those after the first), from the last round to the end ("results s": adapter, report), of resuming the
finished run in the same process ("resume s"), of `privacy ledger` over as many accounts as there are clients ("ledger
s"), and the peak of resident memory. Of a sequence: seconds and bytes of the last task, by body and head.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fedpeft import seeds
from fedpeft.simulations.benchmarks.server_cost import resident

ROUNDS, TEST = 3, 32
TASKS = {  # body and its options, with the heads that are fitted beside it: what is kept of old tasks
    "coso": ({"side": "in"}, "subspace"),
    "inflora": ({}, "subspace"),
    "olora": ({}, "an adapter a task"),
    "er": ({"form": "lora"}, "replay"),
}
HEADS = ("lda", "ranpac")  # Gram matrices over all classes
RECORDS = 20  # training records of each of a task's two classes


@dataclass(frozen=True)
class Size:
    """A simulation: clients in all and a round, records of each, and the model that they tune."""

    clients: int = 8
    asked: int = 8
    records: int = 4
    rank: int = 8
    tokens: int = 16
    layers: int = 2
    width: int = 32
    classes: int = 4
    batch: int = 2
    epochs: bool = False  # one pass over a client's records; else one step


LARGE = Size(tokens=64, layers=2, width=64)
SIZES: dict[str, Size] = {  # the sizes that stay, by axis
    "clients": Size(asked=64, records=2),
    "asked": Size(records=2),
    "records": Size(epochs=True, batch=8),
    "rank": LARGE,
    "tokens": LARGE,
    "layers": LARGE,
    "classes": Size(records=625),
}


def measure(axis: str, value: int, quick: bool = False) -> dict[str, float]:
    """What this point costs, by the name of the quantity. Called in a process of its own."""
    torch.set_num_threads(1)
    if axis == "tasks":
        return learn_tasks(value)
    size = SIZES[axis]
    if axis == "classes" and quick:
        size = replace(size, records=10)
    changed: dict[str, Any] = {"asked": value, "clients": value} if axis == "asked" else {axis: value}
    size = replace(size, **changed)
    found = simulate_size(replace(size, asked=min(size.asked, size.clients)), resumes=axis == "clients")
    return found | ({"ledger s": read_ledgers(value)} if axis == "clients" else {})


def simulate_size(size: Size, resumes: bool) -> dict[str, float]:
    """Seconds of a run's parts, and its peak memory."""
    from fedpeft.simulations import run

    marks: dict[str, float] = {}

    def watch(event: dict[str, Any]) -> None:
        marks[f"{event['event']} {event.get('round', '')}".strip()] = time.process_time()

    with TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder / "model", size)
        write_texts(folder / "train.csv", size.clients * size.records, size)
        write_texts(folder / "test.csv", TEST, size)
        begun = time.process_time()
        run.simulate(config_of(folder, size), out=folder / "run", on_event=watch)
        done = time.process_time()
        each = (marks[f"round {ROUNDS}"] - marks["round 1"]) / (ROUNDS - 1)
        found = {
            "start s": marks["round 1"] - begun - each,
            "round s": each,
            "results s": done - marks[f"round {ROUNDS}"],
        }
        if resumes:
            run.resume(folder / "run")
            found["resume s"] = time.process_time() - done
    peak = resident("VmHWM")
    return found | ({} if peak is None else {"peak MB": peak / 1e6})


def config_of(folder: Path, size: Size) -> dict[str, Any]:
    """The config of the run."""
    steps = {"local_epochs": 1} if size.epochs else {"local_steps": 1, "local_epochs": None}
    return {
        "model": {"name": str(folder / "model"), "task": "sequence-classification", "max_length": size.tokens},
        "adapter": {"r": size.rank},
        "data": {
            "source": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "clients": size.clients,
            "partition": {"name": "iid"},
            "cache": str(folder / "cache"),
        },
        "client": {**steps, "batch_size": size.batch},
        "run": {"rounds": ROUNDS, "clients_per_round": size.asked, "baselines": False, "evaluate_every": ROUNDS},
    }


def write_model(folder: Path, size: Size) -> None:
    """A BERT of this size with random weights, and a tokenizer of bytes."""
    import transformers

    from fedpeft.models.embedded import byte_tokenizer

    config = transformers.BertConfig(
        vocab_size=258,
        num_hidden_layers=size.layers,
        hidden_size=size.width,
        num_attention_heads=2,
        intermediate_size=2 * size.width,
        max_position_embeddings=size.tokens + 2,
        pad_token_id=0,
        num_labels=size.classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_texts(path: Path, count: int, size: Size) -> None:
    """Random letters, with labels in turn."""
    generator = seeds.numpy_generator(0, "bench", "scale", path.name)
    letters = generator.integers(ord("a"), ord("z") + 1, (count, size.tokens), dtype=np.uint8)
    rows = [f"{bytes(row).decode()},{index % size.classes}" for index, row in enumerate(letters)]
    path.write_text("\n".join(["text,label", *rows, ""]))


def read_ledgers(clients: int) -> float:
    """Seconds of `privacy ledger` over the accounts of so many clients, each of which has answered once."""
    from fedpeft.privacy import ledger
    from fedpeft.privacy.ledger import Entry

    with TemporaryDirectory() as made:
        folder = Path(made) / "ledger"
        folder.mkdir()
        for client in range(clients):
            # Clients of five sizes: sample rates differ, and so do costs.
            entry = Entry("run", 1, f"{client:064x}", 0.01 + client % 5 / 100, 1.0, 4)
            (folder / f"client-{client:06d}.jsonl").write_text(ledger.line_of(entry))
        begun = time.process_time()
        ledger.read_account(Path(made), 1e-5, "rdp")
        return time.process_time() - begun


def learn_tasks(tasks: int) -> dict[str, float]:
    """CPU seconds of the last of so many tasks of two classes, and MB kept, by body, and by head of a frozen body."""
    from fedpeft.continual import nets, stream
    from fedpeft.continual.body import TrainConfig
    from fedpeft.continual.learner import Learner
    from fedpeft.continual.model import Plastic
    from fedpeft.continual.streams.signals import draw_signals

    classes = 2 * tasks
    train, test = (draw_signals(classes, count, 0, which) for which, count in (("train", RECORDS), ("test", 2)))
    groups = [[2 * task, 2 * task + 1] for task in range(tasks)]
    plan = stream.plan("scale", "class", train.labels.numpy(), test.labels.numpy(), groups, 0)
    made = stream.build(plan, train, test)
    base = nets.glyph_net("signals", classes)
    found: dict[str, float] = {}
    cases = [(body, body, options, "linear") for body, (options, _) in TASKS.items()]
    cases += [(head, "frozen", {}, head) for head in HEADS]
    for name, body, options, head in cases:
        learner = Learner(made, Plastic(base, nets.LAYERS), body, {head: {}}, TrainConfig(epochs=1), 0, options)
        ends: list[float] = []
        learner.run(on_task=lambda *_, ends=ends: ends.append(time.process_time()))
        kept = learner.ledger[-1]
        found[f"{name}: last task s"] = ends[-1] - ends[-2]
        found[f"{name}: kept MB"] = (sum(kept["stored_bytes"].values()) + kept["head_bytes"]) / 1e6
    return found
