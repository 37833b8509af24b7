"""A stock Flower simulation: peft on the clients, FedAvg on the server, Ray in between. Nothing of fedpeft is in it.

Each actor keeps the model and the records it has loaded, which is faster than to build them for every message. The
module has to be imported, not run: Ray's actors look its functions up by its name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

client, server = ClientApp(), ServerApp()


@cache
def model(folder: str, rank: int, alpha: int) -> Any:
    """A classifier of a folder with LoRA on query and value, in training mode; the same weights in every process."""
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, target_modules=["query", "value"])
    return get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), config).train()


@cache
def records(folder: str, path: str, seq: int) -> tuple[Any, torch.Tensor]:
    """Tokenised texts and int64 labels [N] of a csv file with the columns text and label."""
    rows = list(csv.DictReader(Path(path).read_text().splitlines()))
    texts = AutoTokenizer.from_pretrained(folder)(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=seq, return_tensors="pt"
    )
    return texts, torch.tensor([int(row["label"]) for row in rows])


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train a client's share of the records, those whose number is its own modulo the clients, for the job's steps."""
    job = json.loads(str(message.content["config"]["job"]))
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    texts, labels = records(job["model"], job["train"], job["seq"])
    mine = torch.arange(part, len(labels), parts)
    local = model(job["model"], job["rank"], job["alpha"])
    set_peft_model_state_dict(local, message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.AdamW([value for value in local.parameters() if value.requires_grad], lr=job["lr"])
    for _ in range(job["steps"]):
        index = mine[torch.randperm(len(mine))[: job["batch"]]]
        optimizer.zero_grad()
        local(**{name: value[index] for name, value in texts.items()}, labels=labels[index]).loss.backward()
        optimizer.step()
    arrays, metrics = ArrayRecord(get_peft_model_state_dict(local)), MetricRecord({"num-examples": len(mine)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Complete(FedAvg):
    """FedAvg that does not go on without a client's answer."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        answers = list(replies)
        failed = [reply for reply in answers if reply.has_error()]
        if failed or len(answers) < self.min_available_nodes:
            raise RuntimeError(f"{len(answers)} answers, of which errors: {failed[:1]}")
        return super().aggregate_train(server_round, answers)


def main(path: str) -> None:
    """Run the job of a JSON file and save the last adapter, which has to differ from the first."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text())

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        start = get_peft_model_state_dict(model(job["model"], job["rank"], job["alpha"]))
        strategy = Complete(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=job["clients"])
        result = strategy.start(
            grid, ArrayRecord(start), num_rounds=job["rounds"], train_config=ConfigRecord({"job": json.dumps(job)})
        )
        end = result.arrays.to_torch_state_dict()
        if all(torch.equal(end[key], value) for key, value in start.items()):
            raise RuntimeError("nothing was trained")
        torch.save(end, job["out"])

    run_simulation(
        server,
        client,
        num_supernodes=job["clients"],
        backend_config={
            "init_args": {"num_cpus": 1, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": job["gpus"]},
        },
    )
    if not Path(job["out"]).exists():
        raise SystemExit("Flower's run ended without a result; its log above says why.")
