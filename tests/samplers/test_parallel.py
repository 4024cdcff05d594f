"""Sampling in parallel over time: what `sample` makes, by fewer calls one after another."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds

DATA = sds.GaussianMixture([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], [0.3, 0.2, 0.4])
OPTIONS = {"seed": 3, "dtype": torch.float64}


class Counted:
    """A network of the exact denoised state that counts its calls."""

    def __init__(self, process):
        self.exact, self.calls, self.rows = DATA.score(process), 0, 0

    def __call__(self, x, t, shift=None):
        self.calls, self.rows = self.calls + 1, max(self.rows, len(x))
        D = self.exact.denoise(x, t)
        return D if shift is None else D + 0.1 * shift[:, None]


VP, RECTIFIED = sds.VP(), sds.Rectified(data_at=1)


@pytest.mark.parametrize(
    ("solver", "steps", "process"),
    [
        (sds.SDEDPMSolverPP(2), 100, VP),
        (sds.DDIM(), 100, RECTIFIED),
        (sds.EulerMaruyama(), 100, VP),
        pytest.param(sds.EDMHeun(), 50, VP, marks=pytest.mark.thorough),
        pytest.param(sds.EulerMaruyama(), 150, RECTIFIED, marks=pytest.mark.thorough),
        pytest.param(sds.SDEDPMSolverPP(2), 100, RECTIFIED, marks=pytest.mark.thorough),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_same_samples_by_a_third_of_the_calls(solver, steps, process):
    exact = DATA.score(process)
    net = Counted(process)
    counted = sds.NetworkScore(lambda x, t: net(x, 1 - t if process.data_at else t), process, "data")
    options = {"solver": solver, "steps": steps, **OPTIONS}
    one_by_one = sds.sample(process, exact, (16, 2), backend="eager", **options)
    made = sds.sample_in_parallel(process, counted, (16, 2), tolerance=1e-3, **options)
    assert made.calls == net.calls
    assert made.evaluations >= 3 * made.calls
    assert float((made.x - one_by_one).square().mean().sqrt()) < 1e-3
    windowed = sds.sample_in_parallel(process, counted, (16, 2), window=30, tolerance=1e-3, **options)
    assert net.rows <= 16 * made.evaluations
    assert made.calls <= windowed.calls < made.evaluations / 2
    assert float((windowed.x - one_by_one).square().mean().sqrt()) < 1e-3


def test_without_tolerance_it_is_sample_whatever_the_window():
    process = sds.EDM()
    score = DATA.score(process)
    for solver in (sds.DPMSolverPP(2), sds.SDEDPMSolverPP(2), sds.Heun()):
        options = {"solver": solver, "steps": 8, **OPTIONS}
        one_by_one = sds.sample(process, score, (5, 2), backend="eager", **options)
        for window in (1, 3, None):
            made = sds.sample_in_parallel(process, score, (5, 2), window=window, tolerance=0.0, **options)
            torch.testing.assert_close(made.x, one_by_one, rtol=1e-9, atol=1e-9)
            assert made.calls == made.evaluations or window != 1
    for pure in (sds.Rectified(t_max=1.0),):  # from nothing but noise
        score = sds.NetworkScore(lambda x, t: DATA.score(sds.Rectified()).denoise(x, t), pure, "data")
        options = {"solver": sds.DDIM(), "grid": torch.linspace(1, 0, 9), **OPTIONS}
        one_by_one = sds.sample(pure, score, (5, 2), backend="eager", **options)
        made = sds.sample_in_parallel(pure, score, (5, 2), tolerance=0.0, **options)
        torch.testing.assert_close(made.x, one_by_one, rtol=1e-9, atol=1e-9)


def test_conditions_go_with_their_rows():
    process = sds.VP()
    score = sds.NetworkScore(Counted(process), process, "data")
    options = {"solver": sds.DDIM(), "steps": 10, "given": {"shift": torch.arange(6.0, dtype=torch.float64)}, **OPTIONS}
    one_by_one = sds.sample(process, score, (6, 2), backend="eager", **options)
    made = sds.sample_in_parallel(process, score, (6, 2), tolerance=0.0, **options)
    torch.testing.assert_close(made.x, one_by_one, rtol=1e-9, atol=1e-9)


def test_what_a_score_has_for_each_sample_goes_with_it():
    process, shift = sds.VP(), torch.arange(6.0, dtype=torch.float64)
    score = sds.NetworkScore(Counted(process), process, "data")
    given = score.given(shift=shift)
    guided = sds.ClassifierFreeGuidance(given, score, scale=shift + 0.5)
    several = sds.ClassifierFreeGuidance([given, score.given(shift=1.0)], score, scale=[2 - shift, 0.5], one_call=False)
    clipped = sds.ThresholdedScore(process, guided, sds.Clip(-1, 1))
    options = {"solver": sds.DDIM(), "steps": 10, **OPTIONS}
    for each in (given, guided, several, clipped):
        one_by_one = sds.sample(process, each, (6, 2), backend="eager", **options)
        made = sds.sample_in_parallel(process, each, (6, 2), tolerance=0.0, window=4, **options)
        torch.testing.assert_close(made.x, one_by_one, rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match=r"there are 5 samples|6 scales and 5 samples"):
            sds.sample_in_parallel(process, each, (5, 2), **options)


def test_no_samples():
    made = sds.sample_in_parallel(VP, DATA.score(VP), (0, 2), solver=sds.DDIM(), steps=4, **OPTIONS)
    assert made.x.shape == (0, 2)


@pytest.mark.parametrize("score", [DATA.score(RECTIFIED), sds.NetworkScore(Counted(VP), sds.EDM(), "data")])
def test_a_score_of_another_process_is_refused(score):
    with pytest.raises(ValueError, match="the score was made for"):
        sds.sample_in_parallel(VP, score, (2, 2), solver=sds.DDIM(), steps=4, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": sds.DormandPrince()}, ValueError, "chooses its own steps"),
        ({"window": 0}, ValueError, "window"),
        ({"tolerance": -1.0}, ValueError, "must not be negative"),
        ({"callback": print}, TypeError, "takes no callback; of sample's options it takes"),
        ({"steps": None}, ValueError, "give steps"),
    ],
)
def test_what_is_refused(options, error, message):
    given = {"solver": sds.DDIM(), "steps": 3} | options
    with pytest.raises(error, match=message):
        sds.sample_in_parallel(sds.VP(), DATA.score(sds.VP()), (2, 2), **given)
