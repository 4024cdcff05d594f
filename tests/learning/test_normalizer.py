import math

import pytest
import torch

import sdesolve as sds
from sdesolve.nn import MLP, Normalizer
from sdesolve.scores.network import NetworkScore
from sdesolve.training.checkpoints import load, save


@pytest.fixture
def images():
    x = torch.randn(50, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([1.0, 20.0, 0.1])[:, None, None] + torch.tensor([5.0, -3.0, 0.0])[:, None, None]


@pytest.mark.parametrize(("per", "axes"), [("all", (0, 1, 2, 3)), ("channel", (0, 2, 3)), ("entry", (0,))])
def test_normalised_data_have_mean_zero_and_deviation_one(images, per, axes):
    normalizer = Normalizer.fit(images, per)
    z = normalizer(images)
    std, mean = torch.std_mean(z.double(), dim=axes, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalizer.inverse(z), images, atol=1e-5, rtol=1e-5)
    assert z.dtype == images.dtype
    slope = torch.autograd.functional.jacobian(lambda x: normalizer(x[None])[0], images[0].double())
    expected = torch.linalg.slogdet(slope.reshape(24, 24))[1]
    torch.testing.assert_close(normalizer.log_determinant(images), expected)


def test_data_on_another_device_are_mapped_there():
    normalizer, x = Normalizer.fit(torch.randn(9, 2), "entry"), torch.empty(4, 2, device="meta")
    assert normalizer(x).device == normalizer.inverse(x).device == x.device


def test_what_never_varies_keeps_its_scale():
    x = torch.tensor([[1.0, 0.1], [3.0, 0.1]])
    normalizer = Normalizer.fit(x, "entry")
    assert normalizer.scale.tolist() == [1.0, 1.0]
    torch.testing.assert_close(normalizer(x), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), atol=1e-7, rtol=0)


def test_a_range_becomes_minus_one_to_one_and_nothing_else_is_taken():
    normalizer = Normalizer.range(0.0, 16.0)
    torch.testing.assert_close(normalizer(torch.tensor([[0.0, 16.0, 4.0]])), torch.tensor([[-1.0, 1.0, -0.5]]))
    normalizer.check(torch.tensor([0.0, 16.0, math.nan]))
    Normalizer.range(-0.3, 0.1).check(torch.tensor([-0.3, 0.1]))  # in float32 a little beyond
    with pytest.raises(ValueError, match=r"must lie in \[0, 16\], .* they reach from -1 to 3"):
        normalizer.check(torch.tensor([[-1.0, 3.0]]))
    with pytest.raises(ValueError, match=r"they reach from 0 to 16.5"):
        normalizer.check(torch.tensor([[0.0, 16.5]]))


def run(score, data, **options):
    loss = sds.DenoisingScoreMatching("simple")
    return sds.train(score, data, **{"loss": loss, "steps": 8, "batch_size": 16, "progress": False} | options)


def make(normalizer):
    torch.manual_seed(3)
    return NetworkScore(MLP(2, width=8, depth=1), sds.VP(), "edm", normalizer=normalizer)


def test_training_normalises_and_the_file_keeps_how(tmp_path):
    data = 10 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1)) + 100
    normalizer = Normalizer.fit(data)
    ours, plain = make(normalizer), make(None)
    run(ours, data, checkpoint=tmp_path / "run")
    run(plain, normalizer(data))
    assert all(torch.equal(a, b) for a, b in zip(ours.net.parameters(), plain.net.parameters(), strict=True))
    save(ours, tmp_path / "weights")
    for path in ("run", "weights"):
        fresh = make(Normalizer(0.0, 1.0))
        load(fresh, tmp_path / path)
        assert torch.equal(fresh.normalizer.inverse(normalizer(data)), normalizer.inverse(normalizer(data)))
    with pytest.raises(ValueError, match=r"normalizer.scale: torch.float64 \[\] in the file, absent here"):
        load(plain, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"normalizer.scale: torch.float64 \[\] in the file, torch.float64 \[2\] here"):
        load(make(Normalizer.fit(data, "entry")), tmp_path / "weights")


def test_data_outside_the_stated_range_stop_the_training(tmp_path):
    data = torch.rand(40, 2)
    data[13, 1] = 1.5
    with pytest.raises(ValueError, match=r"the data must lie in \[0, 1\], .* to 1.5"):
        run(make(Normalizer.range(0.0, 1.0)), data)
    with pytest.raises(ValueError, match=r"the data must lie in \[0, 1\]"):
        run(make(Normalizer.range(0.0, 1.0)), [data], batch_size=None)


@pytest.mark.parametrize(
    ("make_one", "error", "message"),
    [
        (lambda: Normalizer(0.0, 0.0), ValueError, "scale positive"),
        (lambda: Normalizer(math.nan, 1.0), ValueError, "shift must be finite"),
        (lambda: Normalizer(0.0, 1.0, low=2.0, high=1.0), ValueError, "low < high"),
        (lambda: Normalizer.range(1.0, 1.0), ValueError, "scale positive"),
        (lambda: Normalizer.range(0.0, math.inf), ValueError, "finite low < high"),
        (lambda: Normalizer.fit(torch.ones(4, 2).long()), TypeError, "must be floating-point, got torch.int64"),
        (lambda: Normalizer.fit(torch.ones(1, 2)), ValueError, "at least 2 samples"),
        (lambda: Normalizer.fit(torch.full((4, 2), math.inf)), ValueError, "must be finite"),
        (lambda: Normalizer.fit(torch.ones(4, 2), "pixel"), ValueError, "per='pixel' is unknown"),
        (lambda: NetworkScore(MLP(2), sds.VP(), normalizer=lambda x: x), TypeError, "must be a Normalizer, got func"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make_one, error, message):
    with pytest.raises(error, match=message):
        make_one()
