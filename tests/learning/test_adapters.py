import importlib
import math
import types

import pytest
import torch
import torchsde

import sdesolve as sds
from sdesolve.adapters import DiffusersNet, DiffusersSchedule, FromTorchSDE, TorchSDENoise, ToTorchSDE


class Theirs(torch.nn.Module):
    """dY = (a Y + c) dt + g dW for every noise type of torchsde, with numbers that tell entries and channels apart."""

    def __init__(self, noise_type, sde_type="ito"):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type

    def f(self, t, y):
        return -1.5 * y + torch.tensor([0.3, -0.2, 0.1], dtype=y.dtype) * (1 + t)

    def g(self, t, y):
        b = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.5, 0.2]], dtype=y.dtype)
        if self.noise_type == "diagonal":
            return 0.3 * y + 0.1 * t
        if self.noise_type == "scalar":
            return (0.4 * y * b[:, 0]).unsqueeze(-1)
        if self.noise_type == "additive":
            return ((1 + t) * b).expand(len(y), 3, 2)
        return y.unsqueeze(-1) * b


STEPS = 16
CHANNELS = {"diagonal": 3, "scalar": 1, "additive": 2, "general": 2}


def interval(channels, low=0.0, high=1.0, batch=5):
    return torchsde.BrownianInterval(low, high, size=(batch, channels), dtype=torch.float64, entropy=3)


@pytest.mark.parametrize("noise", list(CHANNELS))
@pytest.mark.parametrize(("calculus", "method", "solver"), [("ito", "euler", sds.EulerMaruyama()),
                                                            ("stratonovich", "heun", sds.Heun())])  # fmt: skip
def test_their_equation_and_their_increments_take_their_path_here(noise, calculus, method, solver):
    theirs, bm = Theirs(noise, calculus), interval(CHANNELS[noise])
    y0 = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ys = torchsde.sdeint(theirs, y0, [0.0, 1.0], bm=bm, dt=1 / STEPS, method=method)
    ours = FromTorchSDE(theirs)
    x1 = sds.solve(ours, y0, 0.0, 1.0, STEPS, solver=solver, noise=TorchSDENoise(bm)).x1
    torch.testing.assert_close(x1, ys[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", list(CHANNELS))
def test_their_equation_fuses(noise):
    y0, ours = torch.ones(5, 3, dtype=torch.float64), FromTorchSDE(Theirs(noise))
    fused, eager = (
        sds.solve(ours, y0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=0, backend=b).x1 for b in ("fused", "eager")
    )
    torch.testing.assert_close(fused, eager, rtol=1e-12, atol=1e-12)


EQUATIONS = {
    "numbers": sds.SDE(lambda x, t: -x * (1 + t), lambda x, t: 0.3, "additive"),
    "scalar": sds.SDE(lambda x, t: -x, lambda x, t: 0.4 * x, "scalar"),
    "diagonal": sds.SDE(lambda x, t: t - x, lambda x, t: 0.3 * x + 0.1 * t, "diagonal"),
    "matrix": sds.SDE(lambda x, t: -x, lambda x, t: x.new_ones(2) * torch.ones_like(x)[..., None], "additive"),
    "general": sds.SDE(lambda x, t: -x, lambda x, t: x[..., None] * x.new_tensor([0.3, -0.2]), "general"),
    "process": sds.VP(),
}


@pytest.mark.parametrize("name", list(EQUATIONS))
def test_our_equation_takes_our_path_in_theirs(name):
    ours = EQUATIONS[name]
    x0 = torch.randn(5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = ToTorchSDE(ours, x0, 0.0, 1.0)
    bm = interval({"scalar": 1, "matrix": 2, "general": 2}.get(name, 4))
    ys = torchsde.sdeint(theirs, theirs.y0, theirs.times([0.0, 0.5, 1.0]), bm=bm, dt=1 / STEPS, method="euler")
    sol = sds.solve(
        ours, x0, 0.0, 1.0, STEPS, solver=sds.EulerMaruyama(), noise=TorchSDENoise(bm), save_at=[0.0, 0.5, 1.0]
    )
    torch.testing.assert_close(theirs.states(ys), sol.xs, rtol=1e-12, atol=1e-12)


def test_a_reverse_sde_runs_in_their_growing_time():
    data, process = sds.Gaussian(torch.tensor([0.5, -1.0]).double(), torch.eye(2).double()), sds.VP()
    reverse = process.reverse(data.score(process))
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grid = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)[:STEPS]  # 1 down to 1/16
    last = float(grid[-1])
    theirs, bm = ToTorchSDE(reverse, x, 1.0, last), interval(2, -1.0, -last)
    times = theirs.times([1.0, last])
    assert times.tolist() == [-1.0, -last]
    ys = torchsde.sdeint(theirs, theirs.y0, times, bm=bm, dt=1 / STEPS, method="euler")
    x1 = sds.solve(reverse, x, grid=grid, solver=sds.EulerMaruyama(), noise=TorchSDENoise(bm)).x1
    torch.testing.assert_close(theirs.states(ys)[-1], x1, rtol=1e-12, atol=1e-12)


def test_their_solver_gives_the_law_of_our_process_in_one_line():
    process, n = sds.OU(), 20_000
    x0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    theirs = ToTorchSDE(process, x0, 0.0, 1.0)
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(n, 1), dtype=torch.float64, entropy=7)
    x1 = torchsde.sdeint(theirs, theirs.y0, theirs.times([0.0, 1.0]), bm=bm, dt=1 / 64, method="milstein")[-1]
    # The chain's own moments: x <- (1 + f/64) x + g dW with the rates of OU, which are constant.
    f, g2 = float(process.drift_rate(0.5)), float(process.squared_diffusion(0.5))
    a = 1 + f / 64
    mean, variance = 2.0 * a**64, g2 / 64 * (1 - a**128) / (1 - a**2)
    assert abs(float(x1.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x1.var()) / variance - 1) < 4 * math.sqrt(2 / n)


def solve_along(solver=None, save_at=None):
    sde = sds.VP().reverse(lambda x, t: -x)
    solver, noise = solver or sds.EulerMaruyama(), TorchSDENoise(interval(2))
    return sds.solve(sde, torch.zeros(5, 2).double(), 0.9, 0.1, 2, solver=solver, noise=noise, save_at=save_at)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FromTorchSDE(torch.nn.Linear(2, 2)), TypeError, "lacks f, g, noise_type, sde_type"),
        (lambda: FromTorchSDE(Theirs("none")), ValueError, "noise_type must be one of additive, scalar, diag"),
        (lambda: FromTorchSDE(Theirs("diagonal", "backward")), ValueError, "sde_type ito or stratonovich"),
        (lambda: FromTorchSDE(Theirs("diagonal")).drift(torch.ones(2, 3), torch.ones(2)), ValueError, "one time"),
        (lambda: ToTorchSDE(sds.ODE(lambda x, t: -x), torch.ones(2, 2), 0.0, 1.0), ValueError, "this is an ODE"),
        (lambda: ToTorchSDE(sds.VP(), torch.ones(2, 2), 1.0, 1.0), ValueError, "t0 and t1 must be different"),
        (lambda: ToTorchSDE(Theirs("scalar"), torch.ones(2, 2), 0.0, 1.0), TypeError, "must be an SDE or process"),
        (lambda: ToTorchSDE(sds.VP(), torch.ones(2, 2).long(), 0.0, 1.0), TypeError, "x0 must be float32 or float64"),
        (lambda: TorchSDENoise(3), TypeError, "must be a BrownianInterval of torchsde, got int"),
        (lambda: solve_along(save_at=[0.3]), ValueError, "put every time of save_at on"),
        (lambda: solve_along(solver=sds.SDEDPMSolverPP()), ValueError, "take EulerMaruyama"),
        (lambda: TorchSDENoise(interval(2)).increments(torch.arange(2.0), (5, 3)), ValueError, r"with size=\(5, 3\)"),
        (lambda: TorchSDENoise(interval(2)).increments(torch.ones(3, 5), (5, 2)), ValueError, "one time for all"),
    ],
)  # fmt: skip
def test_what_does_not_fit_torchsde_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# diffusers


@pytest.fixture(scope="module")
def diffusers():
    return importlib.import_module("diffusers")  # here, for it takes seconds; it is in the test extra and never skipped


def small_unet(diffusers, **more):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **more,
    )  # fmt: skip


def listen(model):
    heard = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append((args[1], kwargs.get("class_labels"))), with_kwargs=True
    )
    return heard


def test_a_network_of_diffusers_is_one_line_away(diffusers):
    model, process = small_unet(diffusers), sds.VP()
    heard, x = listen(model), torch.randn(4, 3, 8, 8)
    score = sds.NetworkScore(DiffusersNet(model, steps=1000), process, "noise")
    expected = -model(x, 249.0).sample / process.sigma(torch.tensor(0.25))
    torch.testing.assert_close(score(x, torch.tensor(0.25)), expected)
    timestep, labels = heard[-1]
    assert timestep.tolist() == [249.0] * 4  # chain step k has the noise level of t = (k + 1) / 1000
    assert labels is None
    assert set(score.state_dict()) == {f"net.model.{name}" for name in model.state_dict()}
    own = DiffusersNet(model, timestep=lambda t: 10 * t)
    own(x, torch.full((4,), 0.5))
    assert heard[-1][0].tolist() == [5.0] * 4


def test_the_steps_of_their_ddpm_have_the_noise_levels_of_the_process(diffusers):
    k = torch.tensor([0, 99, 499, 999])
    product = diffusers.DDPMScheduler(num_train_timesteps=1000).alphas_cumprod[k].double()
    t = (k + 1) / 1000  # the times that are mapped to these steps
    torch.testing.assert_close(DiffusersNet(torch.nn.Identity()).steps * t.double() - 1, k.double())
    # log alpha^2 agrees to the order of one step: beta_k^2 / 2 summed, at most 1000 * 0.02^2 / 6, and an end point
    assert float((sds.VP().alpha(t.double()).square().log() - product.log()).abs().max()) < 0.08


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("told", "zero"), [("epsilon", False), ("v_prediction", True)])
def test_ddim_by_their_scheduler_is_theirs(diffusers, spacing, told, zero):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, prediction_type=told, rescale_betas_zero_snr=zero,
        beta_schedule="scaled_linear", steps_offset=int(spacing == "leading"), set_alpha_to_one=spacing != "leading",
    )  # fmt: skip
    schedule, model = DiffusersSchedule(scheduler), small_unet(diffusers).double()
    score, grid = schedule.score(model), schedule.grid(10)
    scheduler.set_timesteps(10)
    assert [int(t) - 1 for t in grid[:-1]] == scheduler.timesteps.tolist()
    x0 = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = x0
        for k in scheduler.timesteps:
            x = scheduler.step(model(x, k).sample, k, x).prev_sample
        flow = schedule.process.probability_flow(score)
        ours = sds.solve(flow, x0, grid=grid, solver=sds.DDIM(), backend="eager").x1
    # Their table is float32, and so are their roots of it: 3.1% with the continuous process in its place.
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


def test_a_scheduler_says_what_is_not_done_here(diffusers):
    with pytest.warns(UserWarning, match="clip_sample of this scheduler changes its denoised states"):
        DiffusersSchedule(diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match=r"lacks them. One of flow matching has no table: .* Rectified\(\), 'flow'"):
        DiffusersSchedule(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="prediction_type='flow' is unknown here"):
        DiffusersSchedule(diffusers.DDIMScheduler(clip_sample=False, prediction_type="flow"))


def test_a_learned_variance_is_left_out_on_request(diffusers):
    torch.manual_seed(0)

    class Both(torch.nn.Conv2d):
        def forward(self, x, k):
            return types.SimpleNamespace(sample=super().forward(x))

    model, x, t = Both(3, 6, 3, padding=1), torch.randn(2, 3, 4, 4), torch.tensor(0.5)
    score = sds.NetworkScore(DiffusersNet(model, learned_variance=True), sds.VP())
    torch.testing.assert_close(score.noise(x, t), model(x, t).sample[:, :3])
    with pytest.raises(
        ValueError, match=r"second half of its channels is a variance, give lambda .*chunk\(2, 1\)\[0\]"
    ):
        sds.NetworkScore(DiffusersNet(model), sds.VP())(x, t)
    with pytest.raises(ValueError, match="a model of 6 channels on states of 3; this one returns 3"):
        DiffusersNet(Both(3, 3, 1), learned_variance=True)(x, t.expand(2))


def test_their_network_draws_and_learns_with_classes_and_a_null_class(diffusers):
    model = small_unet(diffusers, num_class_embeds=11)
    score, heard = sds.NetworkScore(DiffusersNet(model, classes=10), sds.VP()), listen(model)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor(0.5)
    for conditional, expected in ((score, [10] * 4), (score.given(3), [3] * 4), (score.given(10), [10] * 4)):
        conditional(x, t)
        assert heard[-1][1].tolist() == expected
    expected = model(x, 499.0, class_labels=torch.full((4,), 4)).sample
    torch.testing.assert_close(score.given(4).noise(x, t), expected)
    drawn = sds.sample(score.process, score.given(torch.arange(3)), (3, 3, 8, 8), steps=3, seed=0)
    assert bool(drawn.isfinite().all())
    before = model.conv_in.weight.detach().clone()
    loss = sds.DenoisingScoreMatching("simple")
    run = sds.train(score, x, labels=torch.arange(4), loss=loss, steps=2, batch_size=4, warmup=0, progress=False)
    assert bool(run.losses.isfinite().all())
    assert not torch.equal(model.conv_in.weight, before)


def test_what_is_not_of_diffusers_is_refused(diffusers):
    with pytest.raises(TypeError, match="model must be a module"):
        DiffusersNet(lambda x, t: x)
    with pytest.raises(TypeError, match="a tensor called sample, got Tensor; a module that returns a tensor needs no"):
        DiffusersNet(sds.nn.MLP(2))(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="need 11 embeddings, and this model has 10: make it with num"):
        DiffusersNet(small_unet(diffusers, num_class_embeds=10), classes=10)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        DiffusersNet(torch.nn.Identity(), steps=0)
    with pytest.raises(ValueError, match="wrapped without classes and takes no label"):
        DiffusersNet(small_unet(diffusers))(torch.ones(4, 3, 8, 8), torch.ones(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be in 0 ... 9"):
        sds.NetworkScore(DiffusersNet(small_unet(diffusers), classes=10), sds.VP()).given(11)
