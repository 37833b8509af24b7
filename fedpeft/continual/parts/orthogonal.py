"""Orthonormal bases of what earlier tasks use, and directions outside of them. float64, columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.continual.parts.subspace import extend_within, leading_directions, project_out
from fedpeft.errors import InputError


def extend_basis(M: Tensor | None, more: Tensor) -> Tensor:
    """Orthonormal columns that span M [d, D] and `more` [d, k]; what is spanned already adds none."""
    more = more.double()
    M = more[:, :0] if M is None else M
    return extend_within(M, leading_directions(project_out(more, M), 1.0))


def draw_outside(M: Tensor | None, size: int, count: int, seed: int, site: str, task: int) -> Tensor:
    """Orthonormal columns [size, count], orthogonal to M [size, D], drawn from the seed, the site and the task.

    Raises:
        InputError: fewer than `count` dimensions are left.
    """
    used = 0 if M is None else M.shape[1]
    if used + count > size:
        raise InputError(
            f"continual.body: {site} has {size} dimensions, of which {used} are protected; task {task} "
            f"needs {count} more. Lower adapter.r, continual.tasks or the protected share."
        )
    draw = torch.randn(size, count, generator=seeds.torch_generator(seed, "subspace", site, task), dtype=torch.float64)
    for _ in range(2):  # the second time removes what rounding left
        draw = torch.linalg.qr(draw if M is None else project_out(draw, M)).Q
    return draw
