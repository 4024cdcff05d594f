"""Where samplers evaluate, stop and refuse. Known faults of other libraries among them."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

DATA = sds.Gaussian(torch.tensor([0.5, -0.5, 0.0]), torch.tensor([1.0, 0.3, 2.0]))
ZERO = torch.zeros(1, dtype=torch.float64)
SAMPLERS = [
    *(sds.ReverseDiffusion(), sds.Ancestral(), sds.Ancestral("forward"), sds.DDIM(), sds.DDIM(0.4)),
    *(sds.DPMSolver(3), sds.DPMSolverPP(3), sds.SDEDPMSolverPP(3), sds.DPMSolverPP2S(), sds.SDEDPMSolverPP2S()),
    *(sds.DEIS(3), sds.LinearMultistep(3), sds.UniPC(3), sds.SASolver(3, 3), sds.EDMHeun(), sds.DPM2()),
    sds.EDMHeun(churn=5.0, churn_range=(0.5, 50.0)),
]
PROCESSES = [sds.VP(), sds.VP(sds.CosineBeta()), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()]


def equation(process, solver, score):
    if solver.weak_order is None:
        return process.probability_flow(score)
    return process.reverse(score, solver.stochasticity or 1.0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_grid_to_zero_ends_with_tweedie(solver, process):
    """The step to clean data is the denoiser's output, with one evaluation (peers leave noise there)."""
    score, times = DATA.score(process), process.time_grid(9)
    options = {"solver": solver, "seed": 2, "dtype": torch.float64, "backend": "kernel"}
    denoised = sds.sample(process, score, (4, 3), grid=times, **options)
    noisy = sds.sample(process, score, (4, 3), grid=times, denoise=False, **options)
    torch.testing.assert_close(denoised, sds.tweedie(process, score, noisy, times[-1]), rtol=1e-12, atol=1e-12)
    if getattr(solver, "churn", 0):
        return  # churn per step depends on the number of steps
    to_zero = sds.sample(process, score, (4, 3), grid=torch.cat([times, ZERO]), **options)
    assert to_zero.isfinite().all()
    torch.testing.assert_close(to_zero, denoised, rtol=1e-8, atol=1e-9)


def test_nothing_is_left_to_denoise_at_zero_noise():
    """Where the score of data without density does not exist, and one evaluation more would be one too many."""
    process, seen = sds.EDM(), []
    exact = sds.Gaussian(torch.tensor([0.5, 2.0]), torch.zeros(2)).score(process)

    def score(x, t):
        seen.append(float(t))
        return exact(x, t)

    grid = torch.cat([process.time_grid(9), ZERO])
    x = sds.sample(
        process, score, (4, 2), grid=grid, solver=sds.DPMSolverPP(2), seed=0, dtype=torch.float64, backend="kernel"
    )
    torch.testing.assert_close(x, torch.tensor([0.5, 2.0], dtype=torch.float64).expand(4, 2))
    assert len(seen) == 10
    assert min(seen) > 0


@pytest.mark.parametrize("backend", ["kernel", "eager"])
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_evaluations_are_as_stated_and_inside_the_grid(solver, backend):
    """A grid of spacing ``(T - eps) / (N - 1)`` walked with steps of ``1 / N`` goes past its end."""
    process, seen = sds.VP(), []
    exact = DATA.score(process)

    def score(x, t):
        seen.append(float(t))
        return exact(x, t)

    sde = equation(process, solver, score)
    x0 = process.sample_prior((2, 3), seed=0, dtype=torch.float64)
    times = process.time_grid(8)
    sol = sds.solve(sde, x0, grid=times, solver=solver, seed=0, backend=backend)
    assert sol.stats.nfe == len(seen) == 8 * solver.evaluations
    assert max(seen) <= process.t_max
    assert min(seen) >= process.t_min
    seen.clear()
    sol = sds.solve(sde, x0, grid=torch.cat([times, ZERO]), solver=solver, seed=0, backend=backend)
    assert sol.stats.nfe == len(seen) == 8 * solver.evaluations + 1
    assert min(seen) >= process.t_min


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_process_integrated_to_a_time_per_sample_ends_clean_for_all_or_none(solver):
    process = sds.EDM()
    score = DATA.score(process)
    sde = equation(process, solver, score)
    grid = torch.stack([sds.grids.karras(80.0, 0.1, 5), sds.grids.karras(60.0, 0.2, 5)], dim=1)
    both = torch.cat([grid, torch.zeros(1, 2, dtype=torch.float64)])
    x0 = process.sample_prior((2, 3), seed=0, dtype=torch.float64)
    together = sds.solve(sde, x0, grid=both, solver=solver, seed=0).x1
    noise = sds.BrownianPath(0, first_path=1)
    alone = sds.solve(sde, x0[1:], grid=both[:, 1], solver=solver, noise=noise, backend="kernel").x1
    torch.testing.assert_close(together[1:], alone, rtol=1e-11, atol=1e-11)
    both[-1, 0] = 0.01
    with pytest.raises(ValueError, match="may end at zero noise, for all samples or for none"):
        sds.solve(sde, x0, grid=both, solver=solver, seed=0)


def test_the_flow_goes_both_ways():
    """Encoding and decoding by the same sampler, with the error of its order."""
    process = sds.EDM()
    flow = process.probability_flow(DATA.score(process))
    x0 = DATA.sample(4, seed=0, dtype=torch.float64)
    up = sds.grids.geometric(0.05, 20.0, 400)
    for solver in (sds.DPMSolver(3), sds.UniPC(2), sds.DEIS(3), sds.EDMHeun()):
        y = sds.solve(flow, x0, grid=up, solver=solver, backend="kernel").x1
        torch.testing.assert_close(y, DATA.flow(process)(x0, 0.05, 20.0), rtol=1e-3, atol=1e-3)
        back = sds.solve(flow, y, grid=up.flip(0), solver=solver, backend="kernel").x1
        torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sds.DPMSolverPP(0), "order must be at least 1, got 0"),
        (lambda: sds.DPMSolverPP(4), "DPMSolverPP has orders 1 to 3, got 4"),
        (lambda: sds.DEIS(5), "DEIS has orders 1 to 4, got 5"),
        (lambda: sds.UniPC(4), "UniPC has orders 1 to 3"),
        (lambda: sds.UniPC(2, "bh3"), "variant must be 'bh1' or 'bh2', got 'bh3'"),
        (lambda: sds.SASolver(5, 0), "SASolver with corrector 0 has orders 1 to 4, got 5"),
        (lambda: sds.SASolver(4, 1), "SASolver with corrector 1 has orders 1 to 3, got 4"),
        (lambda: sds.SASolver(3, 4), r"correctors of order 0 \(none\) to 3, got 4"),
        (lambda: sds.DDIM(1.5), r"eta scales the standard deviation of the noise and lies in \[0, 1\], got 1.5"),
        (lambda: sds.DDIM(math.nan), "eta scales the standard deviation"),
        (lambda: sds.Ancestral("large"), "variance must be 'posterior' or 'forward', got 'large'"),
        (lambda: sds.EDMHeun(churn=-1.0), "churn must be at least 0 and finite, got -1.0"),
        (lambda: sds.EDMHeun(churn=1.0, churn_range=(2.0, 1.0)), "churn_range is the noise levels"),
        (lambda: sds.EDMHeun(churn_noise=1.01), "EDMHeun without churn is deterministic"),
        (lambda: sds.DPM2(churn=1.0, churn_noise=0.0), "churn_noise must be positive"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sds.DDIM("half"), "eta must be a number, got 'half' of type str"),
        (lambda: sds.EDMHeun("5"), "churn must be a number"),
        (lambda: sds.EDMHeun(5.0, 3.0), r"churn_range must be two noise levels, \(lowest, highest\), got 3.0"),
        (lambda: sds.DPM2(5.0, (0.0, None)), r"churn_range\[1\] must be a number, got None"),
        (lambda: sds.DormandPrince("1e-5"), "rtol must be a number"),
    ],
)
def test_settings_of_a_wrong_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_churn_range_may_be_a_list():
    assert sds.EDMHeun(5.0, [0.1, 3.0]) == sds.EDMHeun(5.0, (0.1, 3.0))
    assert len({sds.EDMHeun(5.0, [0.1, 3.0]), sds.EDMHeun(5.0, (0.1, 3.0))}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": sds.DPMSolverPP(2), "stochasticity": 1.0}, "DPMSolverPP integrates ODEs.*stochasticity=0"),
        ({"solver": sds.EDMHeun(), "stochasticity": 0.5}, "EDMHeun integrates ODEs"),
        ({"solver": sds.SDEDPMSolverPP(2), "stochasticity": 0}, "SDEDPMSolverPP adds noise and this is an ODE"),
        ({"solver": sds.DDIM(0.5), "stochasticity": 1.0}, r"DDIM\(eta=0.5\) is made for stochasticity 0.5.*has 1"),
        ({"solver": sds.Ancestral(), "stochasticity": 2.0}, "made for stochasticity 1, and this equation has 2"),
        ({"grid": torch.tensor([1.0, 0.5, 0.5])}, "strictly increasing or strictly decreasing"),
        ({"grid": torch.tensor([0.1, 1.0])}, r"decreases within \[0, t_max = 1.0\]"),
        ({"grid": torch.tensor([1.5, 0.1])}, r"decreases within \[0, t_max = 1.0\]"),
        ({"grid": torch.tensor([1.0, -0.1])}, r"decreases within \[0, t_max = 1.0\]"),
        ({"grid": torch.tensor([1.0, math.nan])}, "finite times"),
        ({"solver": sds.EulerMaruyama(), "grid": torch.tensor([1.0, 0.0])}, "to end at 0 take a sampler such as DPMS"),
    ],
)
def test_bad_requests(options, message):
    process = sds.VP()
    options = {"solver": sds.DPMSolverPP(2), **options}
    options.setdefault("steps", None if "grid" in options else 5)
    with pytest.raises(ValueError, match=message):
        sds.sample(process, DATA.score(process), (4, 3), seed=0, **options)


@pytest.mark.parametrize(
    ("solver", "steps", "lower"),
    [
        (sds.DPMSolverPP(2), 1, sds.DPMSolverPP(1)),
        (sds.DPMSolverPP(3), 2, sds.DPMSolverPP(2)),
        (sds.SDEDPMSolverPP(3), 1, sds.SDEDPMSolverPP(1)),
        (sds.UniPC(3), 2, sds.UniPC(2)),
        (sds.SASolver(3, 3), 1, sds.SASolver(1, 1)),
        (sds.SASolver(4, 0), 3, sds.SASolver(3, 0)),
        (sds.DEIS(4), 3, sds.DEIS(3)),
        (sds.LinearMultistep(4), 1, sds.DDIM()),
    ],
    ids=repr,
)
def test_fewer_steps_than_the_order_run_at_the_order_that_they_allow(solver, steps, lower):
    process = sds.VP()
    few, same = (
        sds.sample(process, DATA.score(process), (4, 3), solver=s, steps=steps, seed=0, backend="kernel")
        for s in (solver, lower)
    )
    torch.testing.assert_close(few, same, rtol=1e-5, atol=1e-5)


def test_equations_that_samplers_are_not_for():
    x0, ou = torch.ones(2, 3, dtype=torch.float64), sds.OU()
    with pytest.raises(ValueError, match=r"DPMSolverPP integrates the reverse SDE or probability flow.*got OU"):
        sds.solve(ou, x0, 0.0, 1.0, 4, solver=sds.DPMSolverPP(2))
    plain = sds.SDE(lambda x, t: -x, lambda x, t: 1.0, noise="additive")
    reverse = sds.ReverseSDE(plain, lambda x, t: -x)
    with pytest.raises(ValueError, match=r"needs the alpha.* and sigma.* of a linear diffusion"):
        sds.solve(reverse, x0, 1.0, 0.1, 4, solver=sds.SDEDPMSolverPP(2))
    vp = sds.VP()
    score = DATA.score(vp)
    with pytest.raises(ValueError, match="cannot start or pass there"):
        sds.solve(vp.probability_flow(score), x0, 0.0, 1.0, 4, solver=sds.DPMSolverPP(2))
    with pytest.raises(ValueError, match="integrates a reverse SDE from noise to data, so its grid must decrease"):
        sds.solve(vp.reverse(score), x0, 0.1, 1.0, 4, solver=sds.SDEDPMSolverPP(2))
    still = sds.LinearDiffusion(alpha=torch.ones_like, sigma=lambda t: torch.where(t < 0.5, t, 0.5 + 0 * t))
    with pytest.raises(ValueError, match=r"log-SNR does not change from t = 0.9 to 0.8"):
        sds.solve(still.probability_flow(score), x0, 0.9, 0.1, 8, solver=sds.DPMSolverPP(2))


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(2), sds.EDMHeun()], ids=repr)
def test_states_inside_a_step_to_zero_noise(solver):
    """A network's score, noise over noise level, does not exist at its end."""
    process = sds.VP()
    exact = DATA.score(process)
    grid = sds.grids.with_zero(sds.grids.uniform_log_snr(process, 60, t1=0.01))

    def score(x, t):
        e = -process.sigma(t.clamp(min=1e-9)).to(x) * exact(x, t.clamp(min=1e-9))
        return -e / process.sigma(t).to(x)

    x0 = process.sample_prior((4, 3), seed=0, dtype=torch.float64)
    flow = process.probability_flow(score)
    sol = sds.solve(flow, x0, grid=grid, solver=solver, save_at=[0.01, 0.004, 0.0])
    truth = DATA.flow(process)
    inside, end = (
        float((x - truth(sol.xs[0], 0.01, t)).abs().amax()) for x, t in zip(sol.xs[1:], (0.004, 1e-12), strict=True)
    )
    assert inside < 0.5 * end < 2e-3  # the step itself, Tweedie's formula, is off by more


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(2), sds.EDMHeun(), sds.Heun(), sds.EulerMaruyama()], ids=repr)
@pytest.mark.parametrize("process", [sds.VP(), sds.EDM(), sds.OU()], ids=lambda p: type(p).__name__)
def test_solve_refuses_times_that_the_process_does_not_have(process, solver):
    x0 = torch.ones(2, 3)
    flow = process.probability_flow(DATA.score(process))
    for times in ([0.5, -0.1], [1.1 * process.t_max, 0.5]):
        with pytest.raises(ValueError, match=r"lie within \[0, t_max = .* include (-0.1|1.1|5.5|88);.*larger t_max"):
            sds.solve(flow, x0, *times, 4, solver=solver)
        with pytest.raises(ValueError, match=r"lie within \[0, t_max"):
            sds.solve(flow, x0, *times, solver=sds.DormandPrince())
        with pytest.raises(ValueError, match=r"lie within \[0, t_max"):
            sds.solve(flow, x0, grid=torch.tensor([[1.0, times[0]], [0.4, times[1]]]), solver=solver)


def test_a_grid_in_float32_may_start_where_t_max_is_rounded_to():
    process = sds.EDM(sigma_max=80.3)
    grid = torch.linspace(80.3, 0.1, 4)
    assert float(grid[0]) > process.t_max
    x = sds.sample(process, DATA.score(process), (2, 3), grid=grid, seed=0, solver=sds.DDIM())
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_score_that_is_nan_is_named_with_its_time(solver):
    process = sds.VP()
    with pytest.raises(sds.DivergenceError, match=r"step 0 of 3, which starts at t = 1: the drift returned nan"):
        sds.sample(process, lambda x, t: x * math.nan, (4, 2), steps=3, seed=0, solver=solver, backend="kernel")
    with pytest.raises(ValueError, match=r"score must return the shape of the state, \(4, 2\), got \(4, 1\)"):
        sds.sample(process, lambda x, t: x[:, :1], (4, 2), steps=3, seed=0, solver=solver, backend="kernel")


STRAIGHT = sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t)
COSINE = sds.LinearDiffusion(alpha=lambda t: torch.cos(0.5 * math.pi * t), sigma=lambda t: torch.sin(0.5 * math.pi * t))
FROM_NOISE = [
    *(sds.DDIM(), sds.DDIM(0.5), sds.DPMSolverPP(1), sds.DPMSolverPP(2), sds.DPMSolverPP(3), sds.SDEDPMSolverPP(2)),
    *(sds.UniPC(1), sds.UniPC(3), sds.SASolver(3, 3), sds.SASolver(2, 1), sds.SASolver(3, 0)),
    sds.PredictorCorrector(sds.DPMSolverPP(2), sds.LangevinCorrector(snr=0.05)),
]


def network(process, predicts):
    """A perfect network for the data."""
    exact = DATA.score(process)

    def net(x, t):
        D = exact.denoise(x, t)
        if predicts == "data":
            return D
        alpha, sigma = (c(t)[:, None].to(x) for c in (process.alpha, process.sigma))
        z = (x - alpha * D) / sigma
        return alpha * z - sigma * D if process is COSINE else z - D

    return sds.NetworkScore(net, process, "flow" if predicts == "velocity" and process is STRAIGHT else predicts)


@pytest.mark.parametrize("process", [STRAIGHT, COSINE], ids=["straight", "cosine"])
@pytest.mark.parametrize("solver", FROM_NOISE, ids=repr)
def test_samplers_in_the_denoised_state_start_from_pure_noise(solver, process):
    """Where alpha(1) is 0, or 6e-17, samples had a mean of 1.8e6 for 3, or the drift was blamed."""
    n, options = 4000, {"solver": solver, "steps": 60, "seed": 1}
    if isinstance(solver, sds.SASolver):
        options["stochasticity"] = 0  # of order 3 it is far from its limit on the reverse SDE, wherever it starts
    x = sds.sample(process, DATA.score(process), (n, 3), backend="eager", **options)
    late = sds.sample(process, DATA.score(process), (n, 3), from_time=0.9999, backend="eager", **options)
    for made in (x, late):
        assert (made.mean(0) - DATA.mean).abs().max() < 5 / math.sqrt(n) + 0.05
        assert (made.var(0) - torch.tensor([1.0, 0.3, 2.0])).abs().max() < 5 * 2 * math.sqrt(2 / n) + 0.1
    for predicts in ("data", "velocity"):
        net = network(process, predicts)
        same = sds.sample(process, net, (n, 3), backend="eager", **options)
        torch.testing.assert_close(same, x, rtol=1e-3, atol=1e-3)
    both = sds.ClassifierFreeGuidance(net, DATA.score(process), scale=0.5)
    guided = sds.sample(process, both, (n, 3), backend="eager", **options)
    torch.testing.assert_close(guided, x, rtol=1e-3, atol=1e-3)


def test_pure_noise_is_fused_and_gone_on_with():
    score, options = DATA.score(STRAIGHT), {"solver": sds.DPMSolverPP(2), "seed": 1}
    fused, eager = (sds.sample(STRAIGHT, score, (8, 3), steps=9, backend=b, **options) for b in ("fused", "eager"))
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
    late = {"from_time": 0.5, "steps": 9, **options}  # by the score again, and not by that kernel
    fused, eager = (sds.sample(STRAIGHT, score, (8, 3), backend=b, **late) for b in ("fused", "eager"))
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
    flow, grid, x0 = STRAIGHT.probability_flow(score), STRAIGHT.time_grid(9), STRAIGHT.sample_prior((8, 3), seed=0)
    whole = sds.solve(flow, x0, grid=grid, solver=sds.DPMSolverPP(2), backend="eager")
    first = sds.solve(flow, x0, grid=grid[:2], solver=sds.DPMSolverPP(2), backend="eager")
    rest = sds.solve(flow, grid=grid[1:], start=first.state, solver=sds.DPMSolverPP(2), backend="eager")
    assert torch.equal(rest.x1, whole.x1)


@pytest.mark.parametrize("process", [STRAIGHT, COSINE], ids=["straight", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cannot_start_from_pure_noise_is_refused_by_name(process, dtype):
    score = DATA.score(process)
    able = {type(s) for s in FROM_NOISE}
    for solver in [*(s for s in SAMPLERS if type(s) not in able), sds.EulerMaruyama(), sds.Heun(), sds.DormandPrince()]:
        name, steps = type(solver).__name__, {} if solver.controller else {"steps": 40}
        with pytest.raises(ValueError, match=rf"alpha = .* at t = 1, .*{name} steps in the score.*or take DDIM, DPMS"):
            sds.sample(process, score, (4, 3), solver=solver, seed=0, dtype=dtype, **steps)
        earlier = {"from_time": 0.999, "backend": "eager"}
        sds.sample(process, score, (4, 3), solver=solver, seed=0, dtype=dtype, **earlier, **steps)
    for blind in (lambda x, t: -x, sds.NetworkScore(lambda x, t: x, process, predicts="noise")):
        with pytest.raises(ValueError, match=r"its score says nothing of them there: start at t = 0\.99"):
            sds.sample(process, blind, (4, 3), solver=sds.DDIM(), steps=5, seed=0, dtype=dtype)
    with pytest.raises(ValueError, match="take 'bh2'"):
        sds.sample(process, score, (4, 3), solver=sds.UniPC(2, "bh1"), steps=5, seed=0, dtype=dtype)
    with pytest.raises(ValueError, match=r"DDIM cannot pass t = 1, where LinearDiffusion has alpha = 0"):
        sds.solve(process.probability_flow(score), torch.zeros(2, 3, dtype=dtype), 0.1, 1.0, 5, solver=sds.DDIM())


def test_an_end_is_told_from_pure_noise_in_the_precision_that_runs():
    """A long linear schedule still has its data at the end, and 1e-6 of them are too few for float32 alone."""
    options = {"solver": sds.DPMSolver(2), "steps": 20, "seed": 0, "backend": "eager"}
    sds.sample(sds.VP(sds.LinearBeta(0.1, 60.0)), lambda x, t: -x, (4, 3), **options)
    late = sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=1 - 1e-7)
    with pytest.raises(ValueError, match=r"alpha = 1e-07 at t = 1, too little of the data for torch.float32"):
        sds.sample(late, lambda x, t: -x, (4, 3), **options)
    sds.sample(late, lambda x, t: -x, (4, 3), dtype=torch.float64, **options)
