"""Token classification: a head scores the tags of each word; a text's loss is the mean over its words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedpeft.data import skipped
from fedpeft.data.encode import Encoded
from fedpeft.data.records import Records
from fedpeft.data.tagged import encode_tagged
from fedpeft.objectives.base import IGNORE, Objective
from fedpeft.objectives.measures import Measure


class TokenClassification(Objective):
    """A tag for each word, such as the kind of name that it belongs to; the word's first token says it."""

    records = "text"
    auto_class = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"
    labelled = "tags"
    measures: ClassVar[Mapping[str, Measure]] = {"f1": Measure("F1 of words, mean over tags")}

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        tokens, notes = encode_tagged(records, processor, max_length, what, folder)
        skipped.say(notes)
        return Encoded.over(tokens, notes)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean over a text's own words [N]: a mean over the batch's would couple the samples."""
        losses = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
        return losses.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        """Also how often each tag is right, is there and is said."""
        sums, known = super().measure(scores, targets, losses), targets != IGNORE
        said, there, tags = scores.argmax(-1)[known], targets[known], scores.shape[-1]
        counts = {"right": there[said == there], "there": there, "said": said}
        return sums | {
            f"{what}/{tag}": count
            for what, values in counts.items()
            for tag, count in enumerate(values.bincount(minlength=tags).tolist())
        }

    def further(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`f1`: mean over the tags that some word has, or is said to have."""
        tags = [key.partition("/")[2] for key in sums if key.startswith("there/")]
        each = {tag: sums[f"there/{tag}"] + sums[f"said/{tag}"] for tag in tags}
        values = [2 * sums[f"right/{tag}"] / count for tag, count in each.items() if count]
        return {"f1": sum(values) / len(values)} if values else {}

    def say(self, scores: Tensor, labels: Tensor, names: Sequence[str], inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The words of each text and their tags; labels are the words' numbers. A word that was cut off has None."""
        found = []
        for row, places, text in zip(scores.argmax(-1), labels, inputs, strict=True):
            words = json.loads(str(text))[0]
            tags: list[str | None] = [None] * len(words)
            for token in (places != IGNORE).nonzero().flatten().tolist():
                tags[int(places[token])] = names[int(row[token])]
            found.append({"tokens": words, "tags": tags})
        return found
