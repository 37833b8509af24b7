"""Texts some of whose tokens are hidden and have to be told: the rule of BERT (Devlin et al., NAACL 2019, 3.1).

Each token that is no special one is chosen with a probability of 0.15; of those chosen 80 % are replaced by the mask
token, 10 % by one drawn from the vocabulary, and 10 % stay. It is what transformers' DataCollatorForLanguageModeling
does, but that a text of which none is chosen has one chosen, so that no text teaches nothing.

What is drawn of a text hangs on the seed and on its tokens alone: not on where it stands, nor on any other text. So a
private client's records are apart, and a site draws what a simulation does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.data.ragged import BLOCK
from fedpeft.data.stored import Tokens
from fedpeft.objectives.base import IGNORE

CHOSEN, REPLACED, DRAWN = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer says of its tokens.

    Attributes:
        size: how many there are.
        special: those that are no part of a text.
        mask: the one that hides others.
    """

    size: int
    special: tuple[int, ...]
    mask: int

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """That of a tokenizer with a mask token."""
        return cls(len(tokenizer), tuple(sorted(tokenizer.all_special_ids)), tokenizer.mask_token_id)


class MaskedTokens(Tokens):
    """Texts as flat arrays of token ids, of which each look hides some; labels are what they were.

    Args:
        tokens: the texts.
        seed: of what is hidden.
    """

    def __init__(self, tokens: Tokens, vocabulary: Vocabulary, seed: int = 0) -> None:
        super().__init__(tokens.columns, tokens.fillers, tokens.ids, since=0)
        self.vocabulary, self.seed = vocabulary, seed

    def redrawn(self, seed: int) -> MaskedTokens:
        """The same texts with others hidden."""
        other = copy.copy(self)
        other.seed = seed
        return other

    @cached_property
    def teaches(self) -> np.ndarray:
        """Whether each text has a token that can be hidden, bool [N]."""
        found = []
        for start in range(0, len(self), BLOCK):
            values, ends = self.ids.joined(np.arange(start, min(start + BLOCK, len(self))))
            plain = np.concatenate([[0], np.cumsum(~np.isin(values, self.vocabulary.special))])
            found.append(plain[ends[1:]] > plain[ends[:-1]])
        return np.concatenate([np.zeros(0, dtype=bool), *found])

    def inputs_of(self, rows: np.ndarray | None) -> dict[str, Tensor]:
        inputs = super().inputs_of(rows)
        for place, row in enumerate(np.arange(len(self)) if rows is None else rows):
            hidden, shown = self._draw(int(row))
            inputs["input_ids"][place, torch.from_numpy(hidden)] = torch.from_numpy(shown)
        return inputs

    def labels_of(self, rows: np.ndarray | None) -> Tensor:
        rows = np.arange(len(self)) if rows is None else rows
        labels = torch.full((len(rows), self.longest), IGNORE)
        for place, row in enumerate(rows):
            hidden, _ = self._draw(int(row))
            labels[place, torch.from_numpy(hidden)] = torch.from_numpy(self._ids_of(int(row))[hidden].astype(np.int64))
        return labels

    def _ids_of(self, row: int) -> np.ndarray:
        return self.ids.values[self.ids.ends[row] : self.ids.ends[row + 1]]

    def _draw(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the tokens of a text that are hidden, and what stands there instead, both int64."""
        ids = self._ids_of(row)
        rng = seeds.numpy_generator(self.seed, "mask", ids.tobytes().hex())
        chance, kind = rng.random((2, len(ids)))
        words = rng.integers(0, self.vocabulary.size, len(ids))
        # After all draws, so that what is drawn of a place does not hang on what is special.
        chance[np.isin(ids, self.vocabulary.special)] = np.inf
        hidden = np.flatnonzero(chance < CHOSEN)
        if not len(hidden) and np.isfinite(chance).any():
            hidden = chance.argmin(keepdims=True)
        shown = np.select(
            [kind[hidden] < REPLACED, kind[hidden] < REPLACED + DRAWN],
            [np.int64(self.vocabulary.mask), words[hidden]],
            ids[hidden].astype(np.int64),
        )
        return hidden, shown
