"""Subspaces of gradients or inputs: projection off a basis, leading directions, and sketches of a stream of matrices.

Frequent directions (Liberty, arXiv 1206.0594; Ghashami et al., arXiv 1501.01711) keeps S [m, r2] for a stream of
columns Q with C the sum of all Q Q^T, such that 0 <= C - S S^T <= (sum of delta) I. Sketches of several owners merge,
and their errors add.

    >>> M = torch.tensor([[1.0], [0.0]])
    >>> project_out(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), M).tolist()
    [[0.0, 0.0], [5.0, 6.0]]
    >>> S, delta = sketch(torch.zeros(2, 1), torch.diag(torch.tensor([2.0, 1.0])), "next")
    >>> (S.abs() ** 2).round().tolist(), round(delta, 4)
    ([[3.0], [0.0]], 1.0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.lowrank import row_signs

NOISE = 1e-6  # directions below this share of the largest singular value are rounding


def project_out(G: Tensor, M: Tensor) -> Tensor:
    """G - M M^T G for G [m, n] and orthonormal M [m, D]; zero where only rounding is left.

    Twice and in float64: once would leave in M's span what M's own rounding is, which counts where G' is small.
    """
    exact, basis = G.double(), M.double()
    left = exact - basis @ (basis.T @ exact)
    left = left - basis @ (basis.T @ left)
    if left.norm() <= torch.finfo(G.dtype).eps * exact.norm():
        return torch.zeros_like(G)
    return left.to(G.dtype)


def left_singular(
    G: Tensor,
    rank: int,
    svd: str = "full",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors [m, rank] and values [rank] of G [m, n], float64.

    Both are zero beyond the rank of G: from where sigma_i <= 1e-6 sigma_1. The largest entry of a vector is positive.

    Args:
        svd: "full", "gram" (eigenvectors of the smaller Gram matrix) or "randomized" (drawn from `generator`).
    """
    exact = G.double()
    if svd == "full":
        U, sigma, _ = torch.linalg.svd(exact, full_matrices=False)
    elif svd == "gram":
        U, sigma = _by_gram(exact)
    else:
        width = min(rank + 8, *exact.shape)
        draw = torch.randn(exact.shape[1], width, dtype=torch.float64, generator=generator)
        Y = torch.linalg.qr(exact @ draw).Q
        for _ in range(2):  # power iterations sharpen what a single pass blurs
            Y = torch.linalg.qr(exact @ torch.linalg.qr(exact.T @ Y).Q).Q
        inner, sigma, _ = torch.linalg.svd(Y.T @ exact, full_matrices=False)
        U = Y @ inner
    U, sigma = U[:, :rank], sigma[:rank]
    real = sigma > NOISE * sigma[:1]
    missing = rank - len(sigma)
    U = F.pad(U * real * row_signs(U.T), (0, missing))
    return U, F.pad(sigma * real, (0, missing))


def _by_gram(G: Tensor) -> tuple[Tensor, Tensor]:
    m, n = G.shape
    values, vectors = torch.linalg.eigh(G @ G.T if m <= n else G.T @ G)
    sigma, vectors = values.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    # Where sigma is 0 the quotient means nothing; `left_singular` leaves these directions out.
    return (vectors, sigma) if m <= n else (G @ vectors / sigma.clamp(min=1e-300), sigma)


def sketch(S: Tensor, Q: Tensor, shrink: str = "next") -> tuple[Tensor, float]:
    """One step of frequent directions: S [m, r2] and new columns Q [m, any] -> the new S, and delta.

    With C the sum of all Q Q^T so far: 0 <= C - S S^T <= (sum of all delta) I.

    Args:
        shrink: delta is the squared singular value of place r2 + 1 ("next": r2 survive) or r2 ("last": r2 - 1).
    """
    r2 = S.shape[1]
    U, sigma, _ = torch.linalg.svd(torch.cat([S.double(), Q.double()], dim=1), full_matrices=False)
    place = r2 if shrink == "next" else r2 - 1
    delta = float(sigma[place] ** 2) if place < len(sigma) else 0.0
    kept = U[:, :r2] * (sigma[:r2] ** 2 - delta).clamp(min=0).sqrt()
    return F.pad(kept, (0, r2 - kept.shape[1])).to(S.dtype), delta


def merge_sketches(sketches: Sequence[Tensor], shrink: str = "next") -> Tensor:
    """The sketch [m, r2] of all owners' gradients from their own ones; its error is the sum of theirs and one delta."""
    first, *others = sketches
    return sketch(first, torch.cat([first[:, :0], *others], dim=1), shrink)[0]


def leading_directions(S: Tensor, eps_th: float) -> Tensor:
    """Left singular vectors [m, k] of S with a cumulative share of the energy of at most eps_th, but at least one.

    None (k = 0) of a zero S: nothing was learned.
    """
    U, sigma = left_singular(S, min(S.shape))
    energy = (sigma**2).cumsum(0)
    within = energy <= eps_th * energy[-1] * (1 + 1e-12)
    k = int((within & (sigma > 0)).sum())
    return U[:, : max(k, 1) if sigma[0] > 0 else 0].to(S.dtype)


def root_of_gram(C: Tensor, r2: int) -> Tensor:
    """S [m, r2] with the leading eigenpairs of C = S S^T."""
    values, vectors = torch.linalg.eigh(C.double())
    scaled: Tensor = vectors * values.clamp(min=0).sqrt()
    return scaled.flip(1)[:, :r2]


def extend_within(M: Tensor, U: Tensor, cap: float = 1.0) -> Tensor:
    """An orthonormal basis of M's and U's columns: M's own first, at most `cap` of all directions."""
    room = max(math.floor(cap * M.shape[0] + 1e-9) - M.shape[1], 0)
    if min(room, U.shape[1]) == 0:
        return M
    Q, R = torch.linalg.qr(torch.cat([M.double(), U[:, :room].double()], dim=1))
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # QR may turn columns round; M's own stay
    return signed.to(M.dtype)
