"""Inputs as a model takes them: drawn ones of the records' form, and which records it can take at all."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.tail import first_token
from fedpeft.clients.train import on_device, per_sample_loss
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.data.stored import Stored
from fedpeft.models import agreement
from fedpeft.objectives.base import IGNORE, by_token, load_objective
from fedpeft.privacy.gradients import verify

DRAWN = 3
BLOCK = 256  # records that are looked at together
UNKNOWN = -1  # beside 0 and 1: whether the model can take a record has not been looked at
Looks = WeakKeyDictionary[Stored, np.ndarray]  # of each storage, int8 [N]


def draw_records(model: Adapted, like: Encoded, length: int) -> Encoded:
    """Records from a public seed, texts of unequal lengths.

    Args:
        like: records to take the names of the inputs from, and of images the shape; no value is looked at.
        length: tokens of the longest text: the config's, not that of a record.
    """
    generator = torch.Generator().manual_seed(0)
    words = words_of(model)
    lengths = torch.tensor([max(1, length // part) for part in range(1, DRAWN + 1)])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    ids = torch.randint(1, max(2, words), (DRAWN, length), generator=generator) * mask
    made: dict[str, Tensor] = {}
    none = like.view(np.arange(0))
    form = none.inputs
    for name, value in form.items():
        if "attention_mask" not in form:
            made[name] = torch.randn((DRAWN, *value.shape[1:]), generator=generator).to(value.dtype)
        elif value.is_floating_point():  # in place of tokens, what layers have made of them
            made[name] = torch.randn((DRAWN, length, *value.shape[2:]), generator=generator).to(value.dtype)
        else:
            known = {"input_ids": ids, "attention_mask": mask}
            other = model.base.objective.draw_input
            made[name] = (known[name] if name in known else other(name, mask)).to(value.dtype)
    learned = model.base.objective.learned_tokens(made) if by_token(none.labels) else mask
    return Encoded(made, _drawn_labels(model, none.labels, ids, learned, generator))


def _drawn_labels(model: Adapted, like: Tensor, ids: Tensor, learned: Tensor, generator: torch.Generator) -> Tensor:
    """Labels of the form of `like`: of each learned token, numbers that are 0 or 1, or classes."""
    if like.is_floating_point():
        return torch.randint(0, 2, (DRAWN, *like.shape[1:]), generator=generator).to(like.dtype)
    if not by_token(like):
        return torch.randint(0, model.base.classes, (DRAWN,), generator=generator)
    return (ids % model.base.classes if model.base.objective.headed else ids).masked_fill(learned == 0, IGNORE)


def verify_gradients(model: Adapted, like: Encoded, roles: tuple[str, ...], length: int) -> None:
    """Compare per-sample gradients of these roles with autograd, on drawn inputs, at the values that the model has.

    Args:
        like, length: as of `drawn`.

    Raises:
        InputError: they differ; names the parameter.
    """
    parameters = model.train_roles(roles)
    device = next(iter(parameters.values())).device
    made = draw_records(model, like, length)
    batch, labels = on_device(made, np.arange(len(made)), device)
    model.training_mode()
    with first_token(model, made):
        verify(
            model.base.modules,
            parameters,
            partial(per_sample_loss, model),
            batch,
            labels,
            model.base.objective.rows,
        )
    model.base.backbone.eval()


def draw_anew(config: Config, data: Encoded, seed: int) -> Encoded:
    """The records as a round of training shows them: pictures changed, or other tokens hidden, by its seed."""
    draws = config.data.augment or load_objective(config.model.task).redrawn
    return data.augmented(seed) if draws else data


def words_of(model: Adapted) -> int:
    """Size of the vocabulary; 0 for images."""
    return agreement.rows_of(model.base.backbone) or 0


def find_usable(model: Adapted, data: Encoded, looks: Looks | None = None) -> Encoded:
    """The records that the model can take: numbers that are finite, tokens that it knows, labels of its classes.

    Each is looked at alone, so one more record moves nobody else's place. One that is left out counts as one whose
    gradient is zero, and a private client has nothing else to say of it.

    Args:
        looks: what is known from earlier calls with this model; a record is looked at, and a picture decoded for it,
            once.
    """
    looks = WeakKeyDictionary() if looks is None else looks
    known = looks.setdefault(data.stored, np.full(len(data.stored), UNKNOWN, dtype=np.int8))
    new = np.flatnonzero(known[data.rows] == UNKNOWN)
    for start in range(0, len(new), BLOCK):
        block = new[start : start + BLOCK]
        known[data.rows[block]] = _find_good(model, data.view(block)).numpy()
    good = known[data.rows] == 1
    return data if good.all() else data.view(np.flatnonzero(good))


def _find_good(model: Adapted, data: Encoded) -> Tensor:
    """Whether the model can take each record, bool [N]."""
    labels, tokens = data.labels, by_token(data.labels)
    if labels.is_floating_point():
        # Regression: numbers, of which any finite one is right.
        good = torch.isfinite(labels).all(1)
    else:
        most = model.base.classes if model.base.objective.headed else words_of(model)
        labels = labels if tokens else labels[:, None]
        good = ((labels >= 0) & (labels < most) | (labels == IGNORE) & tokens).all(1)
    for name, value in data.inputs.items():
        if value.is_floating_point():
            good &= torch.isfinite(value).flatten(1).all(1)
        elif name == "input_ids":
            good &= ((value >= 0) & (value < words_of(model))).all(1)
    return good
