import math

import pytest
import torch

from sdesolve.likelihood.quantisation import Quantisation


@pytest.mark.parametrize(
    ("bits", "low", "high", "offset"), [(8, 0.0, 1.0, 8), (8, -1.0, 1.0, 7), (4, -1.0, 1.0, 3), (5, 0.0, 16.0, 1)]
)
def test_the_offset_follows_bits_and_range(bits, low, high, offset):
    q = Quantisation(bits, low, high)
    # A density of 1 in each of three dimensions.
    assert float(q.bits_per_dimension(torch.tensor(0.0), 3)) == pytest.approx(offset, abs=1e-12)
    # Uniform data costs its bits, whatever the range it is put on.
    uniform = torch.tensor(-3 * math.log(high - low), dtype=torch.float64)
    assert float(q.bits_per_dimension(uniform, 3)) == pytest.approx(bits, abs=1e-12)
    nat = float(q.bits_per_dimension(torch.tensor(-6.0 * math.log(2.0)), 3)) - offset
    assert nat == pytest.approx(2.0, abs=1e-6)


def test_any_number_of_levels():
    q = Quantisation(levels=17, low=0.0, high=17.0)  # the 8x8 digits: 0 ... 16 in bins of width 1
    assert q.bits == math.log2(17)
    uniform = torch.tensor(-3 * math.log(17.0), dtype=torch.float64)
    assert float(q.bits_per_dimension(uniform, 3)) == pytest.approx(q.bits)
    k = torch.arange(17).repeat(100)[:, None]
    assert torch.equal(q.quantise(q.dequantise(k, seed=0)), k)
    assert torch.equal(q.value(torch.arange(17)), torch.arange(17) + 0.5)
    ends = Quantisation.inclusive(17)
    torch.testing.assert_close(ends.value(torch.arange(17), dtype=torch.float64), torch.arange(17).double() / 8 - 1)
    assert (ends.width, ends.high) == (0.125, 1.0625)
    assert repr(Quantisation(4)) == "Quantisation(levels=16, low=-1.0, high=1.0)"


def test_the_ends_of_a_range_are_in_it_as_their_dtype_has_them():
    # in float32, -0.3 is a little less than in float64, and 0.1 a little more
    assert Quantisation(3, -0.3, 0.1).quantise(torch.tensor([-0.3, 0.1])).tolist() == [0, 7]


@pytest.mark.parametrize("levels", [3, 17, 1000, 2**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (100.0, 101.0)])
def test_values_are_on_their_levels_and_back(levels, low, high, dtype):
    if levels == 2**16 and low == 100.0:
        low, high = 1.0, 2.0  # at 100 half a bin is a rounding of float32
    q = Quantisation(low=low, high=high, levels=levels)
    k = torch.arange(levels)
    x = q.value(k, dtype=dtype)
    assert torch.equal(q.quantise(x), k)
    mean, std = torch.tensor(0.4 * low + 0.6 * high, dtype=dtype), torch.tensor(0.1 * (high - low), dtype=dtype)
    total = q.gaussian_log_prob(x, mean, std).exp().double().sum()
    # Each edge is off by a rounding of the range in standard deviations, and neighbours share it.
    rounding = torch.finfo(dtype).eps * max(abs(low), abs(high)) / float(std)
    assert float(total) == pytest.approx(1.0, abs=40 * rounding + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bits", "low", "high"), [(8, -1.0, 1.0), (16, 0.0, 1.0), (4, 0.0, 16.0), (1, -3.0, 0.1), (16, 0.0, 0.1)]
)
def test_dequantised_integers_stay_in_their_bins(bits, low, high, dtype):
    q = Quantisation(bits, low, high)
    k = torch.arange(2**bits).reshape(-1, 2).repeat(max(1, 2000 // 2**bits), 1)
    x = q.dequantise(k, seed=1, dtype=dtype)
    assert x.dtype is dtype
    assert torch.equal(q.quantise(x), k)
    u = (x.double() - low) / q.width - k
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / (12 * n))
    assert abs(float(u.var()) - 1 / 12) < 5 * math.sqrt(1 / (180 * n))
    torch.testing.assert_close(q.dequantise(k[3:5], seed=1, first_sample=3, dtype=dtype), x[3:5])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Quantisation(0), ValueError, "bits must be at least 1"),
        (lambda: Quantisation(17), ValueError, "at most 16, got 17"),
        (lambda: Quantisation(8, levels=256), ValueError, "bits or levels, which is 2.bits, not both"),
        (lambda: Quantisation(levels=1), ValueError, "levels must be at least 2"),
        (lambda: Quantisation(levels=2**16 + 1), ValueError, r"levels must be at most 2.16"),
        (lambda: Quantisation(levels=2.5), TypeError, "levels"),
        (lambda: Quantisation.inclusive(17, 1.0, -1.0), ValueError, "finite low < high"),
        (lambda: Quantisation(levels=17).value(torch.tensor([17])), ValueError, "data of 17 levels lies in 0 ... 16"),
        (lambda: Quantisation(8).value(torch.tensor([1.0])), TypeError, "value takes integers"),
        (lambda: Quantisation(8, 1.0, 1.0), ValueError, "finite low < high"),
        (lambda: Quantisation(8).dequantise(torch.tensor([256]), seed=0), ValueError, "lies in 0 ... 255, got values"),
        (lambda: Quantisation(8).dequantise(torch.tensor([-1]), seed=0), ValueError, "from -1 to -1"),
        (lambda: Quantisation(8).dequantise(torch.tensor([0.5]), seed=0), TypeError, "in a tensor, got torch.float32"),
        (lambda: Quantisation(8).dequantise(torch.tensor(3), seed=0), ValueError, "a single number"),
        (lambda: Quantisation(8).quantise(torch.tensor([1.1])), ValueError, r"data must lie in \[-1.0, 1.0\]"),
        (lambda: Quantisation(8).quantise(torch.tensor([math.nan])), ValueError, "data must lie in"),
        (lambda: Quantisation(8).bits_per_dimension(torch.tensor(0.0), 0), ValueError, "dimension must be at least 1"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
