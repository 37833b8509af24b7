"""Preferences: of two answers to a question the better one becomes likelier; direct preference optimisation (DPO).

Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7, of a chosen answer c and a rejected one r:

    loss = -log sigmoid(beta [(log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))])

log p is the sum over an answer's tokens, its end token among them; ref is the model before it was trained. What ref
says of a record never changes, so it is computed once, before the first round, and is the record's label: no second
model is in memory, no step needs a second pass, and where a strategy moves the base weights ref stays what it was.

A record is one row of the data, the chosen conversation and after it the rejected one, and two rows in the model.

    >>> import torch
    >>> objective = Preference("preference", beta=0.5)
    >>> says, said = torch.tensor([[-3.0, -9.0]]), torch.tensor([[-4.0, -8.0]])  # log p and log p_ref, of c and r
    >>> round(float(objective.losses(says, said)), 4)  # -log sigmoid(0.5 (1 - (-1)))
    0.3133
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.config.option import option
from fedpeft.data import skipped
from fedpeft.data.encode import Encoded
from fedpeft.data.encode_conversations import PART, encode_pairs
from fedpeft.data.records import Records
from fedpeft.data.stored import Tokens
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE, Objective, divide_or_nan
from fedpeft.objectives.measures import Measure

UNKNOWN = float("inf")  # what the reference says, before it was asked
TIE = 1e-6  # of the log-probabilities: float32 sums of them are no more exact


@dataclass
class PreferenceOptions:
    """Options of `Preference`."""

    beta: float = option(
        0.1, "how much a margin over the reference counts: lower lets the model go further from it", above=0
    )
    reference: str = option(
        "start",
        "what the model is compared with: start is the model as the run begins, with the adapter of adapter.start if "
        "there is one; base is the base model without it",
        choices=("start", "base"),
    )


class Preference(Objective):
    """The better of two answers to a question, by DPO against the model before it was trained."""

    Config = PreferenceOptions
    paper = "Rafailov et al., NeurIPS 2023 (arXiv 2305.18290)"
    records = "text"
    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    labelled = "pairs"
    causal = True
    says = "answers"
    measures: ClassVar[Mapping[str, Measure]] = {
        "reward_margin": Measure("reward of the chosen answer over the rejected one", share=False)
    }
    rows = 2
    referred = True

    def encode(
        self, records: Records, processor: Any, max_length: int, what: str, folder: Path | None = None
    ) -> Encoded:
        """Labels [N, 2] are for what the reference says of both answers: UNKNOWN, and NaN where one is cut away.

        Raises:
            InputError: the records are no pairs.
        """
        if records.wording.form != "preference":
            raise InputError(f"model.task={self.name} learns of pairs of answers, and the {what} are none.")
        columns, fillers, teaches, notes = encode_pairs(records, processor, max_length, what, folder)
        skipped.say(notes)
        labels = np.where(teaches[:, None], UNKNOWN, np.nan).repeat(2, 1).astype(np.float32)
        return Encoded.over(Tokens(columns, fillers, torch.from_numpy(labels)), notes, processor.eos_token_id)

    def score(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probabilities [N, 2] of the chosen and the rejected answer."""
        batch, learned = unfold_pairs(inputs)
        logits = model(**batch).logits[:, :-1]
        targets = batch["input_ids"][:, 1:].masked_fill(~learned[:, 1:], IGNORE)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        losses = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")
        return -losses.sum(1).view(-1, 2)

    def draw_input(self, name: str, mask: Tensor) -> Tensor:
        """Halves of the drawn tokens are the two conversations, all of them answers."""
        if name != PART:
            return super().draw_input(name, mask)
        first = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True) // 2
        return torch.where(first, 2, 4) * mask

    def margins(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Rewards of chosen over rejected answers [N]; NaN where there is nothing to compare."""
        rewards: Tensor = self.config.beta * (scores - targets)
        return rewards[:, 0] - rewards[:, 1]

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        nothing = targets.isnan().any(1)
        # No NaN goes in: masked afterwards alone, the loss would be 0 and its slope still NaN.
        margins = self.margins(scores, targets.masked_fill(nothing[:, None], 0))
        return -F.logsigmoid(margins).masked_fill(nothing, 0)

    def measure(self, scores: Tensor, targets: Tensor, losses: Tensor) -> dict[str, float]:
        """A pair is right where the chosen answer has the higher reward; half of one where they have the same."""
        margins = self.margins(scores.double(), targets.double())
        tied = margins.abs() <= TIE * self.config.beta * scores.double().abs().sum(1)
        right = (margins > 0).double().masked_fill(tied, 0.5)
        sums = {"right": right, "targets": torch.ones_like(right), "margin": margins, "loss": losses}
        return {key: float(value.sum()) for key, value in sums.items()}

    def further(self, sums: Mapping[str, float], samples: int) -> dict[str, float]:
        """`reward_margin`: the mean of beta [(log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))]."""
        return {"reward_margin": divide_or_nan(sums["margin"], samples)}


def unfold_pairs(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The conversations of pairs as rows of their own: inputs [2N, T], and which tokens are of an answer, bool [2N, T].

    Rows 2n and 2n + 1 are the chosen and the rejected conversation of pair n.

    Args:
        inputs: each [N, W], PART among them.
    """
    part = inputs[PART] * inputs["attention_mask"]
    # PART is 1 and 2 in the chosen conversation, 3 and 4 in the rejected one; what is even is the answer.
    sizes = torch.stack([((part == 1) | (part == 2)).sum(1), (part > 2).sum(1)], dim=1)
    starts = torch.stack([torch.zeros_like(sizes[:, 0]), sizes[:, 0]], dim=1).flatten()[:, None]
    places = torch.arange(max(1, int(sizes.max())), device=part.device)
    there = places < sizes.flatten()[:, None]
    # Places behind the end of a row are masked below; until then `gather` must find something there.
    taken = (starts + places).clamp(max=part.shape[1] - 1)
    rows = {
        name: value.repeat_interleave(2, dim=0).gather(1, taken).masked_fill(~there, 0)
        for name, value in inputs.items()
    }
    # A row without a token attends to its first place: a softmax of nothing would be no number.
    rows["attention_mask"] = (there | (places == 0)).to(inputs["attention_mask"].dtype)
    answers = (rows.pop(PART) % 2 == 0) & there
    return rows, answers
