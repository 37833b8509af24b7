"""A stock simulation on pfl-research (arXiv 2404.06430): peft on the clients, its FedAvg. Nothing of fedpeft is in it.

pfl's pins exclude the accountant that fedpeft needs, so it is no dependency. Without its own dependencies it runs
beside us: `pip install --no-deps pfl==0.6.0 prv-accountant==0.2.0`. It trains clients one after another in one process.
Its evaluation of every client in the first round, which cannot be switched off, is left out: that is in pfl's favour.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(nn.Module):
    """What pfl asks of a model: its loss, given a user's records."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of token ids [N, T] under their mask, labels [N]."""
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    def metrics(self, *_: Tensor) -> dict[str, Any]:
        """No metrics: the loop is timed, not judged."""
        return {}


def read_texts(job: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Tokens and labels of the job's records."""
    rows = list(csv.DictReader(Path(job["train"]).read_text().splitlines()))
    texts = AutoTokenizer.from_pretrained(job["model"])(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=job["seq"], return_tensors="pt"
    )
    labels = torch.tensor([int(row["label"]) for row in rows])
    return texts, labels


def main(path: str) -> None:
    """Run the job of a JSON file and save the last adapter, which has to differ from the first."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text())
    os.environ["PFL_PYTORCH_DEVICE"] = "cuda" if job["gpus"] else "cpu"
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data import FederatedDataset
    from pfl.data.dataset import Dataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Unevaluated(PyTorchModel):  # type: ignore[misc]
        def evaluate(self, *_: Any, **__: Any) -> Any:
            return Metrics()

    texts, labels = read_texts(job)

    def records(part: int) -> Any:
        mine = torch.arange(part, len(labels), job["clients"])
        mine = mine[torch.randperm(len(mine))]
        return Dataset([texts["input_ids"][mine], texts["attention_mask"][mine], labels[mine]], user_id=part)

    torch.manual_seed(0)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=job["rank"], lora_alpha=job["alpha"], target_modules=["query", "value"]
    )
    tuned = get_peft_model(AutoModelForSequenceClassification.from_pretrained(job["model"]), config).train()
    start = {key: value.clone() for key, value in get_peft_model_state_dict(tuned).items()}
    trained = [value for value in tuned.parameters() if value.requires_grad]
    model = Unevaluated(
        Classifier(tuned),
        lambda values, lr: torch.optim.AdamW([value for value in values if value.requires_grad], lr=lr),
        torch.optim.SGD(trained, lr=1.0),
    )
    every = iter(list(range(job["clients"])) * job["rounds"])
    data = FederatedDataset(records, lambda: next(every))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=job["rounds"],
            evaluation_frequency=job["rounds"],
            train_cohort_size=job["clients"],
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=job["steps"],
            local_learning_rate=job["lr"],
            local_batch_size=job["batch"],
        ),
    )
    end = get_peft_model_state_dict(tuned)
    if all(torch.equal(end[key], value) for key, value in start.items()):
        raise SystemExit("nothing was trained")
    torch.save(end, job["out"])
