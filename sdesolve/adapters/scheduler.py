"""A scheduler for pipelines of diffusers that steps by a sampler of this library, with noise by coordinates."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from sdesolve import solvers
from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve.adapters._levels import changed, is_flow, levels, prediction_of, process_of, setting
from sdesolve.brownian import AbstractNoise, BrownianPath, BrownianRows
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.solve import noise_of
from sdesolve.sde import AbstractSemilinear, per_sample
from sdesolve.solvers.ancestral import Ancestral
from sdesolve.solvers.base import AbstractOneStep
from sdesolve.solvers.ddim import DDIM
from sdesolve.solvers.dpm_solver_pp import DPMSolverPP, SDEDPMSolverPP
from sdesolve.solvers.tabulated import AbstractTabulated, Row, Table

try:
    from diffusers import SchedulerMixin
except ImportError:

    class SchedulerMixin:  # type: ignore[no-redef]
        """Stands for the class by which diffusers knows what to save with a pipeline, where it is not installed."""


_FILE = "scheduler_config.json"
# In this order where two have the same entries.
_KNOWN = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler",
    "DEISMultistepScheduler", "SASolverScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
)  # fmt: skip
_OURS = ("_class_name", "scheduler", "solver", "solver_settings", "seed")


class Stepped(NamedTuple):
    """What `DiffusersScheduler.step` returns.

    Attributes:
        prev_sample: the state at the next level of noise.
        pred_original_sample: the denoised state that the step went by.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Config(dict[str, Any]):
    """A configuration whose entries are attributes too, as those of diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this configuration has no {name!r}") from None


@final
class DiffusersScheduler(SchedulerMixin):
    """A scheduler that a `DiffusionPipeline` takes, with steps by one of our samplers of one evaluation a step.

    Noise levels, timesteps, prediction type, clipping and thresholding are those of the scheduler that it is made from,
    whatever its class and configuration. `DDIM` then is their DDIM and `DPMSolverPP` their DPM-Solver++, to rounding.

    States are ``x_t = alpha x_0 + sigma z`` where theirs of sigma are that over ``alpha``, and what a pipeline returns
    is the same. Coefficients are float64, steps are made in float32 at least, and results have the dtype of the
    network's output.

    Row ``i`` of a batch has the noise of path ``i`` of the seed, whatever else is in the batch: a pipeline gives what
    `sample` gives from its first latents, ``sample(process, score, x0=latents, grid=..., solver=solver, seed=seed)``.
    Without a seed here, the seed is that of the generator which the pipeline was given; of a list of generators each
    row has its own.

    Args:
        scheduler: of diffusers, such as ``pipe.scheduler``; it is copied.
        solver: a sampler of one evaluation a step, such as ``SDEDPMSolverPP()``. By default ours of the same name, for
            schedulers of DDIM, DDPM, DPM-Solver++, Euler, ancestral Euler and flow matching.
        seed: of the noise of steps.
        noise: a `BrownianPath` or `BrownianRows` in its place.
        changes: entries of the scheduler's configuration to change, such as ``timestep_spacing="trailing"``.

    Attributes:
        process: whose states these are: ``VP(TableBeta(alphas_cumprod))``, or `Rectified`.
        solver: as above.
        times: of the process, for the steps that were set, ``(steps + 1,)``, as a grid for `sample`.

    Raises:
        TypeError: no scheduler, one without a table, no solver, or a change of what its configuration does not have.
        ValueError: a prediction type or an option that is not known here; a solver of several evaluations a step; a
            scheduler that no solver here is named as, without ``solver``.

    Example:
        >>> pipe.scheduler = DiffusersScheduler(pipe.scheduler, sds.SDEDPMSolverPP(), seed=0)
        >>> images = pipe(num_inference_steps=20).images

    A `DDIMPipeline` makes a scheduler of its own of whatever it is constructed with; set ``pipe.scheduler`` after that.
    """

    order = 1
    config_name = _FILE
    has_compatibles = False

    def __init__(
        self,
        scheduler: Any,
        solver: AbstractTabulated | None = None,
        *,
        seed: int | None = None,
        noise: AbstractNoise | None = None,
        **changes: Any,
    ) -> None:
        if isinstance(scheduler, DiffusersScheduler):
            scheduler = scheduler._theirs
        if changes and hasattr(scheduler, "from_config"):
            unknown = sorted(set(changes) - _entries(type(scheduler)))
            if unknown:
                raise TypeError(f"{type(scheduler).__name__} has no entry {unknown[0]!r} in its configuration")
            scheduler = changed(type(scheduler), scheduler.config, **changes)
        elif changes:
            raise TypeError(f"this {type(scheduler).__name__} makes no other of itself, so that nothing changes in it")
        missing = [name for name in ("config", "set_timesteps", "timesteps") if not hasattr(scheduler, name)]
        if missing:
            inner = "; give the pipeline's, pipe.scheduler" if hasattr(scheduler, "scheduler") else ""
            raise TypeError(
                f"scheduler must be one of diffusers, and this {type(scheduler).__name__} has no {missing[0]}{inner}"
            )
        self._theirs: Any = copy.deepcopy(scheduler)
        self._check_options()
        self._predicts, self.process = prediction_of(scheduler), process_of(scheduler)
        self.solver = _default(scheduler) if solver is None else solver
        if not isinstance(self.solver, AbstractTabulated):
            raise TypeError(f"solver must be a sampler such as DPMSolverPP(), got {kind_of(solver)}")
        if self.solver.evaluations != 1:
            raise ValueError(
                f"a pipeline evaluates its network once a step, and {short(self.solver)} needs "
                f"{self.solver.evaluations}; take one of one evaluation, such as DPMSolverPP(), or sample(...)"
            )
        self._noise = None if seed is None and noise is None else noise_of(seed, noise)
        self._seed = seed
        self.num_inference_steps: int | None = None
        self.timesteps = scheduler.timesteps
        self.times: Tensor | None = None
        self.init_noise_sigma, self._asked = 1.0, 0
        self._begin: int | None = None
        self._run: _Run | None = None

    # What a configuration is, and where it is kept.

    @property
    def config(self) -> Config:
        """Their configuration, with the solver and the seed; `from_config` takes it, and so do their schedulers."""
        settings = dict(self.solver.settings())
        ours = ("DiffusersScheduler", type(self._theirs).__name__, type(self.solver).__name__, settings, self._seed)
        return Config(dict(self._theirs.config) | dict(zip(_OURS, ours, strict=True)))

    @property
    def _internal_dict(self) -> Config:
        """By this name some pipelines correct old configurations."""
        return self.config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        theirs = {name: value for name, value in config.items() if name not in _OURS}
        self._theirs = changed(type(self._theirs), theirs)
        self._check_options()
        self._predicts, self.process = prediction_of(self._theirs), process_of(self._theirs)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        solver: AbstractTabulated | None = None,
        *,
        seed: int | None = None,
        noise: AbstractNoise | None = None,
        **changes: Any,
    ) -> DiffusersScheduler:
        """A scheduler from a configuration of this class or of one of diffusers, which has to be installed.

        Args:
            config: such as ``pipe.scheduler.config``.
            solver, seed, noise: as for the class; what the configuration says by default.
            changes: entries of the configuration to change, such as ``timestep_spacing="trailing"``.

        Raises:
            ValueError: it names no scheduler of diffusers, or no solver of this library; otherwise as the class.
            ImportError: diffusers is not installed.
        """
        entries = dict(config) | changes
        known = entries.get("_class_name") == "DiffusersScheduler"
        theirs = entries.get("scheduler" if known else "_class_name")
        package = importlib.import_module("diffusers")
        if theirs is None:  # a configuration that was never saved tells its class by its entries alone
            own = {name for name in entries if not name.startswith("_")}
            theirs = next((name for name in _KNOWN if own == _entries(getattr(package, name, None))), None)
        made: Any = getattr(package, str(theirs), None)
        if not (isinstance(theirs, str) and theirs.endswith("Scheduler") and hasattr(made, "from_config")):
            raise ValueError(
                f"this configuration is of {short(theirs)}, which is no scheduler of diffusers; give the "
                "scheduler itself, DiffusersScheduler(pipe.scheduler, solver)"
            )
        if known and solver is None:
            solver = _solver(entries.get("solver"), entries.get("solver_settings"))
        if known and seed is None and noise is None:
            seed = entries.get("seed")
        settings = {name: value for name, value in entries.items() if name not in _OURS}
        return cls(changed(made, settings), solver, seed=seed, noise=noise)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **more: Any) -> None:
        """Writes the configuration to ``scheduler_config.json`` in a folder; a pipeline that is saved calls this.

        Raises:
            ValueError: ``push_to_hub`` or noise of a given path, which a configuration does not hold.
        """
        if push_to_hub:
            raise ValueError("a scheduler is pushed with its pipeline: pipe.push_to_hub(...)")
        if self._noise is not None and self._seed is None:
            raise ValueError("a configuration holds a seed and no noise; make the scheduler with seed=")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(
            json.dumps(self.config, indent=2, sort_keys=True, default=lambda array: array.tolist()) + "\n"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> DiffusersScheduler:
        """A scheduler from a folder that `save_pretrained` or diffusers wrote; otherwise as `from_config`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        file = Path(pretrained_model_name_or_path, subfolder or "", _FILE)
        chosen = {name: options[name] for name in ("solver", "seed", "noise") if name in options}
        return cls.from_config(json.loads(file.read_text()), **chosen)

    # What a pipeline calls.

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None, **options: Any
    ) -> None:
        """Chooses the levels of a run, by the scheduler that this one was made from, and begins anew.

        Args:
            num_inference_steps: steps, each with one evaluation.
            device: of `timesteps`.
            options: what that scheduler takes besides, such as ``timesteps``, ``sigmas`` or ``mu``.

        Raises:
            ValueError: as that scheduler; levels that do not decrease; a solver that cannot go along these.
        """
        chosen = {name: value for name, value in options.items() if value is not None}
        if num_inference_steps is not None:
            chosen["num_inference_steps"] = whole_number(num_inference_steps, "num_inference_steps", 1)
        elif not {"timesteps", "sigmas"} & set(chosen):
            raise ValueError("give num_inference_steps, or what the scheduler takes in its place: timesteps or sigmas")
        run = levels(self._theirs, self.process, device=device, **chosen)
        self.timesteps, self.times, self.init_noise_sigma, self._asked = run
        if self._predicts == "noise" and float(self.process.alpha(self.times[0])) == 0.0:
            raise ValueError(
                "these levels start where nothing is left of the data, and the network predicts the noise, which says "
                "nothing of the data there; take timestep_spacing='leading', or a model of v_prediction"
            )
        self.num_inference_steps, self._begin = len(self.timesteps), None
        self._run = None
        self._begun(0)  # a solver that does not fit is told of before a network is called

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at this of the `timesteps`, as image-to-image does."""
        self._begin = begin_index
        self._run = None

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` said."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """Which of the `timesteps` is next; ``None`` before the first step."""
        return None if self._run is None or self._run.k == 0 else self._run.first + self._run.k

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state itself: networks see ``x_t = alpha x_0 + sigma z``."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Stepped | tuple[Tensor, Tensor]:
        """The state at the next level, from the network's output at ``timestep`` and the state there.

        Args:
            model_output: ``(batch, *state)``, or of twice the channels where variances are learned.
            timestep: of `timesteps`, in their order.
            sample: ``(batch, *state)``.
            eta: for `DDIM` that was made without: the standard deviation of its noise. 0 is what pipelines give by
                themselves, and leaves the solver as it was made.
            use_clipped_model_output: for `DDIM`, whether its noise prediction is that of the clipped denoised state.
            generator: whose seed the noise of the run has, if this scheduler was made without one.
            variance_noise: standard normals for this step, in place of those of the run.
            return_dict: a `Stepped`, or both tensors of it.

        Raises:
            ValueError: before `set_timesteps`; a timestep that is not the next one; an output of another shape; an
                ``eta`` for another solver.
        """
        if self.num_inference_steps is None:
            raise ValueError("no steps are set: call set_timesteps(n) first")
        run = self._run
        if run is None or (run.k == 0 and self._begin is None):
            first = self._index(timestep) if self._begin is None else self._begin
            run = run if run is not None and run.first == first else self._begun(first)
        self._check_step(run, timestep, model_output, sample)
        if eta and not (isinstance(self.solver, DDIM) and self.solver.eta in (0.0, eta)):
            raise ValueError(f"eta={eta:g} is for DDIM, and this scheduler steps by {short(self.solver)}; leave it 0")
        if eta and run.solver != DDIM(eta):
            done, path = run.k, run.path
            run = self._begun(run.first, DDIM(eta))
            run.k, run.path = done, path
        wide = torch.promote_types(sample.dtype, torch.float32)
        x, F = sample.to(wide), model_output.to(wide)
        F, spread = F.split(x.shape[1], 1) if F.shape != x.shape else (F, None)
        D = run.denoised(F, x)
        used = self._restricted(D)
        draws = run.normals(self, x, generator, variance_noise)
        if used is not D and isinstance(self.solver, DDIM) and not use_clipped_model_output:
            after = run.apart(used, run.noise(F, x), draws)
        else:
            after = run.step(used, x, draws, None if spread is None else self._learned(run, spread))
        run.k += 1
        made = Stepped(after.to(model_output.dtype), used.to(model_output.dtype))
        return made if return_dict else (made.prev_sample, made.pred_original_sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x_0 + sigma z`` at ``timesteps``, ``(batch,)`` or ``(1,)``: of the run, or else of the table."""
        t = self._times_of(timesteps).to(original_samples.device)
        alpha, sigma = (c.to(noise.dtype) for c in (self.process.alpha(t), self.process.sigma(t)))
        return per_sample(alpha, noise) * original_samples + per_sample(sigma, noise) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """As `add_noise`, by the name that pipelines of flow matching call."""
        return self.add_noise(sample, noise, timestep)

    def __repr__(self) -> str:
        seed = "" if self._seed is None else f", seed={self._seed}"
        return f"DiffusersScheduler({type(self._theirs).__name__}, {self.solver!r}{seed})"

    def __len__(self) -> int:
        return int(setting(self._theirs, "num_train_timesteps", 1000))

    @property
    def alphas_cumprod(self) -> Tensor:
        """Their table."""
        return self._theirs.alphas_cumprod

    @property
    def sigmas(self) -> Tensor:
        """``sigma / alpha`` at the levels of the run, or ``sigma`` of flow matching; ``(steps + 1,)``, float32."""
        times = self.times
        if times is None:
            return self._theirs.sigmas
        sigma = self.process.sigma(times)
        return (sigma if is_flow(self._theirs) else sigma / self.process.alpha(times)).float()

    @property
    def clips(self) -> bool:
        """Whether denoised states are clipped or thresholded."""
        return any(setting(self._theirs, name, False) for name in ("thresholding", "clip_sample"))

    # Within.

    def _check_options(self) -> None:
        """Refuses what a configuration says and is not done here."""
        for name in ("invert_sigmas", "stochastic_sampling"):
            if setting(self._theirs, name, False):
                raise ValueError(f"{name}=True of this {type(self._theirs).__name__} is not known here; leave it out")

    def _index(self, timestep: int | float | Tensor) -> int:
        found = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if not len(found):
            raise ValueError(
                f"timestep {float(timestep):g} is none of the {len(self.timesteps)} that are set; take those of "
                "scheduler.timesteps"
            )
        return int(found[0])

    def _times_of(self, timesteps: Tensor) -> Tensor:
        k = torch.as_tensor(timesteps).reshape(-1)
        if self.times is not None:
            at = (self.timesteps[:, None].cpu() == k[None].cpu()).int()
            if bool(at.any(0).all()):
                return self.times[at.argmax(0)]
        k = k.double().cpu()
        return k / len(self) if is_flow(self._theirs) else k + 1.0

    def _begun(self, first: int, solver: AbstractTabulated | None = None) -> _Run:
        assert self.times is not None
        if not 0 <= first < len(self.timesteps):
            raise ValueError(f"there are {len(self.timesteps)} timesteps, and none is number {first}")
        solver, times = solver or self.solver, self.times[first:]
        table, denoised = _table(self._theirs, self.process, solver, times, self._asked)
        self._run = _Run(self, solver, first, times, table, denoised)
        return self._run

    def _check_step(self, run: _Run, timestep: Any, F: Tensor, x: Tensor) -> None:
        if run.first + run.k >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done; set_timesteps(n) begins anew")
        host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if host and float(torch.as_tensor(timestep).reshape(-1)[0]) != run.told[run.k]:
            raise ValueError(
                f"the next timestep is {run.told[run.k]:g}, got {float(torch.as_tensor(timestep).reshape(-1)[0]):g}; "
                "steps go in the order of scheduler.timesteps, and set_timesteps(n) begins anew"
            )
        learns = setting(self._theirs, "variance_type") in ("learned", "learned_range")
        doubled = F.ndim > 1 and F.shape == (len(x), 2 * x.shape[1], *x.shape[2:])
        if F.shape != x.shape and not (learns and doubled):
            hint = "; half of it is a variance where the scheduler has variance_type='learned_range'" if doubled else ""
            raise ValueError(
                f"the network must return the shape of its state, {tuple(x.shape)}, got {tuple(F.shape)}{hint}"
            )

    def _restricted(self, D: Tensor) -> Tensor:
        """The denoised state, clipped or thresholded (Saharia et al. 2022, section 2.3) as their configuration says."""
        scheduler = self._theirs
        if setting(scheduler, "thresholding", False):
            most = setting(scheduler, "sample_max_value", 1.0)
            ratio = setting(scheduler, "dynamic_thresholding_ratio", 0.995)
            s = torch.quantile(D.abs().flatten(1), ratio, dim=1).clamp(1.0, max(1.0, most))
            s = per_sample(s, D)
            return torch.maximum(torch.minimum(D, s), -s) / s
        if setting(scheduler, "clip_sample", False):
            bound = setting(scheduler, "clip_sample_range", 1.0)
            return D.clamp(-bound, bound)
        return D

    def _learned(self, run: _Run, v: Tensor) -> Tensor | None:
        """The standard deviation that a network learned for `Ancestral` (Nichol and Dhariwal 2021, eq. 15)."""
        if not isinstance(self.solver, Ancestral) or not run.noisy[run.k]:
            return None
        if setting(self._theirs, "variance_type") == "learned":
            return v.sqrt()
        small, large = run.variances[run.k]
        return (0.25 * ((v + 1.0) * large + (1.0 - v) * small)).exp()


class _Run:
    """Steps from one level on: their numbers, and what is carried from step to step."""

    def __init__(
        self,
        scheduler: DiffusersScheduler,
        solver: AbstractTabulated,
        first: int,
        times: Tensor,
        table: Table,
        denoised: bool,
    ) -> None:
        self.solver, self.first, self.k = solver, first, 0
        process = scheduler.process
        self.told: list[float] = scheduler.timesteps[first:].tolist()
        self._rows: list[list[list[float]]] = [row.tolist() for row in table.rows]
        self._table, self._denoised = table, denoised
        alpha, sigma = process.alpha(times), process.sigma(times)
        self._clips = isinstance(solver, DDIM) and scheduler.clips
        pair = _in_float32(alpha) if self._clips else (alpha, sigma)
        self._exact = alpha.tolist(), sigma.tolist()
        self._alpha, self._sigma = pair[0].tolist(), pair[1].tolist()
        self._predicts = scheduler._predicts
        self._memory: tuple[Tensor, ...] | None = None
        self.path: AbstractNoise | None = None
        self.noisy = (sigma[1:] > 0).tolist()
        ratio = (alpha[:-1] / alpha[1:]).square()
        large = 1.0 - ratio
        small = (sigma[1:] / sigma[:-1]).square() * large
        self.variances = torch.stack([small, large], 1).clamp(min=1e-20).log().tolist()

    def denoised(self, F: Tensor, x: Tensor) -> Tensor:
        """``E[x_0 | x_t]`` from the network's output (`NetworkScore`)."""
        alpha, sigma = self._alpha[self.k], self._sigma[self.k]
        if self._predicts == "data":
            return F
        if self._predicts == "noise":
            return (x - sigma * F).div_(alpha)
        if self._predicts == "flow":
            return torch.sub(x, F, alpha=sigma)
        scale = alpha * alpha + sigma * sigma
        return torch.mul(x, alpha / scale).sub_(F, alpha=sigma / scale)

    def noise(self, F: Tensor, x: Tensor) -> Tensor:
        """``E[z | x_t]`` from the network's output."""
        alpha, sigma = self._alpha[self.k], self._sigma[self.k]
        if self._predicts == "noise":
            return F
        if self._predicts == "data":
            return torch.sub(x, F, alpha=alpha).div_(sigma)
        if self._predicts == "flow":
            return torch.add(x, F, alpha=alpha)
        scale = alpha * alpha + sigma * sigma
        return torch.mul(x, sigma / scale).add_(F, alpha=alpha / scale)

    def apart(self, D: Tensor, e: Tensor, normals: list[Tensor] | None) -> Tensor:
        """`DDIM` by a denoised state and a noise that do not belong together, as of a clipped ``D``: their default.

        Iterated, this multiplies errors: 30 steps make 1e-3 of roundings. So each is made as theirs.
        """
        a, b, c = self._rows[0][self.k]
        to_data, to_noise = b + a * self._exact[0][self.k], a * self._exact[1][self.k]
        if c == 0.0 or not normals:
            to_data, to_noise = (float(v) for v in _in_float32(torch.tensor(to_data, dtype=torch.float64)))
            return to_data * D + to_noise * e
        return to_data * D + to_noise * e + c * normals[0]

    def normals(
        self, scheduler: DiffusersScheduler, x: Tensor, generator: Any, given: Tensor | None
    ) -> list[Tensor] | None:
        """Standard normals for the step, of which there is at most one draw."""
        if not self._table.draws:
            return None
        if given is not None:
            return [given.to(x)]
        if self.path is None:
            path = scheduler._noise if scheduler._noise is not None else _seeded(generator)
            if isinstance(path, BrownianRows):
                path.check_rows(len(x))
            self.path = path.in_draws(self._table.draws)
        unit = torch.arange(self._table.draws + 1, dtype=torch.float64, device="cpu")
        step = self.k * self._table.draws
        z = self.path.increments(unit, tuple(x.shape), step=step, dtype=x.dtype, device=x.device)
        return list(z)

    def step(self, D: Tensor, x: Tensor, normals: list[Tensor] | None, spread: Tensor | None) -> Tensor:
        """The state at the next level."""
        alpha, sigma = self._alpha[self.k], self._sigma[self.k]
        field = D if self._denoised else torch.mul(D, alpha / sigma**2).sub_(x, alpha=1.0 / sigma**2)
        if self._memory is None:
            self._memory = (torch.zeros_like(x),) * self.solver.memory
        drawn, rows = iter(normals or ()), []
        for numbers, noisy in zip(self._rows, self._table.noisy, strict=True):
            rows.append(_row(numbers[self.k], next(drawn) if noisy else None, spread))
        x, self._memory = self.solver.advance(lambda y, i=0: field, rows, x, self._memory)
        return x


def _in_float32(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha`` and ``sigma`` as their schedulers compute them from a table in float32."""
    square = alpha.square().float()
    return square.sqrt(), (1.0 - square).sqrt()


def _row(numbers: list[float], z: Tensor | None, spread: Tensor | None) -> Row:
    a, *b, c = numbers

    def combine(x: Tensor, *terms: Tensor) -> Tensor:
        total = x * a
        for b_i, term in zip(b, terms, strict=True):
            if b_i != 0.0:
                total.add_(term, alpha=b_i)
        if z is not None and c != 0.0:
            total.add_(z, alpha=c) if spread is None else total.addcmul_(spread, z)
        return total

    return combine


def _table(
    scheduler: Any, process: AbstractDiffusion, solver: AbstractTabulated, times: Tensor, asked: int
) -> tuple[Table, bool]:
    """The numbers of a solver along ``times``, and whether they are for the denoised state."""
    stochasticity = solver.sampling_stochasticity

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the pipeline calls the network")

    flow = process.probability_flow(nothing)
    sde: AbstractSemilinear = flow if stochasticity == 0 else process.reverse(nothing, stochasticity)

    def made(solver: AbstractTabulated, times: Tensor) -> tuple[Table, bool]:
        table = solver.denoised_table(sde, times)
        if table is not None:
            return table, True
        if float(process.alpha(times[0])) < 1e-6:
            raise ValueError(
                f"{short(solver)} steps in the score, and these levels start where nothing is left of the data; take "
                "DDIM, DPMSolverPP, SDEDPMSolverPP, UniPC or SASolver"
            )
        table = solver.table(sde, times)
        assert table is not None
        return table, False

    table, denoised = made(solver, times)
    rows = [row.clone() for row in table.rows]
    n = len(times) - 1
    if isinstance(solver, AbstractOneStep) and float(process.sigma(times[-1])) == 0.0:
        alpha, sigma = float(process.alpha(times[-2])), float(process.sigma(times[-2]))
        rows[0][-1] = torch.tensor(
            [1.0 / alpha, sigma**2 / alpha, 0.0], dtype=torch.float64
        )  # its own last step would not be exact
    if isinstance(solver, DPMSolverPP | SDEDPMSolverPP):
        # Their last steps have lower order in short runs, whatever the noise at the end.
        short_run = bool(setting(scheduler, "lower_order_final", False)) and n < 15
        at_end = short_run or bool(setting(scheduler, "euler_at_final", False))
        for back, wanted in ((1, at_end), (2, short_run)):
            if wanted and back < solver.order and n >= back:
                lower, _ = made(type(solver)(back), times)
                some = lower.rows[1][n - back]
                rows[1][n - back] = 0.0
                rows[1][n - back, : len(some) - 1] = some[:-1]
                rows[1][n - back, -1] = some[-1]
    if isinstance(solver, DDIM) and type(scheduler).__name__ in ("DDIMScheduler", "DDIMParallelScheduler"):
        # Their DDIM steps by a whole number of timesteps, wherever the next step starts.
        ends = times[:-1] - len(scheduler.alphas_cumprod) // asked
        ends = torch.where(ends < 1.0, times[-1], ends)
        for k in (ends != times[1:]).nonzero()[:, 0].tolist():
            rows[0][k] = made(solver, torch.stack([times[k], ends[k]]))[0].rows[0][0]
    return Table(table.times, tuple(rows), table.noisy, table.skipped), denoised


def _seeded(generator: torch.Generator | list[torch.Generator] | None) -> AbstractNoise:
    if generator is None:
        return noise_of(None, None)
    if isinstance(generator, torch.Generator):
        return BrownianPath(generator.initial_seed() % 2**64)
    return BrownianRows([own.initial_seed() % 2**64 for own in generator])


def _default(scheduler: Any) -> AbstractTabulated:
    """Our solver of a scheduler's name."""
    name = type(scheduler).__name__
    kind = setting(scheduler, "algorithm_type", "dpmsolver++")
    order = setting(scheduler, "solver_order", 2)
    if name == "DPMSolverMultistepScheduler" and setting(scheduler, "solver_type", "midpoint") == "midpoint":
        if kind == "dpmsolver++":
            return DPMSolverPP(order)
        if kind == "sde-dpmsolver++" and order < 3:
            return SDEDPMSolverPP(order)
    if name == "DDPMScheduler":
        variance = setting(scheduler, "variance_type", "fixed_small")
        return Ancestral("forward" if variance.startswith("fixed_large") else "posterior")
    if name == "EulerAncestralDiscreteScheduler":
        return Ancestral()
    if name in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        return DDIM()
    raise ValueError(
        f"no solver here is that of a {name} with these settings; name one, such as "
        f"DiffusersScheduler(scheduler, DPMSolverPP())"
    )


def _entries(scheduler: Any) -> set[str]:
    return set(inspect.signature(scheduler.__init__).parameters) - {"self"} if scheduler is not None else set()


def _solver(name: Any, settings: Any) -> AbstractTabulated:
    kind = getattr(solvers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, AbstractTabulated)) or not isinstance(settings, dict):
        raise ValueError(f"this configuration is for the solver {short(name)}, which is none of this library")
    return kind(**settings)
