import math

import pytest
import sdesolve_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdesolve as sds
from sdesolve.diffusions import EDM, OU, VE, VP, CosineBeta, LinearDiffusion, Rectified, SubVP
from sdesolve.scores.network import NetworkScore

PROCESSES = {
    "vp-linear": VP(),
    "vp-cosine": VP(CosineBeta()),
    "ve": VE(),
    "subvp": SubVP(),
    "ou": OU(),
    "edm": EDM(),
    "straight": LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.999),
    "neither-preserving-nor-exploding": LinearDiffusion(
        alpha=lambda t: (-t).exp(), sigma=lambda t: 3 * t.sqrt(), t_max=2.0
    ),
}
PREDICTIONS = ("noise", "data", "score", "velocity", "edm")

processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
states = st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)])
shares = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def a_case(process, state, share, seed, dtype=torch.float64, batch=4):
    """Random ``x_0, z, t`` on the whole working interval, times spaced by their logarithm."""
    generator = torch.Generator().manual_seed(seed)
    x0, z = torch.randn(2, batch, *state, generator=generator, dtype=dtype)
    log_t = math.log(process.t_min) + share * math.log(process.t_max / process.t_min)
    jitter = torch.rand(batch, generator=generator, dtype=torch.float64)
    t = (log_t * torch.ones(batch, dtype=torch.float64)).exp()
    t = torch.lerp(t, torch.full_like(t, process.t_min), 0.5 * jitter).clamp(process.t_min, process.t_max)
    mean, sigma = process.marginal(x0, t.to(dtype))
    return x0, z, t.to(dtype), mean + sigma * z, sigma, process.alpha(t.to(dtype)).reshape_as(sigma)


def made(net, process, predicts, sigma_data=1.0):
    """A score of this parameterisation; on the line of flow matching its velocity."""
    flow = predicts == "velocity" and process is PROCESSES["straight"]
    return NetworkScore(net, process, "flow" if flow else predicts, sigma_data)


def returning(output):
    return lambda x, t: output


@processes
@pytest.mark.parametrize("predicts", PREDICTIONS)
@settings(max_examples=20, deadline=None)
@given(state=states, share=shares, seed=seeds, sigma_data=st.floats(0.1, 10))
def test_the_right_output_gives_back_data_noise_score_and_velocity(process, predicts, state, share, seed, sigma_data):
    x0, z, t, x, sigma, alpha = a_case(process, state, share, seed)
    goal = made(returning(None), process, predicts, sigma_data).target(x0, z, t)
    score = made(returning(goal), process, predicts, sigma_data)
    # What rounding of x_t alone costs: x_0 is read off x_t / alpha, z off x_t / sigma.
    eps = 1e-13 * (1 + sigma_data + 1 / sigma_data) ** 2
    size = alpha * x0.abs() + sigma * z.abs()
    assert ((score.data(x, t) - x0).abs() <= eps * (1 + size / alpha)).all()
    assert ((score.noise(x, t) - z).abs() <= eps * (1 + size / sigma)).all()
    assert ((score(x, t) + z / sigma).abs() <= eps * (1 + size / sigma) / sigma).all()
    v = alpha * z - sigma * x0
    assert ((score.velocity(x, t) - v).abs() <= eps * (1 + size) * (1 + alpha / sigma + sigma / alpha)).all()


@processes
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("to", PREDICTIONS)
@settings(max_examples=6, deadline=None)
@given(state=states, share=shares, seed=seeds)
def test_any_output_survives_a_round_trip_through_another_parameterisation(process, source, to, state, share, seed):
    _, _, t, x, sigma, alpha = a_case(process, state, share, seed)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    first = made(returning(output), process, source, 0.7)
    data, noise = first.data(x, t), first.noise(x, t)
    scale = 1 + alpha * data.abs() + sigma * noise.abs()
    assert ((alpha * data + sigma * noise - x).abs() <= 1e-13 * scale).all()

    translated = made(returning(None), process, to, 0.7).target(data, noise, t)
    second = made(returning(translated), process, to, 0.7)
    assert ((second.data(x, t) - data).abs() <= 1e-12 * scale * (1 + sigma) / alpha).all()
    assert ((second.noise(x, t) - noise).abs() <= 1e-12 * scale * (1 + alpha) / sigma).all()

    back = first.target(second.data(x, t), second.noise(x, t), t)
    amplification = (1 + sigma + alpha + 1 / sigma + 1 / alpha) ** 2
    assert ((back - output).abs() <= 1e-12 * scale * amplification).all()


@processes
@settings(max_examples=20, deadline=None)
@given(share=shares, seed=seeds, predicts=st.sampled_from(["noise", "velocity", "edm", "score"]))
def test_float32_noise_keeps_its_precision_down_to_t_min(process, share, seed, predicts):
    x0, z, t, x, _, alpha = a_case(process, (5,), share, seed, torch.float32)
    goal = made(returning(None), process, predicts).target(x0, z, t)
    noise = made(returning(goal), process, predicts).noise(x, t)
    if predicts == "velocity" or predicts == "edm":
        # A combination of x_t and F in which nothing is divided by sigma.
        assert ((noise - z).abs() <= 2e-6 * (1 + x0.abs() + z.abs()) * (1 + alpha)).all()
    else:
        torch.testing.assert_close(noise, z, rtol=1e-6, atol=1e-6)


@processes
def test_edm_inputs_have_unit_variance_and_its_time_is_a_quarter_of_log_sigma_over_alpha(process):
    seen = []

    def net(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    s = 0.5
    t = torch.full((200_000,), 0.5 * (process.t_min + process.t_max), dtype=torch.float64)
    x0, z = torch.randn(2, 200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, sigma = process.marginal(s * x0, t)
    score = NetworkScore(net, process, "edm", sigma_data=s)
    score(mean + sigma * z, t)
    x_in, t_in = seen[0]
    # Five standard errors of a sample variance.
    assert abs(float(x_in.var()) - 1) < 5 * math.sqrt(2 / 200_000)
    assert abs(float(score.target(s * x0, z, t).var()) - 1) < 5 * math.sqrt(2 / 200_000)
    torch.testing.assert_close(t_in, (process.sigma(t) / process.alpha(t)).log() / 4)


def test_edm_is_the_preconditioning_of_the_paper():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()
    sigma_data, t = 0.5, torch.tensor([0.01, 0.3, 20.0], dtype=torch.float64)
    x = torch.randn(3, 3, dtype=torch.float64)
    r = t[:, None]
    c_skip = sigma_data**2 / (r**2 + sigma_data**2)
    c_out = r * sigma_data / (r**2 + sigma_data**2).sqrt()
    c_in = 1 / (r**2 + sigma_data**2).sqrt()
    expected = c_skip * x + c_out * net(c_in * x)
    score = NetworkScore(lambda x, t: net(x), EDM(), "edm", sigma_data)
    torch.testing.assert_close(score.data(x, t), expected)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_single_time_is_the_same_time_for_every_sample(predicts):
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    shapes = []

    def net(x, t):
        shapes.append((t.shape, t.dtype))
        return x @ weight + t[:, None]

    score = NetworkScore(net, VP(), predicts)
    x = torch.randn(6, 4)
    for method in (score, score.noise, score.data, score.velocity, score.output):
        assert torch.equal(method(x, torch.tensor(0.3)), method(x, torch.full((6,), 0.3)))
    assert set(shapes) == {((6,), torch.float32)}


def test_times_reach_the_network_in_the_dtype_of_the_state_and_coefficients_in_the_precision_of_the_time():
    score = NetworkScore(lambda x, t: torch.ones_like(x) * t.to(torch.float64).to(x.dtype)[:, None], VP())
    x, t = torch.ones(2, 3), torch.tensor(1e-3, dtype=torch.float64)
    assert score(x, t).dtype == torch.float32
    exact = -torch.tensor(1e-3).double() / VP().sigma(1e-3)
    assert float(score(x, t)[0, 0]) == pytest.approx(float(exact), rel=2e-7)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.rand(4)])
def test_a_time_on_the_host_goes_with_a_state_on_a_device(predicts, t):
    score = NetworkScore(lambda x, t: x * t[:, None], VP(), predicts)  # meta tensors refuse others as a GPU's do
    assert score(torch.empty(4, 3, device="meta"), t).device.type == "meta"


def test_an_empty_batch_gives_an_empty_score():
    score = NetworkScore(lambda x, t: x, VP(), "edm")
    assert score(torch.empty(0, 3), torch.tensor(0.5)).shape == (0, 3)


def test_autocast_is_converted_back():
    linear = torch.nn.Linear(3, 3)
    score = NetworkScore(lambda x, t: linear(x), VP())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert score(torch.ones(2, 3), torch.tensor(0.5)).dtype == torch.float32


def test_a_module_is_a_submodule_and_its_parameters_are_the_scores():
    net = torch.nn.Linear(2, 2)
    score = NetworkScore(net, VP())
    assert set(score.state_dict()) == {"net.weight", "net.bias"}
    assert "process=VP, predicts='noise'" in repr(score)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NetworkScore(3, VP()), TypeError, "net must be a function or module of .x, t., got int"),
        (lambda: NetworkScore(len, "vp"), TypeError, "process must be a diffusion such as VP"),
        (lambda: NetworkScore(len, VP(), "epsilon"), ValueError, "'epsilon' is unknown; choose one of 'noise', 'data'"),
        (lambda: NetworkScore(len, VP(), "edm", 0.0), ValueError, "sigma_data must be positive and finite, got 0"),
        (
            lambda: NetworkScore(len, VP(), "edm", math.nan),
            ValueError,
            "sigma_data must be positive and finite, got nan",
        ),
    ],
)
def test_what_cannot_be_a_score_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("net", "x", "t", "error", "message"),
    [
        (lambda x, t: x[:, :2], torch.ones(4, 3), 0.5, ValueError, r"the shape of its state, \(4, 3\), got \(4, 2\)"),
        (lambda x, t: x.double(), torch.ones(4, 3), 0.5, TypeError, "given torch.float32 and returned torch.float64"),
        (lambda x, t: (x,), torch.ones(4, 3), 0.5, TypeError, "must return a tensor, got tuple"),
        (lambda x, t: x, torch.ones(4, 3).long(), 0.5, TypeError, "needs a floating-point state, got torch.int64"),
        (lambda x, t: x, torch.ones(4, 3), [0.5] * 3, ValueError, r"or \(batch,\), got x \(4, 3\) and t \(3,\)"),
        (lambda x, t: x, torch.tensor(1.0), 0.5, ValueError, r"x of shape \(batch, \*state\)"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(net, x, t, error, message):
    score = NetworkScore(net, VP())
    with pytest.raises(error, match=message):
        score(x, torch.tensor(t))


# Flow matching

MIXTURE = sds.GaussianMixture([[-1.0], [1.5]], [0.2, 0.3], weights=[0.4, 0.6])
FLOW = Rectified()


def velocity(x, t):
    """``E[z - x_0 | x_t = x]`` of the mixture."""
    return (x - MIXTURE.score(FLOW).denoise(x, t)) / t.to(x)[:, None]


@pytest.mark.parametrize("process", [FLOW, LinearDiffusion(lambda t: 1 - t, lambda t: t, t_max=0.999)])
@pytest.mark.parametrize("t", [0.01, 0.4, 0.999])
def test_a_marginal_velocity_is_the_score_and_the_flow(process, t):
    score, exact = NetworkScore(velocity, process, "flow"), MIXTURE.score(FLOW)
    x, t = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None], torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(score(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score.data(x, t), exact.denoise(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        process.probability_flow(score).drift(x, t), velocity(x, t.expand(31)), rtol=1e-7, atol=1e-7
    )
    z = torch.linspace(1, 2, 31, dtype=torch.float64)[:, None]
    torch.testing.assert_close(score.target(x, z, t), z - x)


@pytest.mark.parametrize(("solver", "stochasticity"), [(sds.Heun(), 0.0), (sds.DPMSolverPP(2), 0.0), (sds.Heun(), 1.0)])
def test_samples_of_a_marginal_velocity_are_data(solver, stochasticity):
    score = NetworkScore(velocity, FLOW, "flow")
    n = 20_000
    options = {"solver": solver, "steps": 60, "seed": 0, "stochasticity": stochasticity, "backend": "eager"}
    x = sds.sample(FLOW, score, (n, 1), **options)[:, 0]
    # The distance of two samples of this size has mean 0.017; read as alpha z - sigma x_0 it was 0.8 to 16.
    assert float(sds.metrics.wasserstein_1d(x, MIXTURE.sample(n, seed=5)[:, 0], 1)) < 0.03


def test_flow_matching_is_denoising_score_matching_of_the_simple_weighting():
    torch.manual_seed(0)
    net = torch.nn.Bilinear(2, 1, 2)
    score = NetworkScore(lambda x, t: net(x, t[:, None]), FLOW, "flow")
    loss, x0 = sds.DenoisingScoreMatching("simple", process=FLOW), torch.randn(500, 2)
    t = loss.times(score, x0, seed=3)
    z = sdesolve_kernels.normal(500, 2, seed=3, stream=sdesolve_kernels.Stream.PERTURBATION)
    x = (1 - t[:, None]) * x0 + t[:, None] * z
    by_hand = (net(x, t[:, None]) - (z - x0)).square().mean(1)
    torch.testing.assert_close(loss.per_sample(score, x0, seed=3), by_hand, rtol=1e-4, atol=1e-5)
    weighted = sds.DenoisingScoreMatching("sigma2", process=FLOW)
    by_score = weighted.per_sample(lambda x, t: score(x, t), x0, seed=3)
    torch.testing.assert_close(weighted.per_sample(score, x0, seed=3), by_score, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("process", [FLOW, PROCESSES["straight"]])
def test_a_velocity_on_the_line_of_flow_matching_says_which(process):
    with pytest.raises(ValueError, match=r"a velocity is that of flow matching, z - x_0: say predicts='flow'"):
        NetworkScore(velocity, process, "velocity")
    x0, z, t, x, sigma, alpha = a_case(process, (2,), 0.7, 1)
    v = alpha * z - sigma * x0  # the advice of the message, followed
    by_noise = NetworkScore(lambda x, t: (sigma * x + alpha * v) / (alpha**2 + sigma**2), process, "noise")
    torch.testing.assert_close(by_noise.noise(x, t), z)
    torch.testing.assert_close(by_noise.velocity(x, t), v)


@pytest.mark.parametrize(
    "process", [VP(), EDM(), SubVP(), LinearDiffusion(lambda t: 1 - t, lambda t: 2 * t, t_max=0.9)]
)
def test_the_velocity_of_flow_matching_is_for_its_own_process(process):
    with pytest.raises(ValueError, match=r"predicts='flow' is z - x_0.* give the process Rectified\(\)"):
        NetworkScore(velocity, process, "flow")


def test_rectified_ends_in_noise():
    with pytest.raises(ValueError, match="t_max must be at most 1"):
        Rectified(t_max=1.1)
    whole = Rectified(t_max=1.0)
    x = sds.sample(whole, NetworkScore(velocity, whole, "flow"), (4, 1), solver=sds.DPMSolverPP(2), steps=99, seed=0)
    late = sds.sample(FLOW, NetworkScore(velocity, FLOW, "flow"), (4, 1), solver=sds.DPMSolverPP(2), steps=99, seed=0)
    torch.testing.assert_close(x, late, rtol=0.0, atol=0.02)
    with pytest.raises(ValueError, match="EulerMaruyama steps in the score"):
        sds.sample(whole, NetworkScore(velocity, whole, "flow"), (4, 1), steps=9, seed=0)
