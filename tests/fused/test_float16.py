"""float16 where the processor has no instructions for it: every number is converted as the hardware does."""

from __future__ import annotations

import numba
import numpy as np
from sdesolve_kernels._numba import memory


@numba.njit
def widened(halves, out):
    for i in range(len(halves)):
        out[i] = memory._from_float16_software(halves[i])


@numba.njit
def rounded(values, out):
    for i in range(len(values)):
        out[i] = memory._to_float16_software(values[i])


HALVES = np.arange(1 << 16, dtype=np.uint16)
WIDE = HALVES.view(np.float16).astype(np.float32)


def test_every_float16_is_widened():
    out = np.empty(len(HALVES), np.float32)
    widened(HALVES, out)
    nan = np.isnan(WIDE)
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(out.view(np.uint32)[~nan], WIDE.view(np.uint32)[~nan])


def test_values_are_rounded_to_the_nearest_even():
    """All float16 numbers, what lies in the middle between two, both neighbours of these; and any bits at all."""
    numbers = np.sort(WIDE[np.isfinite(WIDE)])
    middles = (numbers[:-1] + numbers[1:]) / 2
    ties = np.concatenate([numbers, middles, np.float32([65519.996, 65520.0, 65520.004, np.inf, -np.inf, np.nan])])
    near = [np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf)]
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([ties, *near, any_bits])
    out = np.empty(len(values), np.uint16)
    rounded(values, out)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(out.view(np.float16)), nan)
    assert np.array_equal(out[~nan], expected.view(np.uint16)[~nan])


def test_the_instructions_are_looked_for(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for features, there in (("", False), ("+avx,-f16c", False), ("+avx,+f16c,+fma", True)):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert memory._converts_float16() == there
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert memory._converts_float16()
