"""All engines of `fedpeft bench speed` get the same work: a model, clients, and the records of every step.

Weights and records are random: their values cost no time, and show nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.clients.cohort.engine import Job
from fedpeft.clients.train import Private, index_batches
from fedpeft.config import AdapterConfig, ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Seeded
from fedpeft.privacy.plan import Plan

LABELS = 4
LORA = AdapterConfig(r=8, alpha=16.0)
CLIENT = ClientConfig(lr=1e-3, local_epochs=None)
POSITIONS = 514
# Kind of model and what its transformers config says of the size.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": (
        "Bert",
        {
            "vocab_size": 258,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    ),
    "S": (
        "Bert",
        {
            "vocab_size": 258,
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
    ),
    "minilm": (
        "Bert",
        {
            "vocab_size": 30522,
            "num_hidden_layers": 6,
            "hidden_size": 384,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
    ),
    "roberta-base": (
        "Roberta",
        {
            "vocab_size": 50265,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "type_vocab_size": 1,
        },
    ),
    "roberta-large": (
        "Roberta",
        {
            "vocab_size": 50265,
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "type_vocab_size": 1,
        },
    ),
}


class Apart:
    """Sampling and noise from two streams: an engine with other noise can still take the same records."""

    def __init__(self, seed: int) -> None:
        self.draws, self.noise = Seeded(seed, "draws"), Seeded(seed, "noise")

    def uniform(self, count: int) -> np.ndarray:
        return self.draws.uniform(count)

    def normal(self, count: int) -> np.ndarray:
        return self.noise.normal(count)


@dataclass(frozen=True)
class Work:
    """What every engine is given: the adapter to start from, the clients' records, and the steps to take."""

    start: dict[str, Tensor]
    data: list[Encoded]
    config: ClientConfig
    plan: Plan
    seed: int = 0

    def drawn(self, client: int, dp: bool) -> list[np.ndarray]:
        """Records of each step of one client."""
        count = len(self.data[client])
        if not dp:
            return list(index_batches(count, self.config, seeds.numpy_generator(self._seed(client), "batches")))
        private = self.private(client)
        private.secret_seed()  # what our engines take from the source first
        return [self.plan.sample(count, private.source) for _ in range(self.plan.steps)]

    def private(self, client: int) -> Private:
        """A client's plan with its source from the start: every call draws the same again."""
        return Private(self.plan, Apart(self._seed(client)))

    def job(self, client: int, dp: bool) -> Job:
        """A client's job for our trainers, private under DP."""
        return Job(self.start, self.data[client], self._seed(client), private=self.private(client) if dp else None)

    def _seed(self, client: int) -> int:
        return seeds.derive(self.seed, "client", client)


def work(
    start: dict[str, Tensor], clients: int, batch: int, seq: int, steps: int, sigma: float = 1.0, clip: float = 1.0
) -> Work:
    """Random records. The private draws have as many records in all as the batches, or miss by at most 1 %: the seed is
    the first of which that holds.
    """
    count = max(32, 4 * batch)
    data = []
    for client in range(clients):
        generator = seeds.torch_generator(0, "bench", "speed", client)
        ids = torch.randint(2, 258, (count, seq), generator=generator)
        data.append(
            Encoded(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                torch.randint(0, LABELS, (count,), generator=generator),
            )
        )
    plan = Plan(batch / count, float(batch), clip, sigma, steps, Budget(8.0, 1e-5, "rdp"))
    made = Work(start, data, replace(CLIENT, local_steps=steps, batch_size=batch), plan)
    wanted = clients * batch * steps
    while abs(sum(len(index) for client in range(clients) for index in made.drawn(client, True)) / wanted - 1) > 0.01:
        made = replace(made, seed=made.seed + 1)
    return made


def backbone(name: str) -> Any:
    """The transformers classifier of this shape; the same weights at every call."""
    import transformers

    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForSequenceClassification")(config)
