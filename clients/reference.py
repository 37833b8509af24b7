"""What a model says of records before it is trained, as their labels: what an objective compares it with later.

The passes are taken once, where the records are read: in a simulation of all of them, at a site of its own. Records are
taken in an order and in batches that hang on the records alone, so that a resumed run has the same numbers.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from fedpeft import progress
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import EVALUATED, on_device, scored_tokens
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.data.ragged import runs
from fedpeft.data.stored import Tokens

TOGETHER = 64  # records of a pass


def with_reference(config: Config, model: Adapted, data: Encoded) -> Encoded:
    """The same records; where the objective compares with a reference, with its scores as their labels.

    Args:
        model: as the run begins, with the adapter of `adapter.start` if there is one.
    """
    objective = model.base.objective
    if not objective.referred:
        return data
    begun = model.state()
    if config.adapter.start is not None and objective.config.reference == "base":
        model.write(begun.map(torch.zeros_like))  # plain LoRA, whose product is then zero; a fresh one's is
    try:
        return _scored(model, data)
    finally:
        model.write(begun)


@torch.no_grad()
def _scored(model: Adapted, data: Encoded) -> Encoded:
    """The records with the model's scores as labels, NaN where there is nothing to learn."""
    stored = data.stored
    assert isinstance(stored, Tokens)
    device = next(iter(model.parameters.values())).device
    model.base.backbone.eval()
    teaching = data.teaching()
    order = teaching[np.argsort(-data.lengths[teaching], kind="stable")]
    labels = torch.full_like(stored.labels_of(None), torch.nan)
    done = 0
    for places in runs(data.lengths[order], TOGETHER, scored_tokens(model, EVALUATED)):
        inputs, _ = on_device(data, order[places], device)
        labels[data.rows[order[places]]] = model.logits(inputs).cpu().to(labels.dtype)
        done += len(places)
        progress.step("records", done, len(order))
    scored = copy.copy(data)
    scored.stored = Tokens(stored.columns, stored.fillers, labels)
    return scored
