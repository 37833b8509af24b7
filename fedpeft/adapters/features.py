"""What goes into the head: the features that a classifier, or a closed-form head, sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.encode import Encoded
from fedpeft.models.adapted import Adapted


@torch.no_grad()
def batches(model: Adapted, data: Encoded, size: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features [N, width], logits [N, labels] and labels [N] of all records in order, on the CPU.

    The features are the first head module's input; of a sequence, its first token.
    """
    head = model.head()
    device = next(head.parameters()).device
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].float()))
    model.base.backbone.eval()
    try:
        for start in range(0, len(data), size):
            inputs, labels = data.batch(np.arange(start, min(start + size, len(data))))
            logits = model.logits({key: value.to(device) for key, value in inputs.items()})
            found = caught.pop()
            yield (found[:, 0] if found.ndim == 3 else found).cpu(), logits.float().cpu(), labels
    finally:
        hook.remove()
