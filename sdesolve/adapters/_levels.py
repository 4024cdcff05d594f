"""Noise levels and timesteps of another package's scheduler, asked of the scheduler itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.diffusions.rectified import Rectified
from sdesolve.diffusions.table import TableBeta
from sdesolve.diffusions.vp import VP
from sdesolve.scores.network import Prediction

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "noise", "sample": "data", "v_prediction": "velocity", "flow_prediction": "flow",
}  # fmt: skip


class Levels(NamedTuple):
    """A run of a scheduler.

    Attributes:
        timesteps: what networks are called with, ``(steps,)``, in the scheduler's own dtype and on its device.
        times: of the process, ``(steps + 1,)``, float64 on the host, decreasing.
        start: scale of the noise that it starts from, for ``x_t = alpha x_0 + sigma z``.
        asked: how many steps it thinks to take.
    """

    timesteps: Tensor
    times: Tensor
    start: float
    asked: int


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """An entry of a scheduler's configuration, which may be an object or a mapping."""
    config = scheduler.config
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


def changed(kind: Any, config: Any, **changes: Any) -> Any:
    """A scheduler of a class, from a configuration with some of its entries changed."""
    # What begins with an underscore is about how the configuration was made, such as which entries were left out.
    return kind.from_config({k: v for k, v in dict(config).items() if not k.startswith("_")} | changes)


def is_flow(scheduler: Any) -> bool:
    """Whether states are ``(1 - s) x_0 + s z``: a scheduler of flow matching, or one told to use its levels."""
    if setting(scheduler, "use_flow_sigmas", False):
        return True
    shifts = hasattr(scheduler, "scale_noise") or setting(scheduler, "shift") is not None
    return shifts and not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)


def prediction_of(scheduler: Any) -> Prediction:
    """What networks of a scheduler predict.

    Raises:
        ValueError: a prediction type that is unknown here, or another than its states have.
    """
    told, flow = setting(scheduler, "prediction_type"), is_flow(scheduler)
    told = ("flow_prediction" if flow else "epsilon") if told is None else told
    if told not in PREDICTIONS:
        known = ", ".join(repr(name) for name in PREDICTIONS)
        raise ValueError(f"prediction_type={told!r} is unknown here; it is one of {known}")
    if (PREDICTIONS[told] == "flow") != flow:
        states = "(1 - s) x_0 + s z, of use_flow_sigmas=True" if flow else "alpha x_0 + sigma z, by alphas_cumprod"
        raise ValueError(
            f"prediction_type={told!r} is not for this {type(scheduler).__name__}, whose states are {states}: make it "
            f"with {'the prediction_type of a flow' if flow else 'use_flow_sigmas=True, or its own prediction_type'}"
        )
    return PREDICTIONS[told]


def process_of(scheduler: Any) -> AbstractDiffusion:
    """The process whose states a scheduler steps through.

    Raises:
        TypeError: it says neither by a table of ``alphas_cumprod`` nor as one of flow matching.
        ValueError: the table does not decrease.
    """
    name = type(scheduler).__name__
    if is_flow(scheduler):
        if not isinstance(getattr(scheduler, "sigmas", None), Tensor):
            raise TypeError(f"a scheduler has alphas_cumprod, or sigmas if it is one of flow matching; {name} has none")
        return Rectified(t_max=1.0)
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise TypeError(
            f"a scheduler has alphas_cumprod, and this {name} has none; networks of EDM go into NetworkScore(net, "
            "EDM(), 'edm') and sample(...)"
        )
    table = table.detach().cpu()
    if setting(scheduler, "rescale_betas_zero_snr", False) and float(table[-1]) >= float(table[-2]):
        table = torch.cat([table[:-1], table.new_zeros(1)])  # some put 2^-24 in the place of 0, above the last but one
    return VP(TableBeta(table))


def levels(scheduler: Any, process: AbstractDiffusion, *args: Any, **options: Any) -> Levels:
    """What a copy of ``scheduler`` does after ``set_timesteps(*args, **options)``.

    Levels that repeat, for samplers of several evaluations a step, are taken once.

    Raises:
        ValueError: levels that do not decrease, or not one timestep for each.
    """
    own = copy.deepcopy(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of theirs, about themselves and NumPy
        own.set_timesteps(*args, **options)
    k, sigmas = own.timesteps, getattr(own, "sigmas", None)
    start = torch.as_tensor(getattr(own, "init_noise_sigma", 1.0)).double()
    if isinstance(process, VP) and isinstance(process.schedule, TableBeta):
        schedule = process.schedule
        if isinstance(sigmas, Tensor) and len(sigmas) == len(k) + 1:
            times = schedule.time_at_integral(torch.log1p(sigmas.detach().cpu().double().square()))
        else:
            final = float(torch.as_tensor(getattr(own, "final_alpha_cumprod", 1.0)))
            end = 0.0 if final == 1.0 else float(schedule.time_at_integral(-torch.tensor(final).double().log()))
            times = torch.cat([k.detach().cpu().double() + 1.0, torch.tensor([end], dtype=torch.float64)])
        one = torch.ones(1, dtype=torch.float32)
        rescaled = float(own.scale_model_input(one, k[0])) != 1.0 if hasattr(own, "scale_model_input") else False
        if rescaled:  # their state is x_t / alpha
            start = start * float(process.alpha(times[0]))
    else:
        if not isinstance(sigmas, Tensor) or len(sigmas) != len(k) + 1:
            raise ValueError(f"{type(own).__name__} does not have one level of noise more than timesteps")
        times = sigmas.detach().cpu().double()
    if float(times[0]) > process.t_max * (1 + 1e-6):
        raise ValueError(
            f"the levels of {type(own).__name__} begin at timestep {float(times[0]) - 1:g}, beyond its table, whose "
            f"last is {process.t_max - 1:g}: take fewer steps, or a smaller steps_offset"
        )
    times = times.clamp(max=process.t_max)
    moves = times.diff() != 0
    k, times = k[moves.to(k.device)], torch.cat([times[:-1][moves], times[-1:]])
    if not len(k) or not bool((times.diff() < 0).all()):
        raise ValueError(
            f"the levels of {type(own).__name__} do not decrease from noise to data, as here: {times[:8].tolist()}"
        )
    return Levels(k, times, float(start), int(getattr(own, "num_inference_steps", None) or len(k)))
