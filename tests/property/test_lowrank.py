"""The thin algebra of factor pairs against dense float64 linear algebra, over shapes, ranks and rank deficiency."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft import lowrank

SETTINGS = settings(deadline=None, max_examples=60)
TOLERANCE = 1e-11


@st.composite
def factors(draw, m=None, n=None, r=None):
    """B [m, r] and A [r, n], float64, of full rank or with repeated, zero or badly scaled columns."""
    m = m or draw(st.integers(1, 9))
    n = n or draw(st.integers(1, 9))
    r = r or draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, A = random.standard_normal((m, r)), random.standard_normal((r, n))
    kind = draw(st.sampled_from(["full", "zero column", "repeated column", "zero", "scaled", "repeated row"]))
    if kind == "zero column":
        B[:, 0] = 0
    elif kind == "repeated column":
        B[:, -1] = B[:, 0]
    elif kind == "repeated row":
        A[-1] = A[0]
    elif kind == "zero":
        B[:] = 0
    elif kind == "scaled":
        B *= 10.0 ** draw(st.integers(-6, 6))
    return B, A


@st.composite
def cohorts(draw):
    """Three or fewer clients' factors of one shape, and positive weights that do not sum to one."""
    m, n, r = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    count = draw(st.integers(1, 4))
    pairs = [draw(factors(m, n, r)) for _ in range(count)]
    weights = draw(hnp.arrays(float, count, elements=st.floats(0.1, 100)))
    return pairs, weights.tolist()


def t(value):
    return torch.from_numpy(np.ascontiguousarray(value))


def scale(product, *more):
    return max([np.linalg.norm(product), *(np.linalg.norm(value) for value in more), 1e-300])


def close(left, right, size):
    return np.linalg.norm(np.asarray(left) - np.asarray(right)) <= TOLERANCE * size


@SETTINGS
@given(factors())
def test_svd_is_that_of_the_dense_product(pair):
    B, A = pair
    product = B @ A
    size = np.linalg.norm(B) * np.linalg.norm(A) + 1e-300
    U, S, Vt = (value.numpy() for value in lowrank.svd(t(B), t(A)))
    q = min(B.shape[1], *product.shape)
    assert U.shape == (B.shape[0], q) and S.shape == (q,) and Vt.shape == (q, A.shape[1])
    assert close(U @ np.diag(S) @ Vt, product, size)
    assert close(S, np.linalg.svd(product, compute_uv=False)[:q], size)
    assert (np.diff(S) <= TOLERANCE * size).all() and (S >= 0).all()
    assert close(Vt @ Vt.T, np.eye(q), 1.0) and close(U.T @ U, np.eye(q), 1.0)


@SETTINGS
@given(factors())
def test_largest_entry_of_each_right_vector_is_positive(pair):
    _, _, Vt = lowrank.svd(t(pair[0]), t(pair[1]))
    for row in Vt.numpy():
        assert row.max() >= np.abs(row).max() - 1e-9


@SETTINGS
@given(factors())
def test_refactor_keeps_shapes_product_and_row_space(pair):
    B, A = pair
    r, n = A.shape
    B2, A2 = (value.numpy() for value in lowrank.refactor(t(B), t(A)))
    size = np.linalg.norm(B) * np.linalg.norm(A) + 1e-300
    assert B2.shape == B.shape and A2.shape == A.shape
    assert close(B2 @ A2, B @ A, size)
    assert close(A2 @ A2.T, np.diag(np.arange(r) < n), 1.0)  # there are no more than n orthonormal rows
    gram = B2.T @ B2
    assert close(gram, np.diag(np.diag(gram)), size**2)
    assert (np.diff(np.diag(gram)) <= 1e-9 * (size**2 + 1e-300)).all()
    if np.linalg.matrix_rank(A) == r:  # the row space is that of A, also where B has dependent columns
        assert close(A2.T @ A2, np.linalg.pinv(A) @ A, 10 * np.linalg.cond(A))


@SETTINGS
@given(factors(), st.integers(1, 8))
def test_truncation_error_is_the_discarded_spectrum(pair, rank):
    B, A = pair
    product = B @ A
    size = np.linalg.norm(B) * np.linalg.norm(A) + 1e-300
    B2, A2 = (value.numpy() for value in lowrank.truncate(t(B), t(A), rank))
    assert B2.shape == (B.shape[0], rank) and A2.shape == (rank, A.shape[1])
    discarded = np.linalg.svd(product, compute_uv=False)[rank:]
    assert abs(np.linalg.norm(product - B2 @ A2) - np.linalg.norm(discarded)) <= TOLERANCE * size


@SETTINGS
@given(factors())
def test_compress_is_exact_and_no_wider_than_the_rank(pair):
    B, A = pair
    product = B @ A
    B2, A2 = (value.numpy() for value in lowrank.compress(t(B), t(A)))
    assert close(B2 @ A2, product, np.linalg.norm(B) * np.linalg.norm(A) + 1e-300)
    assert B2.shape[1] == A2.shape[0] <= min(*product.shape, B.shape[1])
    if not product.any():
        assert B2.shape[1] == 0


def test_compress_drops_what_is_not_there():
    random = np.random.default_rng(0)
    B, A = random.standard_normal((8, 2)), random.standard_normal((2, 9))
    B2, A2 = lowrank.compress(t(np.hstack([B, B, 3 * B])), t(np.vstack([A, -A, A])), tolerance=1e-12)
    assert B2.shape[1] == 2
    assert close(B2.numpy() @ A2.numpy(), 3 * B @ A, 10.0)


@SETTINGS
@given(factors())
def test_norm_is_frobenius(pair):
    B, A = pair
    size = np.linalg.norm(B) * np.linalg.norm(A)
    # a norm through Gram matrices loses half of the digits where the product cancels
    assert abs(float(lowrank.norm(t(B), t(A))) - np.linalg.norm(B @ A)) <= 1e-7 * size + 1e-300


@SETTINGS
@given(cohorts())
def test_mean_and_stack(cohort):
    pairs, weights = cohort
    p = np.array(weights) / sum(weights)
    Bs, As = [t(B) for B, _ in pairs], [t(A) for _, A in pairs]
    assert close(
        lowrank.mean(Bs, weights).numpy(),
        sum(w * B for w, (B, _) in zip(p, pairs, strict=True)),
        scale(*(B for B, _ in pairs)),
    )
    B, A = (value.numpy() for value in lowrank.stack(Bs, As, weights))
    expected = sum(w * B @ A for w, (B, A) in zip(p, pairs, strict=True))
    assert B.shape[1] == A.shape[0] == len(pairs) * pairs[0][0].shape[1]
    assert close(B @ A, expected, sum(np.linalg.norm(B) * np.linalg.norm(A) for B, A in pairs) + 1e-300)


@SETTINGS
@given(cohorts())
def test_residual_is_mean_of_products_less_product_of_means(cohort):
    pairs, weights = cohort
    p = np.array(weights) / sum(weights)
    expected = sum(w * B @ A for w, (B, A) in zip(p, pairs, strict=True))
    expected = expected - sum(w * B for w, (B, _) in zip(p, pairs, strict=True)) @ sum(
        w * A for w, (_, A) in zip(p, pairs, strict=True)
    )
    B, A = (value.numpy() for value in lowrank.residual([t(B) for B, _ in pairs], [t(A) for _, A in pairs], weights))
    assert B.shape[1] == A.shape[0] == (len(pairs) - 1) * pairs[0][0].shape[1]
    size = sum(np.linalg.norm(B) for B, _ in pairs) * sum(np.linalg.norm(A) for _, A in pairs) + 1e-300
    assert close(B @ A, expected, size)


def test_residual_has_no_cancellation_error():
    """Two clients 1e-9 apart: the residual is 1e-18 in size, far below the rounding of either product."""
    B, A = np.full((3, 1), 1.0), np.full((1, 3), 1.0)
    step = 2.0**-30
    left, right = lowrank.residual([t(B + step), t(B - step)], [t(A + step), t(A - step)], [1.0, 1.0])
    np.testing.assert_allclose((left @ right).numpy(), np.full((3, 3), step**2), rtol=1e-12)


def test_results_are_float64_whatever_comes_in():
    B, A = torch.ones(3, 2), torch.ones(2, 4)
    outputs = [
        *lowrank.svd(B, A),
        *lowrank.refactor(B, A),
        *lowrank.truncate(B, A, 1),
        *lowrank.compress(B, A),
        lowrank.norm(B, A),
        *lowrank.stack([B], [A], [1.0]),
        lowrank.mean([B], [2.0]),
        *lowrank.residual([B, B], [A, A], [1.0, 1.0]),
        *lowrank.residual([B], [A], [1.0]),
    ]
    assert all(value.dtype == torch.float64 for value in outputs)
