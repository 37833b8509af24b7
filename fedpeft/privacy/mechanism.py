"""The Gaussian mechanism, once: a sum in which no vector counts for more than C, and the noise it is released with.

All that leaves under differential privacy is made of these two: steps of DP-SGD, by one client or by a cohort, the sums
that heads are fitted on, and the server's sum of a round under client-level privacy.

    S = sum_i f_i v_i,   f_i = C / max(||v_i|| + s, C);   released: S + N(0, (z C)^2 I)

(Abadi et al. 2016, arXiv 1607.00133, whose factor is min(1, C / ||v_i||); s = 1e-6, as Opacus has it, is room for the
rounding of float32, and 0 where vectors are float64 and must keep their whole length.)

Guarantee. Add one vector to a set, or remove one: S moves by at most C in the Euclidean norm, whatever that vector and
the others hold, as each is clipped by itself. So a release is one Gaussian mechanism of noise multiplier z, with
neighbours by adding or removing one vector, and what is computed from it costs nothing more. Rounding comes on top:
less than 1e-6 C for a vector in float32. The caller says what a vector stands for (a record, a client), who is in the
sample and what the sum is divided by; the noise's low bits are the business of `fedpeft.privacy.noise`.

    a vector with                                  counts as
    norm 0                                         itself, zero
    norm below C                                   itself
    norm C                                         itself, shorter by s at most
    norm above C                                   its direction, with norm C at most
    a value that is NaN or infinite                zero
    a loss that is NaN or infinite                 zero, whatever its values
    norm of 1e30 or more, in float32               zero: float32 could not hold its factor
    norm that overflows, in float64 (1e154)        zero
    float16 or bfloat16 values                     the same values in float32, and so does the sum

The sum of no vectors is zero and is released as noise alone. A vector alone is treated as one among many: its sum has
norm C at most.

    >>> clipped_sum(torch.tensor([[3.0, 4.0], [0.0, 0.5], [torch.nan, 0.0]]), clip=1.0)
    tensor([0.6000, 1.3000])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.privacy.noise import Randomness

SLACK = 1e-6
TOO_LONG = {torch.float32: 1e30}


def clipped_sum(vectors: Tensor, clip: float, losses: Tensor | None = None, slack: float = SLACK) -> Tensor:
    """The sum [P] of vectors [N, P], each clipped to norm `clip`; of at least float32.

    Args:
        losses: [N], of the records that the vectors are from.
        slack: s.
    """
    total = vectors.new_zeros((1, vectors.shape[1]), dtype=torch.promote_types(vectors.dtype, torch.float32))
    owners = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    add_clipped(total, [vectors], losses, owners, total.new_tensor([clip], dtype=torch.float64), slack)
    return total[0]


def add_clipped(
    totals: Tensor, parts: Sequence[Tensor], losses: Tensor | None, owners: Tensor, clips: Tensor, slack: float = SLACK
) -> None:
    """Add to each row of [K, P] the clipped sum of the vectors that belong to it.

    Args:
        parts: the vectors in pieces [N, ...], which together have P values: a vector has one norm over all of them.
        losses: [N]; None where there are none to look at.
        owners: row of each vector, [N].
        clips: C of each row, [K].
        slack: s.
    """
    pieces = [part.flatten(1).to(totals.dtype) for part in parts]
    # In float64: a sum of float32 squares comes out too small, and what is clipped by it too long.
    each = torch.stack([torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64) for piece in pieces])
    norms = torch.linalg.vector_norm(each, dim=0)
    counts = norms < TOO_LONG.get(totals.dtype, math.inf)
    if losses is not None:
        counts &= torch.isfinite(losses)
    clip = clips[owners].double()
    factors = torch.where(counts, clip / torch.maximum(norms + slack, clip), 0.0).to(totals.dtype)
    mix = totals.new_zeros(len(totals), len(owners))  # a product with it sums the vectors of each row
    mix[owners, torch.arange(len(owners), device=owners.device)] = factors
    for piece, into in zip(pieces, totals.split([piece.shape[1] for piece in pieces], dim=1), strict=True):
        into.addmm_(mix, piece.masked_fill(~counts[:, None], 0.0))  # zero times NaN would be NaN


def add_noise(total: Tensor, noise_multiplier: float, clip: float, source: Randomness) -> Tensor:
    """A sum [P] of vectors clipped to norm `clip` with noise of deviation `noise_multiplier` x `clip` on every value.

    The noise is drawn once, in the order of the values.
    """
    # One draw in float64 on the CPU: the same values on every device.
    noise = torch.from_numpy(source.normal(total.numel())).to(total)
    return total + noise_multiplier * clip * noise
