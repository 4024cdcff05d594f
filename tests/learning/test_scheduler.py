"""`DiffusersScheduler`: pipelines of diffusers with our samplers, and the same without diffusers."""

import importlib
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import sdesolve as sds
from sdesolve.adapters import DiffusersSchedule, DiffusersScheduler

ROOT = Path(__file__).parents[2]
SHAPE = (3, 2, 4, 4)


class Plain:
    """A scheduler by diffusers' documented interface, written here: a table, a configuration, timesteps."""

    def __init__(self, alphas_cumprod=None, **config):
        betas = torch.linspace(1e-4, 0.02, 1000)
        self.alphas_cumprod = (1 - betas).cumprod(0) if alphas_cumprod is None else alphas_cumprod
        self.config = types.SimpleNamespace(prediction_type="epsilon", **config)
        self.timesteps = torch.arange(1000).flip(0)

    def set_timesteps(self, num_inference_steps, device=None):
        stride = len(self.alphas_cumprod) // num_inference_steps
        self.timesteps = (torch.arange(num_inference_steps) * stride).flip(0).to(device)


class Beyond(Plain):
    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.tensor([1001, 500, 0])


def network(x, k):
    return torch.tanh(x.flip(1) * (1 + 0.001 * float(k))) + 0.1 * x


def drive(scheduler, x, steps, generator=None, **more):
    """The loop of a pipeline."""
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for k in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, k), k, x, generator=generator, return_dict=False, **more)[0]
    return x


def start(dtype=torch.float64, rows=3):
    return torch.randn(rows, *SHAPE[1:], dtype=dtype, generator=torch.Generator().manual_seed(0))


def by_sample(scheduler, solver, x, steps, seed=None):
    """The same by `sample`, along the grid and process of the scheduler."""
    scheduler.set_timesteps(steps)
    score = sds.NetworkScore(lambda x, t: network(x, t[0] - 1), scheduler.process)
    grid = scheduler.times if solver != sds.EulerMaruyama() else scheduler.times[:-1]  # and Tweedie's formula then
    return sds.sample(score.process, score, x0=x, grid=grid, solver=solver, seed=seed, backend="eager")


@pytest.mark.parametrize(
    "solver",
    [sds.DDIM(), sds.DDIM(0.5), sds.DPMSolverPP(3), sds.UniPC(2), sds.SASolver(2, 1), sds.DEIS(2), sds.Ancestral(),
     sds.SDEDPMSolverPP(), sds.ReverseDiffusion(), sds.EulerMaruyama()],
    ids=repr,
)  # fmt: skip
def test_a_pipelines_loop_is_sample(solver):
    scheduler, x = DiffusersScheduler(Plain(), solver, seed=7), start()
    expected = by_sample(scheduler, solver, x, 12, seed=7)
    torch.testing.assert_close(drive(scheduler, x, 12), expected, rtol=1e-10, atol=1e-10)
    assert repr(scheduler) == f"DiffusersScheduler(Plain, {solver!r}, seed=7)"


def test_ddim_by_hand():
    # x' = alpha' D + sigma' e with D = (x - sigma e) / alpha, from the table itself
    plain, x = Plain(), start()
    expected, levels = x, [*plain.alphas_cumprod[[900, 800, 700, 600, 500, 400, 300, 200, 100, 0]].double(), 1.0]
    for k, (a, b) in zip(range(900, -1, -100), itertools.pairwise(levels), strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b).double()
        e = network(expected, k)
        expected = b.sqrt() * (expected - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    torch.testing.assert_close(drive(DiffusersScheduler(plain, sds.DDIM()), x, 10), expected, rtol=1e-12, atol=1e-12)


def test_noise_belongs_to_rows_and_seeds():
    scheduler, x = DiffusersScheduler(Plain(), sds.Ancestral(), seed=3), start()
    whole = drive(scheduler, x, 5)
    assert torch.equal(drive(scheduler, x[:2], 5), whole[:2])
    unseeded = DiffusersScheduler(Plain(), sds.Ancestral())
    made = [torch.Generator().manual_seed(s) for s in (3, 11, 3)]
    rows = drive(unseeded, x[:1].expand(3, -1, -1, -1), 5, generator=made)
    assert torch.equal(rows[0], whole[0])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(drive(unseeded, x, 5, generator=made[0]), whole)
    assert not torch.equal(drive(unseeded, x, 5), drive(unseeded, x, 5))
    given = DiffusersScheduler(Plain(), sds.Ancestral(), noise=sds.BrownianPath(3, 1))
    assert torch.equal(drive(given, x[1:], 5), whole[1:])


def test_a_run_that_begins_later_and_16_bit_states():
    scheduler, x = DiffusersScheduler(Plain(), sds.DPMSolverPP(2)), start()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    noisy = scheduler.add_noise(x, torch.ones_like(x), scheduler.timesteps[4:5])
    y, times = noisy, scheduler.times[4:]
    for k in scheduler.timesteps[4:]:
        y = scheduler.step(network(y, k), k, y).prev_sample
    score = sds.NetworkScore(lambda x, t: network(x, t[0] - 1), scheduler.process)
    expected = sds.sample(score.process, score, x0=noisy, grid=times, solver=sds.DPMSolverPP(2), backend="eager")
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    a = scheduler.alphas_cumprod[scheduler.timesteps[4]].double()
    torch.testing.assert_close(noisy, a.sqrt() * x + (1 - a).sqrt())
    half = drive(scheduler, start(torch.bfloat16), 10)
    assert half.dtype == torch.bfloat16
    whole = drive(scheduler, start(torch.bfloat16).double(), 10)
    assert float((half.double() - whole).abs().max()) < 0.2 * float(whole.abs().max())


def test_without_diffusers():
    code = """if True:
        import sys; sys.modules["diffusers"] = None
        sys.path[:0] = [PATHS]
        import importlib.util, torch
        spec = importlib.util.spec_from_file_location("held", FILE); held = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(held)
        held.test_ddim_by_hand()
        scheduler = held.DiffusersScheduler(held.Plain(), held.sds.DDIM(), seed=1)
        try:
            held.DiffusersScheduler.from_config({"_class_name": "DDIMScheduler"})
        except ImportError:
            print("refused", type(scheduler).__mro__[1].__module__)"""
    code = code.replace("PATHS", f"{str(ROOT)!r}, {str(ROOT / 'kernels')!r}").replace("FILE", repr(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["refused", "sdesolve.adapters.scheduler"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DiffusersScheduler(3), TypeError, "must be one of diffusers, and this int has no config"),
        (lambda: DiffusersScheduler(types.SimpleNamespace(scheduler=Plain())), TypeError, r"pipe\.scheduler"),
        (lambda: DiffusersScheduler(Plain(), "ddim"), TypeError, "solver must be a sampler such as DPMSolverPP"),
        (lambda: DiffusersScheduler(Plain(), sds.Heun()), TypeError, "solver must be a sampler such as DPMSolverPP"),
        (lambda: DiffusersScheduler(Plain(), sds.EDMHeun()), ValueError, r"once a step, and EDMHeun\(.* needs 2"),
        (lambda: DiffusersScheduler(Plain()), ValueError, r"name one, such as DiffusersScheduler\(scheduler, DPM"),
        (lambda: DiffusersScheduler(Plain(torch.ones(9) - torch.arange(9) % 4 * 0.1), sds.DDIM()), ValueError,
         "alphas_cumprod must decrease"),
        (lambda: DiffusersScheduler(Plain(), sds.DDIM()).step(start(), 0, start()), ValueError, "call set_timesteps"),
        (lambda: drive(DiffusersScheduler(Plain(), sds.Ancestral(), seed=0), start(), 3, eta=0.5), ValueError,
         "eta=0.5 is for DDIM"),
        (lambda: DiffusersScheduler(Plain(), sds.DDIM(), seed=1, noise=sds.BrownianPath(1)), ValueError, "one of them"),
        (lambda: DiffusersScheduler(Plain(invert_sigmas=True), sds.DDIM()), ValueError, "invert_sigmas=True"),
        (lambda: drive(DiffusersScheduler(Plain(), sds.DDIM()), start(), 0), ValueError, "_steps must be at"),
        (lambda: DiffusersScheduler(Plain(), sds.DDIM()).set_timesteps(), ValueError, "give num_inference_steps, or"),
        (lambda: drive(DiffusersScheduler(Beyond(), sds.DDIM()), start(), 3), ValueError,
         "begin at timestep 1001, beyond its table, whose last is 999"),
        (lambda: DiffusersScheduler(types.SimpleNamespace(config={}, timesteps=0, set_timesteps=0), sds.DDIM()),
         TypeError, "has alphas_cumprod, and this SimpleNamespace has none"),
    ],
)  # fmt: skip
def test_what_no_pipeline_can_run_is_refused_before_its_network(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_prediction_types_are_refused_by_name():
    plain = Plain()
    plain.config.prediction_type = "score"
    with pytest.raises(ValueError, match="prediction_type='score' is unknown here; it is one of 'epsilon'"):
        DiffusersScheduler(plain, sds.DDIM())
    plain.config.prediction_type = "flow_prediction"
    with pytest.raises(ValueError, match=r"not for this Plain, whose states are alpha x_0 \+ sigma z"):
        DiffusersScheduler(plain, sds.DDIM())
    pipe = types.SimpleNamespace(scheduler=Plain(), unet=torch.nn.Identity())
    assert DiffusersSchedule(Plain()).score(pipe).net.model is pipe.unet
    pipe.scheduler.config.prediction_type = "v_prediction"
    with pytest.raises(ValueError, match="pipeline's scheduler has prediction_type='v_prediction', and this one 'eps"):
        DiffusersSchedule(Plain()).score(pipe)
    pipe.scheduler = Plain((1 - torch.linspace(1e-4, 0.01, 1000)).cumprod(0))
    with pytest.raises(ValueError, match="another table of alphas_cumprod"):
        DiffusersSchedule(Plain()).score(pipe)


def test_steps_go_in_order():
    scheduler = DiffusersScheduler(Plain(), sds.DPMSolverPP(2))
    scheduler.set_timesteps(4)
    x, (first, second, *_) = start(), scheduler.timesteps
    with pytest.raises(ValueError, match="timestep 3 is none of the 4 that are set"):
        scheduler.step(x, 3, x)
    scheduler.step(x, first, x)
    assert scheduler.step_index == 1
    with pytest.raises(ValueError, match="the next timestep is 500, got 750"):
        scheduler.step(x, first, x)
    with pytest.raises(ValueError, match=r"the shape of its state, \(3, 2, 4, 4\), got \(3, 4, 4, 4\); half of it"):
        scheduler.step(torch.cat([x, x], 1), second, x)
    for k in scheduler.timesteps[1:]:
        scheduler.step(x, k, x)
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(x, 0, x)


def test_zero_terminal_snr():
    table = Plain().alphas_cumprod.clone()
    table[-1] = 0.0

    class Trailing(Plain):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = torch.tensor([999, 499])

    trailing = Trailing(table)
    with pytest.raises(ValueError, match=r"nothing is left of the data, and the network predicts the noise"):
        DiffusersScheduler(trailing, sds.DDIM()).set_timesteps(2)
    trailing.config.prediction_type = "v_prediction"
    with pytest.raises(ValueError, match="take DDIM, DPMSolverPP"):
        DiffusersScheduler(trailing, sds.Ancestral()).set_timesteps(2)
    x, a = start(), table[499].double()
    v, w = network(x, 999), None
    y = -a.sqrt() * v + (1 - a).sqrt() * x  # D = -v and e = x where alpha is 0
    w = a.sqrt() * y - (1 - a).sqrt() * network(y, 499)
    torch.testing.assert_close(drive(DiffusersScheduler(trailing, sds.DDIM()), x, 2), w)


# With diffusers.


@pytest.fixture(scope="module")
def diffusers():
    return importlib.import_module("diffusers")


CASES = {
    "ddim": ("DDIMScheduler", {}),  # which clips, and keeps the noise of what it clips
    "ddim sample": ("DDIMScheduler", {"prediction_type": "sample", "clip_sample_range": 0.5}),
    "ddim linspace": ("DDIMScheduler", {"timestep_spacing": "linspace", "clip_sample": False}),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddim threshold": ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    "ddim offset": ("DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
    "ddim zero snr": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                        "timestep_spacing": "trailing"}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm 3": ("DPMSolverMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    "dpm end": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
    "dpm sample": ("DPMSolverMultistepScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    "dpm karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "thresholding": True}),
    "dpm flow": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction",
                                                 "flow_shift": 3.0}),
    "dpm zero snr": ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                                                     "prediction_type": "v_prediction"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "trailing"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm large": ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
}  # fmt: skip


def drive_with_noise(scheduler, x, steps, learned=None):
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for k in scheduler.timesteps:
        own = torch.Generator().manual_seed(int(k))
        z = torch.randn(x.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(int(k)))
        noise = {"variance_noise": z} if isinstance(scheduler, DiffusersScheduler) else {"generator": own}
        if type(scheduler).__name__.startswith("Flow"):
            noise = {}
        F = network(scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x, k)
        F = F if learned is None else torch.cat([F, learned], 1)
        x = scheduler.step(F, k, x, return_dict=False, **noise)[0]
    return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("case", CASES)
def test_their_samplers_are_ours(diffusers, case, steps):
    name, config = CASES[case]
    theirs, x = getattr(diffusers, name)(**config), start(torch.float32)
    ours = DiffusersScheduler(theirs)
    x1 = drive_with_noise(theirs, x, steps)
    made = drive_with_noise(ours, x, steps)
    assert float((made - x1).abs().max()) < 1e-5 * float(x1.abs().max())
    assert [float(t) for t in ours.timesteps] == [float(t) for t in theirs.timesteps]


@pytest.mark.parametrize("kind", ["learned_range", "learned"])
def test_learned_variances(diffusers, kind):
    theirs, x = diffusers.DDPMScheduler(variance_type=kind, clip_sample=False), start(torch.float32)
    v = torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) * (0.01 if kind == "learned" else 1.0)
    x1, made = drive_with_noise(theirs, x, 10, v), drive_with_noise(DiffusersScheduler(theirs), x, 10, v)
    assert float((made - x1).abs().max()) < 1e-5 * float(x1.abs().max())


def test_pipelines_take_it_and_keep_it(diffusers, tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip

    def images(pipe, **more):
        pipe.set_progress_bar_config(disable=True)
        made = torch.Generator().manual_seed(1)
        return pipe(batch_size=2, generator=made, num_inference_steps=8, output_type="pt", **more).images

    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    expected = images(pipe)
    pipe.scheduler = DiffusersScheduler(pipe.scheduler)
    assert float((images(pipe) - expected).abs().max()) < 1e-5
    assert not torch.equal(images(pipe, eta=1.0), expected)

    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.scheduler = DiffusersScheduler.from_config(
        pipe.scheduler.config, sds.SDEDPMSolverPP(order=1), seed=5, timestep_spacing="trailing"
    )
    expected = images(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["sdesolve.adapters.scheduler", "DiffusersScheduler"]
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DiffusersScheduler)
    assert again.scheduler.solver == sds.SDEDPMSolverPP(order=1)
    assert again.scheduler.config.timestep_spacing == "trailing"
    assert torch.equal(images(again), expected)
    assert isinstance(diffusers.DDIMScheduler.from_config(pipe.scheduler.config), diffusers.DDIMScheduler)
    with pytest.raises(ValueError, match="is of 'PNDM', which is no scheduler of diffusers"):
        DiffusersScheduler.from_config({"_class_name": "PNDM"})
    with pytest.raises(ValueError, match="for the solver 'os', which is none of this library"):
        DiffusersScheduler.from_config(dict(pipe.scheduler.config) | {"solver": "os"})


@pytest.mark.filterwarnings("ignore")
def test_a_schedules_grids_are_those_of_its_class(diffusers):
    for name, config in (("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
                         ("UniPCMultistepScheduler", {}),
                         ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
                         ("EulerDiscreteScheduler", {}), ("HeunDiscreteScheduler", {})):  # fmt: skip
        theirs = getattr(diffusers, name)(**config)
        schedule = DiffusersSchedule(theirs)
        theirs.set_timesteps(10)
        told = theirs.timesteps.double().unique().flip(0)
        grid = schedule.grid(10)
        assert len(grid) == len(told) + 1
        if name != "EulerDiscreteScheduler":  # whose steps between those of the table interpolate another quantity
            torch.testing.assert_close(grid[:-1], told + 1.0, rtol=0, atol=2e-3)
        assert float(grid[-1]) == 0.0
        assert abs(float(schedule.grid(10, "trailing")[0]) - 1000.0) < 1e-4
    with pytest.raises(ValueError, match="spacing='odd' is unknown"):
        schedule.grid(10, "odd")
