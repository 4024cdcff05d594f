import math

import pytest
import torch

from sdesolve.quantisation import Quantisation


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "low", "high"), [(8, -1.0, 1.0), (16, 0.0, 1.0), (4, 0.0, 16.0), (1, -3.0, 0.1)])
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
        (lambda: Quantisation(8, 1.0, 1.0), ValueError, "finite low < high"),
        (lambda: Quantisation(8).dequantise(torch.tensor([256]), seed=0), ValueError, "lies in 0 ... 255, got values"),
        (lambda: Quantisation(8).dequantise(torch.tensor([-1]), seed=0), ValueError, "from -1 to -1"),
        (lambda: Quantisation(8).dequantise(torch.tensor([0.5]), seed=0), TypeError, "integers, got torch.float32"),
        (lambda: Quantisation(8).dequantise(torch.tensor(3), seed=0), ValueError, "a single number"),
        (lambda: Quantisation(8).quantise(torch.tensor([1.1])), ValueError, r"data must lie in \[-1.0, 1.0\]"),
        (lambda: Quantisation(8).quantise(torch.tensor([math.nan])), ValueError, "data must lie in"),
        (lambda: Quantisation(8).bits_per_dimension(torch.tensor(0.0), 0), ValueError, "dimension must be at least 1"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
