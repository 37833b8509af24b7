"""A hash of everything that hangs on a model's modules, to see that nothing was left behind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import nn


def fingerprint_modules(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Every parameter and buffer, whether it trains and has a gradient, every module's mode, and its hooks."""
    digest = hashlib.sha256()
    for name, part in modules:
        digest.update(
            f"{name} {part.training} {'forward' in part.__dict__} {len(part._forward_hooks)} "
            f"{list(part._forward_pre_hooks)}".encode()
        )
        for value in [*part._parameters.values(), *part._buffers.values()]:
            if value is not None:
                digest.update(f"{value.requires_grad} {value.grad is None}".encode())
                digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
