"""How many tokens clients may share in a pass: as many as it has room for, so that a cohort of large models needs no
more memory than one client after another.

What a pass keeps for its way back is counted in one forward pass over a drawn record, so layers, widths, attention,
vocabulary and dtype are in it without a formula for each architecture. To that comes twice the largest thing that is
kept: on the way back a language model's scores have a slope, in float32 and in the base's dtype. For a Llama of 135M
this is within 1 % of what torch allocates at most, for small models within 10 % (tests/reference/test_room.py). With
checkpoints of gradients it is less than that, as what a block is given and computes anew is not seen.

    tokens = the largest power of two, at most MOST, of which ROOM has room for what they keep

Together clients are spared the overhead of a pass. One client's pass over a large model has next to none, so nothing is
lost where it has one to itself. A client's own batch is not cut for the sake of memory: alone it would not be either.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.cohort.passes import token_counts
from fedpeft.clients.inputs import draw_records
from fedpeft.clients.train import on_device, per_sample_loss
from fedpeft.data.encode import Encoded
from fedpeft.models.agreement import FAILURES

log = logging.getLogger("fedpeft")
# Of a pass on a CPU, and on other devices, which are slow to begin one and fast in it.
MOST = {"cpu": 2**11}
MOST_ELSEWHERE = 2**14
ROOM = {"cpu": 2**28}  # bytes: 256 MiB
ROOM_ELSEWHERE = 2**32


def most_tokens(model: Adapted) -> int:
    """Tokens of a pass over many clients, where there is room for them."""
    return MOST.get(_device(model).type, MOST_ELSEWHERE)


def shared_tokens(model: Adapted, like: Encoded, trains: tuple[str, ...], width: int) -> int:
    """Tokens of a pass that several clients share.

    Args:
        like: records to take the form of the inputs from; no value is looked at.
        trains: roles that train.
        width: tokens of a long record of theirs.
    """
    room, most = ROOM.get(_device(model).type, ROOM_ELSEWHERE), most_tokens(model)
    if (trains, width) not in model.kept:
        try:
            model.kept[trains, width] = count_kept(model, like, trains, width)
        except FAILURES as error:
            log.warning("a pass has up to %d tokens, as what it keeps cannot be counted: %s", most, error)
            model.kept[trains, width] = 0.0
    fitting = int(min(most, room / max(model.kept[trains, width], room / most)))
    return int(2 ** (max(1, fitting).bit_length() - 1))


def count_kept(model: Adapted, like: Encoded, trains: tuple[str, ...], width: int) -> float:
    """Bytes for each token of a record of so many tokens that a training pass has at most; in the mode it is in."""
    training = {key: value.requires_grad for key, value in model.parameters.items()}
    held = {
        value.untyped_storage().data_ptr()
        for root in model.base.modules
        for value in (*root.parameters(), *root.buffers())
    }
    kept: dict[int, Tensor] = {}  # by storage, which lives on in the tensor: no other gets its place

    def note(value: Tensor) -> Tensor:
        """There is no way back to hand the value to, and with its graph it would hold itself for ever."""
        bare = value.detach()
        place = bare.untyped_storage().data_ptr()
        if place not in held:
            kept[place] = bare
        return bare

    model.train_roles(trains)
    record = draw_records(model, like, width).view(np.arange(1))
    device = _device(model)
    try:
        # Dropout keeps its masks, and no draw of a client may hang on whether something was counted.
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(note, lambda bare: bare),
        ):
            per_sample_loss(model, *on_device(record, np.arange(1), device))
    finally:
        for key, trained in training.items():
            model.parameters[key].requires_grad_(trained)
    sizes = [value.untyped_storage().nbytes() for value in kept.values()]
    return (sum(sizes) + 2 * max(sizes, default=0)) / int(token_counts(model, record)[0])


def _device(model: Adapted) -> torch.device:
    return next(iter(model.parameters.values())).device
