"""Objectives that are no class of a whole record: records of each in a file, its labels drawn, its loss written out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted, build
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE
from support import small_models as small


@dataclass
class Case:
    """An objective as tests run it.

    Attributes:
        kind: the small model.
        outputs: of its head; 0 where it has none.
        row: record by number, as it stands in a jsonl file.
        draw: labels of texts [N, T] with their mask, from a generator.
        loss: of one record, of its scores and labels in float64, by the definition.
        also: other inputs than ids and mask, of texts.
        stock: scores of the first record of a batch, by a model of transformers.
    """

    kind: str
    outputs: int
    row: Callable[[int], dict[str, Any]]
    draw: Callable[[Encoded, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], float]
    also: Callable[[Encoded], dict[str, Tensor]] = lambda texts: {}
    stock: Callable[[Any, dict[str, Tensor]], Tensor] = lambda model, inputs: model(**inputs).logits[0]
    config: dict[str, Any] = field(default_factory=dict)


WORDS = ("red", "green", "blue", "grey", "pale")


def _squared(scores: Tensor, targets: Tensor) -> float:
    return sum((float(y) - float(t)) ** 2 for y, t in zip(scores, targets, strict=True)) / len(targets)


def _binary(scores: Tensor, targets: Tensor) -> float:
    total = 0.0
    for score, wanted in zip(scores.double().tolist(), targets.tolist(), strict=True):
        total -= math.log(1 / (1 + math.exp(-score if wanted else score)))
    return total / len(targets)


def _tags(scores: Tensor, targets: Tensor) -> float:
    rows = [(row, int(tag)) for row, tag in zip(scores.double().tolist(), targets, strict=True) if tag >= 0]
    return sum(math.log(sum(map(math.exp, row))) - row[tag] for row, tag in rows) / len(rows)


def _some_tagged(texts: Encoded, rng: torch.Generator) -> Tensor:
    """A tag at the first two tokens and at about half of the others."""
    mask = texts.inputs["attention_mask"]
    tags = torch.randint(0, 3, mask.shape, generator=rng)
    kept = torch.rand(mask.shape, generator=rng) < 0.5
    kept[:, :2] = True
    return tags.where(kept & (mask == 1), torch.tensor(IGNORE))


def _preferred(scores: Tensor, targets: Tensor) -> float:
    """DPO with beta = 0.1, of log-probabilities of both answers and those of the reference."""
    says, said = scores.double().tolist(), targets.double().tolist()
    return -math.log(1 / (1 + math.exp(-0.1 * ((says[0] - said[0]) - (says[1] - said[1])))))


def _halves(texts: Encoded) -> dict[str, Tensor]:
    """The first half of each text is the chosen conversation, the second the rejected one; first tokens are asked."""
    mask = texts.inputs["attention_mask"]
    place, first = torch.arange(mask.shape[1]).expand(mask.shape), (mask.sum(1, keepdim=True) // 2).clamp(min=2)
    part = torch.where(place < first, 1, 3) + ((place > 0) & (place != first)).long()
    return {"part": part * mask}


def _two_passes(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the chosen and the rejected answer of the first pair, each in a pass of its own."""
    ids, part, found = inputs["input_ids"][0], inputs["part"][0], []
    for values in ((1, 2), (3, 4)):
        own = torch.isin(part, torch.tensor(values))
        says = model(input_ids=ids[own][None]).logits[0].double().log_softmax(-1)
        places = [place for place, value in enumerate(part[own].tolist()) if value == values[1] and place > 0]
        found.append(sum((says[place - 1, ids[own][place]] for place in places), torch.zeros(()).double()))
    return torch.stack(found)


def _answer_first(texts: Encoded) -> dict[str, Tensor]:
    """The first half of each text, and more than that, is the answer, the rest what is asked."""
    mask = texts.inputs["attention_mask"]
    first = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True) // 2 + 1
    return {"part": torch.where(first, 1, 2) * mask}


def _of_answer(scores: Tensor, labels: Tensor) -> float:
    """The answer stands at the start of its record."""
    return _tags(scores, labels[: len(scores)])


def _both_halves(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of the first record's answer, each token behind those before it and the mark of the start."""
    ids, part = inputs["input_ids"][0], inputs["part"][0]
    start = torch.tensor([model.config.decoder_start_token_id])
    said = torch.cat([start, ids[part == 1][:-1]])
    asked = ids[part == 2] if (part == 2).any() else torch.zeros(1, dtype=torch.long)
    return model(input_ids=asked[None], attention_mask=torch.ones(1, len(asked)), decoder_input_ids=said[None]).logits[
        0
    ]


CASES = {
    "seq2seq": Case(
        "bart",  # T5's softmax and norms are float32 in a float64 model, so its gradients are no more exact
        0,
        lambda n: {"prompt": f"{WORDS[n % 5]} {n}", "completion": f"{WORDS[n % 5]}!"},
        lambda texts, rng: texts.inputs["input_ids"].where(_answer_first(texts)["part"] == 1, torch.tensor(IGNORE)),
        _of_answer,
        _answer_first,
        _both_halves,
    ),
    "preference": Case(
        "llama",
        0,
        lambda n: {"prompt": f"{WORDS[n % 5]}?", "chosen": f"it is {n}", "rejected": f"{WORDS[n % 3]}!"},
        lambda texts, rng: -5 * torch.rand(len(texts), 2, generator=rng),
        _preferred,
        _halves,
        _two_passes,
    ),
    "masked-lm": Case(
        "bert-mlm",
        0,
        lambda n: {"text": f"{WORDS[n % 5]} and {WORDS[n % 3]} {n}"},
        lambda texts, rng: texts.inputs["input_ids"].where(_some_tagged(texts, rng) != IGNORE, torch.tensor(IGNORE)),
        _tags,
    ),
    "regression": Case(
        "bert",
        2,
        lambda n: {"text": f"{WORDS[n % 5]} {n}", "label": [n % 5, n % 3 - 0.5]},
        lambda texts, rng: torch.randn(len(texts), 2, generator=rng),
        _squared,
    ),
    "token-classification": Case(
        "bert",
        3,
        lambda n: {"tokens": [WORDS[n % 5], "is", f"{n}"], "ner_tags": ["colour", "O", ("even", "O")[n % 2]]},
        _some_tagged,
        _tags,
    ),
    "multi-label": Case(
        "bert",
        3,
        lambda n: {"text": f"{WORDS[n % 5]} {n}", "label": [name for k, name in enumerate("abc") if n % (k + 2)]},
        lambda texts, rng: torch.randint(0, 2, (len(texts), 3), generator=rng).float(),
        _binary,
    ),
}


def write(name: str, path: Path, count: int = 60) -> Path:
    """A file of this many records."""
    path.write_text("".join(json.dumps(CASES[name].row(number)) + "\n" for number in range(count)))
    return path


def records(name: str, count: int, seed: int = 0) -> Encoded:
    """Texts of unequal lengths with labels of the objective."""
    texts = small.texts(count, seed=seed)
    return Encoded(
        {**texts.inputs, **CASES[name].also(texts)}, CASES[name].draw(texts, torch.Generator().manual_seed(seed))
    )


def adapted(name: str, folder: Path, seed: int = 0) -> Adapted:
    """The small model of an objective, with a LoRA."""
    return build(ModelConfig(name=str(folder), task=name), AdapterConfig(), CASES[name].outputs, seed)
