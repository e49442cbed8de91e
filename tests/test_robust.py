"""Rolling robust baselines against a slow reference, and the properties rules rely on."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.metric import Array, Mask
from monitor.robust import FLOOR, MINIMUM, SIGMA_PER_MAD, WINDOW, baseline, robust_z


def slow(values: Array, has: Mask, window: int, minimum: int) -> tuple[Array, Array, Array]:
    """Median, scale and z by the definition, one window at a time."""
    median, scale, z = (np.full(values.shape, np.nan) for _ in range(3))
    for t in range(values.shape[0]):
        for j in range(values.shape[1]):
            past = range(max(0, t - window), t)
            kept = [float(values[i, j]) for i in past if has[i, j] and np.isfinite(values[i, j])]
            if len(kept) < minimum:
                continue
            median[t, j] = statistics.median(kept)
            mad = statistics.median(abs(x - median[t, j]) for x in kept)
            scale[t, j] = max(1.4826 * mad, abs(median[t, j]) / 512)
            if has[t, j] and scale[t, j] > 0:
                z[t, j] = (values[t, j] - median[t, j]) / scale[t, j]
    return median, scale, z


def single(x: Array) -> Array:
    """Numbers that float32 holds, so that only the arithmetic differs."""
    return x.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [7, 20, 100])
def test_against_the_definition(seed: int, window: int):
    """Oracle: naive transcription. Random walks and noise with holes, NaN and inf.

    Tolerance: deviations are rounded to float32, so a MAD is right to 2^-24 of the largest number in the window.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(240, 3))
    x[:, 1] = 100 + np.cumsum(x[:, 1])
    x[:, 2] = np.round(x[:, 2])  # many ties
    x = single(x)
    x[rng.random(x.shape) < 0.05] = np.nan
    x[rng.random(x.shape) < 0.05] = np.inf
    has = rng.random(x.shape) > 0.2
    median, scale, z = slow(x, has, window, 5)
    b = baseline(x, has, window=window, minimum=5)
    got, known = robust_z(x, has, window=window, minimum=5)
    np.testing.assert_allclose(b.median, median, rtol=1e-12)
    np.testing.assert_allclose(b.scale, scale, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(known, has & (scale > 0))
    np.testing.assert_allclose(got[known], z[known], rtol=1e-4)


def test_scale_of_normal_noise_is_its_standard_deviation():
    """Oracle: closed form. 1.4826 MAD of N(5, 2) estimates 2; its standard error over 100 points is 1.17 · 2 / 10.

    Baselines of neighbouring rows share points; 20 series with 9 disjoint windows each leave 0.018 for the mean.
    """
    x = np.random.default_rng(0).normal(5, 2, size=(1000, 20))
    b = baseline(x, np.ones(x.shape, dtype=np.bool_), first=100)
    assert abs(np.nanmean(b.scale) - 2) < 4 * 0.018
    assert abs(np.nanmean(b.median) - 5) < 4 * 0.0187  # 1.2533 · 2 / sqrt(100 · 9 · 20)


def test_a_point_is_not_in_its_own_baseline_and_a_spike_does_not_hide_the_next():
    """Oracle: closed form. The past is 1..20 round and round: median 10.5, MAD 5."""
    x = np.tile(np.arange(1.0, 21), 7)[:, None]
    x[120] = x[121] = x[122] = 1e6
    z, known = robust_z(x, np.ones(x.shape, dtype=np.bool_))
    assert known[120] and z[120, 0] == pytest.approx((1e6 - 10.5) / 7.413)
    assert z[122, 0] > 0.9 * z[120, 0]


def test_a_constant_series_neither_divides_by_zero_nor_fires_on_rounding():
    """Oracle: closed form. The floor is |median| / 512: 0 for the constant, 1e-7 of it reads 5e-5, 1 % reads 5.12."""
    x = np.full((140, 1), 3.0)
    x[120], x[130] = 3.0 * (1 + 1e-7), 3.03
    z, known = robust_z(x, np.ones(x.shape, dtype=np.bool_))
    np.testing.assert_array_equal(known[:, 0], np.arange(140) >= MINIMUM)
    assert z[119, 0] == 0 and abs(z[120, 0]) < 1e-3
    assert z[130, 0] == pytest.approx(5.12)


def test_bfloat16_rounding_of_a_constant_stays_below_four():
    """Oracle: closed form. Neighbouring bfloat16 numbers differ by at most 2^-7 of the value, four floors."""
    x = np.where(np.arange(200)[:, None] % 10 == 0, 1 + 2.0**-7, 1.0)
    z, known = robust_z(x, np.ones(x.shape, dtype=np.bool_))
    assert np.abs(z[known]).max() == 4.0
    assert 2.0**-7 / FLOOR == 4.0


def test_zeros_have_no_scale_until_they_are_the_minority():
    """Oracle: closed form. After 100 zeros, the 51st non-zero point makes the median non-zero; no z before that."""
    x = np.concatenate([np.zeros(100), np.ones(100)])[:, None]
    z, known = robust_z(x, np.ones(x.shape, dtype=np.bool_))
    # with 50 ones in the window the median is (0 + 1) / 2 and all deviations are 1/2
    assert np.flatnonzero(known[:, 0])[0] == 150
    assert z[150, 0] == pytest.approx(0.5 / (0.5 * SIGMA_PER_MAD))


def test_recorded_nan_and_inf_stay_and_never_enter_a_baseline():
    """Oracle: planted fault."""
    x = np.tile(np.arange(1.0, 21), 3)[:, None]
    x[40], x[41], x[42] = np.nan, np.inf, -np.inf
    has = np.ones(x.shape, dtype=np.bool_)
    z, known = robust_z(x, has)
    assert known[40:43].all()
    assert np.isnan(z[40, 0]) and z[41, 0] == np.inf and z[42, 0] == -np.inf
    np.testing.assert_array_equal(baseline(x, has).count[[40, 41, 44], 0], [40, 40, 41])
    assert np.isfinite(z[43:]).all()


def test_the_ends_of_float32_and_beyond():
    """Oracle: closed form. Halving and summing neither overflow nor vanish; what float32 cannot hold is left out."""
    x = np.tile([1e38, 3e38], 30)[:, None] * np.array([1.0, 1e-75, 1e38])
    z, known = robust_z(x, np.ones(x.shape, dtype=np.bool_))
    # before even rows as many points are high as low: the median is between them and the MAD is half their distance
    np.testing.assert_allclose(z[40::2, 0], -1 / SIGMA_PER_MAD, rtol=1e-6)
    np.testing.assert_allclose(z[40::2, 1], -1 / SIGMA_PER_MAD, rtol=1e-6)
    assert not known[:, 2].any()


def test_too_few_points_and_no_points():
    """Oracle: closed form. 19 points are no baseline, 20 are; nothing in, nothing out."""
    x = np.arange(40.0)[:, None]
    has = np.ones(x.shape, dtype=np.bool_)
    assert np.flatnonzero(robust_z(x, has)[1][:, 0])[0] == 20
    has[5] = False
    assert np.flatnonzero(robust_z(x, has)[1][:, 0])[0] == 21
    for shape in ((0, 3), (5, 0)):
        z, known = robust_z(np.zeros(shape), np.zeros(shape, dtype=np.bool_))
        assert z.shape == known.shape == shape and not known.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 149), st.sampled_from([-6, 0, 9]), st.sampled_from([-8.0, 1.0, 64.0]))
def test_invariances(seed: int, cut: int, power: int, shift: float):
    """Oracle: invariance. Blocks cut anywhere, wanted rows only, modules permuted, scaled by 2^k, negated, shifted."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-40, 40, size=(150, 3)).astype(float)
    has = rng.random(x.shape) > 0.1
    z, known = robust_z(x, has)
    start = max(0, cut - WINDOW)
    for got, known_part in (
        [part[cut - start :] for part in robust_z(x[start:], has[start:])],
        [part[cut:] for part in robust_z(x, has, first=cut)],
    ):
        np.testing.assert_array_equal(known_part, known[cut:])
        np.testing.assert_array_equal(got, z[cut:])
    np.testing.assert_array_equal(robust_z(x[:, [2, 0, 1]], has[:, [2, 0, 1]])[0], z[:, [2, 0, 1]])
    np.testing.assert_array_equal(robust_z(x * 2.0**power, has)[0], z)
    np.testing.assert_array_equal(robust_z(-x, has)[0], -z)
    # a shift changes only the floor; above both floors nothing changes
    a, b = baseline(x, has), baseline(x + shift, has)
    clear = (a.scale > 1) & (b.scale > 1)
    np.testing.assert_allclose(b.median[clear] - shift, a.median[clear])
    np.testing.assert_allclose(b.scale[clear], a.scale[clear])
