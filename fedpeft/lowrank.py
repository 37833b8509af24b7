"""Algebra on factor pairs B [m, r] and A [r, n] that never forms the dense product B A [m, n]. float64 throughout.

>>> import torch
>>> B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
>>> B2, A2 = refactor(B, A)
>>> A2.numpy().round(9).tolist(), B2.numpy().round(9).tolist()
([[0.6, 0.8]], [[5.0], [10.0]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean in float64; the weights are normalised here. The caller fixes the order of `values`."""
    total = sum(weights)
    result = torch.zeros(values[0].shape, dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        result.add_(value.double(), alpha=weight / total)
    return result


def stack(Bs: Sequence[Tensor], As: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors [m, sum r], [sum r, n] of the weighted mean of B_k A_k: weights on B alone, on both they would square."""
    total = sum(weights)
    B = torch.cat([value.double() * (weight / total) for value, weight in zip(Bs, weights, strict=True)], dim=1)
    return B, torch.cat([value.double() for value in As], dim=0)


def svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B A: U [m, q], S [q] descending, Vt [q, n], q = min(r, m, n), through QR of both factors.

    Signs are fixed: the largest entry of each row of Vt is positive. Rows of Vt stay inside the row space of A also
    where B A is rank-deficient (a dense SVD fills those rows with arbitrary vectors).
    """
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    U, Vt = QB @ U, Vt @ QA.T
    sign = row_signs(Vt)
    return U * sign, S, Vt * sign[:, None]


def refactor(B: Tensor, A: Tensor, split: str = "us") -> tuple[Tensor, Tensor]:
    """The same product in the same shapes, with B = U S and the orthonormal rows of A = Vt.

    Where B A has a rank below r, the further rows of A are orthonormal too, inside the row space of A. (Only where
    r > n they are zero: there are no r orthonormal rows.) `split="sqrt"` gives B = U sqrt(S), A = sqrt(S) Vt instead.
    """
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(RB @ RA.T, full_matrices=True)
    U, Vt = QB @ U, Vt @ QA.T
    sign = row_signs(Vt)
    r, count = A.shape[0], S.numel()
    newB, newA = B.new_zeros(B.shape, dtype=torch.float64), A.new_zeros(A.shape, dtype=torch.float64)
    newA[: Vt.shape[0]] = Vt * sign[:, None]
    newB[:, :count] = U[:, :count] * S * sign[:count]
    if split == "sqrt":
        root = torch.zeros(r, dtype=torch.float64)
        root[:count] = S.sqrt()
        newA *= root[:, None]
        newB[:, :count] = U[:, :count] * S.sqrt() * sign[:count]
    return newB, newA


def row_signs(rows: Tensor) -> Tensor:
    """+1 or -1 for each row, the sign of its largest entry: the convention that makes an SVD's signs unique."""
    index = torch.arange(rows.shape[0])
    return torch.where(rows[index, rows.abs().argmax(dim=1)] < 0, -1.0, 1.0).double()


def truncate(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of B A of rank `rank` (Eckart-Young), factored U S | Vt; zero-padded below that rank."""
    U, S, Vt = svd(B, A)
    B, A = (U * S)[:, :rank], Vt[:rank]
    missing = rank - A.shape[0]
    if missing > 0:
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])], dim=0)
    return B, A


def compress(B: Tensor, A: Tensor, tolerance: float = 1e-14) -> tuple[Tensor, Tensor]:
    """The same product without the directions whose singular values are rounding noise."""
    U, S, Vt = svd(B, A)
    keep = int((S / S[0] > tolerance).sum()) if S.numel() and S[0] > 0 else 0
    return (U * S)[:, :keep], Vt[:keep]


def norm(B: Tensor, A: Tensor) -> Tensor:
    """Frobenius norm of B A through r x r Gram matrices."""
    B, A = B.double(), A.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()


def residual(Bs: Sequence[Tensor], As: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors of R = mean(B_k A_k) - mean(B) mean(A), as the cross-covariance sum p_k (B_k - B)(A_k - A).

    The covariance form avoids the cancellation of two near-equal products. One client's term follows from the others
    (the deviations sum to zero), so the factors have rank (K - 1) r.
    """
    total = sum(weights)
    p = [weight / total for weight in weights]
    B, A = mean(Bs, weights), mean(As, weights)
    dB = [value.double() - B for value in Bs]
    dA = [value.double() - A for value in As]
    if len(Bs) == 1:
        return B.new_zeros(B.shape[0], 0), A.new_zeros(0, A.shape[1])
    # sum_k p_k dB_k = 0, hence p_K dB_K = -sum_{k<K} p_k dB_k and R = sum_{k<K} p_k dB_k (dA_k - dA_K).
    left = torch.cat([weight * value for weight, value in zip(p[:-1], dB[:-1], strict=True)], dim=1)
    right = torch.cat([value - dA[-1] for value in dA[:-1]], dim=0)
    return left, right
