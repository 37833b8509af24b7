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
from fedpeft.models import agreement

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
    """The records with the model's scores as labels, NaN where nothing can be learned, or the model cannot take it."""
    stored = data.stored
    assert isinstance(stored, Tokens)
    device = next(iter(model.parameters.values())).device
    model.base.backbone.eval()
    teaching = np.intersect1d(data.teaching(), _known(model, data))
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


def _known(model: Adapted, data: Encoded) -> np.ndarray:
    """Numbers of the records whose tokens the model knows, which are all but at a private site: there one that it does
    not know must change nothing for the others (`inputs.usable`), so it is no error here either.
    """
    words = agreement.rows_of(model.base.backbone)
    if words is None:
        return np.arange(len(data))
    each = [(block.inputs["input_ids"] < words).all(1).numpy() for block in data.blocks()]
    return np.flatnonzero(np.concatenate(each)) if each else np.arange(0)
