"""WordNet glosses by lexicographer file, 35 real classes, on MiniLM whose lower half is computed once.

Only layers 4-6 can be adapted, so what leaves layer 3 is the input of the stream: hidden states [N, tokens, 384] in
half precision, cached beside the prepared data. A training step then costs half of a whole one. Features are the mean
over tokens of layer 6, normalised. Records are the same for every seed; the order of classes is drawn from it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.config import DataConfig, ModelConfig, option
from fedpeft.continual.streams import cache
from fedpeft.continual.streams.base import Material, StreamSource, per_class
from fedpeft.data import source
from fedpeft.data.encode import Encoded, encode
from fedpeft.models import loading
from fedpeft.models.base import Base

CLASSES, LOWER = 35, 3
TASK = "sequence-classification"
LAYERS = ["query", "value"]
BATCH = 64


class WordNet(StreamSource):
    """Glosses of nouns and verbs; needs the prepared `wordnet` and `minilm`."""

    name = "wordnet"
    summary = "WordNet glosses, 35 classes in 10 tasks, the upper half of MiniLM"

    @dataclass
    class Config:
        tasks: int = option(10, "tasks that the classes are cut into", low=1, high=CLASSES)
        train: int = option(100, "training records a class, at most", low=2)
        test: int = option(40, "test records a class, at most", low=1)
        max_length: int = option(24, "longest gloss in tokens; the end of longer ones is cut", low=4)

    def records(self, seed: int) -> Material:
        # Both are asked for first: what is missing should be said before MiniLM is loaded.
        cache.about("wordnet"), cache.about("minilm")
        base = loading.load(ModelConfig(name="minilm", task=TASK, max_length=self.config.max_length), CLASSES, 0)
        settings = {
            "train": self.config.train,
            "test": self.config.test,
            "max_length": self.config.max_length,
            "lower": LOWER,
        }
        found = cache.tensors(f"layer{LOWER}", "wordnet", settings, lambda: self._lower_states(base), also=("minilm",))
        train, test = (
            Encoded(
                {"inputs_embeds": found[f"{which}/hidden"], "attention_mask": found[f"{which}/mask"].long()},
                found[f"{which}/labels"],
            )
            for which in ("train", "test")
        )
        return Material(train, test, upper_half(base), LAYERS)

    def _lower_states(self, base: Base) -> dict[str, Tensor]:
        """Hidden states of all chosen records after the lower layers."""
        half = lower_half(base)
        found: dict[str, Tensor] = {}
        parts = source.load(DataConfig(source="wordnet"), TASK, 0)
        for which, part in zip(("train", "test"), parts, strict=True):
            part = part.take(per_class(part.labels, getattr(self.config, which), 0, f"wordnet {which}"))
            data = encode(part, base.processor, TASK, self.config.max_length)
            with torch.no_grad():
                hidden = [
                    half(
                        **{name: value[start : start + BATCH] for name, value in data.inputs.items()}
                    ).last_hidden_state.half()
                    for start in range(0, len(data), BATCH)
                ]
            found |= {
                f"{which}/hidden": torch.cat(hidden),
                f"{which}/labels": data.labels,
                f"{which}/mask": data.inputs["attention_mask"].to(torch.uint8),
            }
        return found


class _Given(nn.Module):
    """Takes the place of the embeddings: the hidden states come from outside."""

    def forward(self, inputs_embeds: Tensor, **unused: Any) -> Tensor:
        return inputs_embeds


def lower_half(base: Base, layers: int = LOWER) -> Any:
    """A copy of a BERT with its first layers only."""
    # A copy: `upper_half` takes these layers off the base itself.
    half: Any = copy.deepcopy(base.backbone)
    half.encoder.layer, half.pooler = half.encoder.layer[:layers], None
    return half


def upper_half(base: Base, layers: int = LOWER) -> Base:
    """The base without its first layers and its unused pooler; its inputs are `inputs_embeds` and `attention_mask`."""
    model: Any = base.backbone
    model.encoder.layer, model.embeddings, model.pooler = model.encoder.layer[layers:], _Given(), None
    # The cache is in half precision, the layers compute in their own.
    whole, dtype = base.forward, model.dtype
    return replace(base, forward=lambda batch: whole({**batch, "inputs_embeds": batch["inputs_embeds"].to(dtype)}))
