"""The batch of a cohort's step, cut into passes over the model, and put together from the clients' records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE, by_token

LONGEST = 2.0  # padded tokens of a pass / tokens asked for: a planned batch that comes out longer is seldom cut
WASTE = 0.125  # tokens of a pass that are padding / tokens asked for: costs what another pass would cost in overhead


@dataclass(frozen=True)
class Piece:
    """Samples of one pass, sorted by client.

    Attributes:
        clients: row of each sample's client.
        records: each sample's number in its client's data.
        width: tokens of the longest.
    """

    clients: np.ndarray
    records: np.ndarray
    width: int

    def groups(self) -> np.ndarray:
        """Rows of the clients, once each, if all present bring equally many samples; else of every sample."""
        present, counts = np.unique(self.clients, return_counts=True)
        return present if (counts == counts[0]).all() else self.clients


def token_counts(model: Adapted, data: Encoded) -> np.ndarray:
    """Tokens of each record, without padding; of an image, its patches (of 16 x 16 where the model does not say)."""
    form = data.view(np.arange(0)).inputs
    if "attention_mask" in form:
        return data.lengths
    height, width = next(iter(form.values())).shape[-2:]
    settings: Any = getattr(model.base.backbone, "config", None)
    patch = np.broadcast_to(getattr(settings, "patch_size", None) or 16, 2)
    return np.full(len(data), -(-height // int(patch[0])) * -(-width // int(patch[1])) + 1)


def cut_passes(lengths: list[np.ndarray], drawn: list[np.ndarray], tokens: int) -> Iterator[Piece]:
    """The records that each client has drawn, in one pass if it is not too long or too much of it padding, else sorted
    by length in several.
    """
    clients = np.repeat(np.arange(len(drawn)), [len(index) for index in drawn])
    if len(clients) == 0:
        return
    records = np.concatenate(drawn)
    width = np.concatenate([own[index] for own, index in zip(lengths, drawn, strict=True)])

    def fits(chosen: np.ndarray) -> bool:
        padded, used = len(chosen) * width[chosen].max(), width[chosen].sum()
        return len(chosen) == 1 or bool(padded <= min(LONGEST * tokens, used + WASTE * tokens))

    def piece(chosen: np.ndarray) -> Piece:
        chosen = np.sort(chosen)  # back to clients' order
        return Piece(clients[chosen], records[chosen], max(1, int(width[chosen].max())))

    order = np.arange(len(clients))
    if fits(order):
        yield piece(order)
        return
    # Stable: records of one length stay in clients' order, so that a batch is cut alike everywhere.
    order, start = np.argsort(-width, kind="stable"), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or not fits(order[start : end + 1]):
            yield piece(order[start:end])
            start = end


def assemble_batch(model: Adapted, data: list[Encoded], piece: Piece) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels of the samples, texts cut or padded to one width, on the CPU."""
    present, first = np.unique(piece.clients, return_index=True)
    parts = [
        data[client].view(records) for client, records in zip(present, np.split(piece.records, first[1:]), strict=True)
    ]
    tables, labels = [part.inputs for part in parts], [part.labels for part in parts]
    inputs = {}
    for name in tables[0]:
        values = [table[name] for table in tables]
        if "attention_mask" in tables[0]:
            settings: Any = getattr(model.base.backbone, "config", None)
            filler = (getattr(settings, "pad_token_id", None) or 0) if name == "input_ids" else 0
            values = [_pad_width(value, piece.width, filler) for value in values]
        inputs[name] = values[0] if len(values) == 1 else torch.cat(values)
    if by_token(labels[0]):
        labels = [_pad_width(value, piece.width, IGNORE) for value in labels]
    return inputs, torch.cat(labels)


def _pad_width(value: Tensor, width: int, filler: int) -> Tensor:
    """[N, T] cut or padded on the right to [N, width]."""
    short = width - value.shape[1]
    return value[:, :width] if short <= 0 else torch.nn.functional.pad(value, (0, short), value=filler)
