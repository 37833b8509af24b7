"""The Gaussian mechanism: what one vector can do to the sum, its table of edge cases, and its noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.privacy.mechanism import add_clipped, add_noise, clipped_sum
from support.dp_steps import CLIP, Fixed, plan, shrunk

MODERATE = st.one_of(
    st.floats(-1000, 1000, width=32), st.floats(-(2.0**49), 2.0**49, width=32), st.sampled_from([0.0, 1e-30])
)
FLOATS = st.one_of(
    MODERATE, st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([3e38, -3e38, np.nan, np.inf, -np.inf])
)


@st.composite
def matrices(draw, values=FLOATS):
    count, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=count, max_size=count))
    return torch.tensor(rows, dtype=torch.float32)


# The sums under test --------------------------------------------------------------------------------------------------


def of_a_client(rows, clip, losses=None):
    return plan(clip=clip).clipped_sum(rows, losses)


def of_a_cohort(rows, clip, losses=None):
    """The second of three clients, in two pieces; the others' clips are other ones, and they get nothing."""
    totals = rows.new_zeros(3, rows.shape[1])
    pieces = [rows[:, :1, None], rows[:, 1:]] if rows.shape[1] > 1 else [rows]
    add_clipped(totals, pieces, losses, torch.ones(len(rows), dtype=torch.int64), torch.tensor([9.0, clip, 9.0]))
    assert not totals[0].any() and not totals[2].any()
    return totals[1]


def of_a_server(rows, clip, losses=None):
    return clipped_sum(rows.double(), clip, losses, slack=0.0)


def unclipped(rows, clip, losses=None):
    return torch.nan_to_num(rows, 0, 0, 0).sum(0)


def mean_clipped(rows, clip, losses=None):
    return shrunk(torch.nan_to_num(rows, 0, 0, 0).mean(0), clip) * len(rows)


def twice_clip(rows, clip, losses=None):
    return clipped_sum(rows, 2 * clip, losses)


def each_half_clipped(rows, clip, losses=None):
    return torch.cat([clipped_sum(part, clip, losses) for part in rows.split(rows.shape[1] // 2, dim=1)])


def clipped_by_the_largest_value(rows, clip, losses=None):
    return (rows * (clip / rows.abs().amax(1, keepdim=True)).clamp(max=1)).nan_to_num(0, 0, 0).sum(0)


def spoilt_by_a_number_that_is_none(rows, clip, losses=None):
    return shrunk(rows, clip).sum(0)


def clipped_in_half_precision(rows, clip, losses=None):
    return shrunk(rows.bfloat16(), clip).sum(0).float()


RIGHT = [of_a_client, of_a_cohort, of_a_server]
WRONG = [
    unclipped,
    mean_clipped,
    twice_clip,
    each_half_clipped,
    clipped_by_the_largest_value,
    spoilt_by_a_number_that_is_none,
    clipped_in_half_precision,
]


def influence(total):
    """How far one vector moves a sum, at most, in units of the clip; a sum that is no number counts as infinite."""
    clip, worst = 0.7, 0.0
    generator = torch.Generator().manual_seed(5)
    some = torch.randn(6, 8, generator=generator)
    for vector in (
        some[0],
        1e6 * some[1],
        torch.ones(8),
        1e29 * torch.eye(8)[0],
        torch.full((8,), math.nan),
        torch.eye(8)[0] * math.inf,
        torch.zeros(8),
        torch.full((8,), 3e38),
    ):
        for others in (some, some[:0], 1e4 * some, torch.full((2, 8), 1e-3)):
            moved = (
                (total(torch.cat([others, vector[None]]), clip) - total(others, clip)).double().norm()
                if len(others)
                else total(vector[None], clip).double().norm()
            )
            worst = max(worst, float(moved) / clip if torch.isfinite(moved) else math.inf)
    return worst


@pytest.mark.parametrize("total", RIGHT)
def test_one_vector_moves_the_sum_by_the_clip_and_no_further(total):
    assert 0.999 < influence(total) <= 1 + 1e-5


@pytest.mark.parametrize("total", WRONG)
def test_the_measure_sees(total):
    assert influence(total) > 1.001


@pytest.mark.parametrize("total", RIGHT)
@settings(deadline=None, max_examples=60)
@given(rows=matrices(), clip=st.sampled_from([1e-3, 0.5, 1.0, 100.0]))
def test_every_row_of_any_matrix_has_bounded_influence(total, rows, clip):
    whole = total(rows, clip)
    assert whole.shape == (rows.shape[1],) and torch.isfinite(whole).all()
    for index in range(len(rows)):
        others = total(torch.cat([rows[:index], rows[index + 1 :]]), clip)
        assert (whole.double() - others.double()).norm() <= clip * (1 + 1e-6 * len(rows))
        assert total(rows[index : index + 1], clip).double().norm() <= clip * (1 + 1e-6)


@pytest.mark.parametrize("total", RIGHT)
@settings(deadline=None, max_examples=30)
@given(rows=matrices(MODERATE), clip=st.sampled_from([0.5, 1.0, 100.0]))
def test_a_clipped_sum_is_the_sum_of_what_was_clipped(total, rows, clip):
    torch.testing.assert_close(total(rows, clip).double(), shrunk(rows.double(), clip).sum(0), rtol=0, atol=1e-5 * clip)


@pytest.mark.parametrize("width", [1_000, 100_000, 1_000_000, 4_000_000])
def test_many_parameters_do_not_widen_the_bound(width):
    """A norm that is summed in float32 comes out too small, and what is clipped by it too large."""
    for row in (torch.full((1, width), 1e-2), torch.linspace(0, 1, width)[None]):
        assert plan().clipped_sum(row).double().norm() <= CLIP * (1 + 1e-5)


# The table ------------------------------------------------------------------------------------------------------------

UNIT = torch.tensor([0.6, 0.8, 0.0])


@pytest.mark.parametrize("total", RIGHT)
@pytest.mark.parametrize(
    ("vector", "loss", "norm"),
    [
        (0.0 * UNIT, 1.0, 0.0),
        (0.25 * UNIT, 1.0, 0.25),
        (2.0 * UNIT, 1.0, 2.0),
        (7.0 * UNIT, 1.0, 2.0),
        (1e29 * UNIT, 1.0, 2.0),
        (math.nan * UNIT, 1.0, 0.0),
        (math.inf * UNIT, 1.0, 0.0),
        (UNIT, math.nan, 0.0),
        (UNIT, -math.inf, 0.0),
        (math.nan * UNIT, math.nan, 0.0),
        (1e-44 * UNIT, 1.0, 0.0),
    ],
    ids=["zero", "below", "at the clip", "above", "far above", "nan", "inf", "loss nan", "loss inf", "both", "tiny"],
)
def test_a_vector_counts_as_the_table_says(total, vector, loss, norm):
    """Alone, and beside one whose clipped sum is known."""
    beside = torch.tensor([0.0, 0.0, 1.5])
    alone = total(vector[None], 2.0, torch.tensor([loss])).float()
    torch.testing.assert_close(alone, norm * UNIT, rtol=0, atol=3e-6)
    both = total(torch.stack([vector, beside]), 2.0, torch.tensor([loss, 0.1])).float()
    torch.testing.assert_close(both, norm * UNIT + beside, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [1e30, 1e36, 3e38])
def test_norms_over_float32s_range_count_as_zero_there_and_are_clipped_in_float64(size):
    rows = torch.tensor([[size, size, 0.0], [0.0, 0.0, 0.5]])  # the norm of the last one is no float32
    assert of_a_client(rows, 1.0).tolist() == of_a_cohort(rows, 1.0).tolist() == [0.0, 0.0, 0.5]
    expected = torch.tensor([0.5**0.5, 0.5**0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(of_a_server(rows, 1.0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e160, -1.7e308])
def test_norms_over_float64s_range_count_as_zero(size):
    rows = torch.tensor([[size, 1.0], [0.0, 0.25]], dtype=torch.float64)
    assert clipped_sum(rows, 1.0, slack=0.0).tolist() == [0.0, 0.25]


def test_without_slack_a_vector_at_the_clip_stays_whole_and_with_it_none_is_longer():
    rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert clipped_sum(rows, 5.0, slack=0.0).tolist() == [3.0, 4.0]
    assert 5.0 * (1 - 3e-7) < float(clipped_sum(rows, 5.0).norm()) < 5.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """A factor in half precision is off by 1/256, and so would be the bound."""
    rows = torch.linspace(0.1, 3, 64).reshape(4, 16).to(dtype)
    total = clipped_sum(rows, 0.7)
    assert total.dtype == torch.float32 and torch.equal(total, clipped_sum(rows.float(), 0.7))
    assert clipped_sum(rows[:1], 0.7).double().norm() <= 0.7
    large = torch.full((1, 4), 60000.0).to(dtype)
    assert float(clipped_sum(large, 1.0).norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("total", RIGHT)
def test_an_empty_batch_has_the_sum_zero(total):
    assert total(torch.zeros(0, 7), 1.0).tolist() == [0.0] * 7


def test_rows_of_a_cohort_get_their_own_vectors_under_their_own_clips():
    vectors = torch.eye(4) * 8
    totals = torch.ones(3, 4)
    clips = torch.tensor([1.0, 5.0, 3.0])
    add_clipped(totals, [vectors[:, :2], vectors[:, 2:]], None, torch.tensor([2, 0, 2, 0]), clips)
    expected = torch.tensor([[1.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 4.0, 1.0]])
    torch.testing.assert_close(totals, expected, rtol=0, atol=3e-6)


# The noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_once_in_order_and_scaled_by_multiplier_and_clip():
    source, total = Fixed(), torch.arange(5.0)
    released = add_noise(total, 1.5, 0.4, source)
    [drawn] = source.asked
    torch.testing.assert_close(released, total + 0.6 * torch.from_numpy(drawn).float(), rtol=0, atol=1e-6)
    assert torch.equal(total, torch.arange(5.0)) and released.dtype == torch.float32


def test_a_sum_of_nobody_is_released_as_noise_alone():
    source = Fixed(seed=3)
    released = add_noise(clipped_sum(torch.zeros(0, 4000), 2.0), 0.5, 2.0, source)
    assert torch.equal(released, torch.from_numpy(source.asked[0]).float())  # of deviation 0.5 x 2
    assert float(released.std()) == pytest.approx(1.0, abs=0.1)
