"""Networks and schedulers of diffusers. The package is not imported: what comes from it is known by its calls."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import whole_number
from sdesolve.adapters._levels import changed, levels, prediction_of, process_of, setting
from sdesolve.grids import timesteps
from sdesolve.nn.labels import LabelledNetwork, Takes
from sdesolve.scores.network import NetworkScore


@final
class DiffusersNet(LabelledNetwork):
    """A denoising model of diffusers, or a module called alike, as ``net(x, t, label, **conditions)``.

    A `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, or another whose first inputs are the state
    (``sample`` or ``hidden_states``) and ``timestep``, and whose output has a tensor called ``sample``. Class labels go
    to ``class_labels``; what else it takes goes by its own names: ``score.given(encoder_hidden_states=texts)``.

    The step count ``k`` that it is called with is ``steps t - 1``: step ``k`` of a DDPM chain of ``steps`` steps has
    the noise level of `VP` at ``t = (k + 1) / steps``, up to the order of one step (Song et al. 2021, appendix B).

    A model of flow matching goes into ``NetworkScore(DiffusersNet(model, timestep=lambda t: 1000 * t), Rectified(),
    "flow")``. One that counts time from noise to data and predicts ``x_0 - z``, as SiT (Ma et al. 2024), needs
    ``towards_data=True`` as well, and is called at ``timestep(1 - t)``.

    Args:
        model: as above; states are ``(batch, channels, height, width)``.
        steps: of the chain that the model was or will be trained on.
        classes: number of classes, 0 for none. The model needs an embedding more, ``num_class_embeds=classes + 1``,
            whose last entry is the null class; a DiT has it.
        timestep: ``t`` to ``k`` by another rule, on tensors.
        learned_variance: the model has twice the channels, of which the second half is a variance (Nichol and Dhariwal
            2021); the first half is the output here.
        towards_data: time and velocity of the model run from noise to data.

    Attributes:
        takes: names of what the model takes besides state and time.
        wide_time: times are given in float32 where states have 16 bits, for ``k`` has up to four digits.

    A model whose scheduler is at hand goes by that scheduler's own table: `DiffusersSchedule`.

    Raises:
        TypeError: ``model`` is not a module, or a count is not an integer.
        ValueError: a count out of range, or more classes than the model has embeddings for.
    """

    wide_time = True

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 1000,
        classes: int = 0,
        timestep: Callable[[Tensor], Tensor] | None = None,
        learned_variance: bool = False,
        towards_data: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, such as a UNet2DModel; got {type(model).__name__}")
        self.model, self.steps = model, whole_number(steps, "steps", 1)
        self.classes = whole_number(classes, "classes", 0)
        self._inputs, self.takes = _inputs_of(model)
        embedding, most = getattr(model, "class_embedding", None), None
        if isinstance(embedding, nn.Embedding):
            most = embedding.num_embeddings
        elif isinstance(of_dit := getattr(getattr(model, "config", None), "num_embeds_ada_norm", None), int):
            most = of_dit + 1
        if classes and most is not None and most <= classes:
            raise ValueError(
                f"classes={classes} and the null class need {classes + 1} embeddings, and this model has "
                f"{most}: make it with num_class_embeds={classes + 1}"
            )
        self._timestep, self._learned_variance = timestep, bool(learned_variance)
        self._towards_data = bool(towards_data)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """The model's ``sample``, shape of ``x: (batch, channels, height, width)``.

        Raises:
            TypeError: the model returns something without a tensor called ``sample``, or lacks an input.
            ValueError: a label for a network without classes.
        """
        missing = [name for name in self.takes.needed if name not in conditions and name != "label"]
        if missing:
            raise TypeError(f"a {type(self.model).__name__} needs {missing[0]}: give score.given({missing[0]}=...)")
        t = 1.0 - t if self._towards_data else t
        k = (self.steps * t - 1 if self._timestep is None else self._timestep(t)).expand(len(x))
        if self.classes:
            null = torch.full((len(x),), self.classes, dtype=torch.int64, device=x.device)
            conditions["class_labels"] = null if label is None else label
        elif label is not None:
            raise ValueError("this network was wrapped without classes and takes no label; give DiffusersNet classes=n")
        if self._inputs is None:
            output = self.model(x, k, **conditions)
        else:
            output = self.model(**dict(zip(self._inputs, (x, k), strict=True)), **conditions)
        sample = getattr(output, "sample", None)
        if not isinstance(sample, Tensor):
            raise TypeError(
                f"the model must return an object with a tensor called sample, got {type(output).__name__}; a module "
                "that returns a tensor needs no adapter: NetworkScore(net, process)"
            )
        if self._learned_variance:
            if sample.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"learned_variance is for a model of {2 * x.shape[1]} channels on states of {x.shape[1]}; this one "
                    f"returns {sample.shape[1]}"
                )
            sample = sample[:, : x.shape[1]]
        return -sample if self._towards_data else sample


def _inputs_of(model: nn.Module) -> tuple[tuple[str, str] | None, Takes]:
    """By which names a model takes state and time, where they are not its first inputs; and what it takes besides."""
    own = inspect.signature(model.forward).parameters
    state = next((name for name in ("sample", "hidden_states") if name in own), None)
    inputs = (state, "timestep") if state is not None and "timestep" in own else None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    used = {*(inputs or list(own)[:2]), "return_dict"}
    inputs = None if inputs == tuple(own)[:2] else inputs
    more = [p for name, p in own.items() if p.kind in kinds and name not in used]
    names = (p.name for p in more if p.name != "class_labels")
    return inputs, Takes(("label", *names), tuple(p.name for p in more if p.default is p.empty))


@final
class DiffusersSchedule:
    """Process, grids and scores from a scheduler of diffusers, by its own table of ``alphas_cumprod``.

    `DDIM` on these is their DDIM to rounding; the continuous `VP` of the same rates is off by the order of one step.
    Time counts steps: ``t = k + 1`` for their timestep ``k``, and 0 for clean data.

    Args:
        scheduler: an object with ``alphas_cumprod`` and ``config``, such as a ``DDIMScheduler``.

    Attributes:
        process: ``VP(TableBeta(scheduler.alphas_cumprod))``.
        predicts: what the scheduler's networks predict.

    Raises:
        TypeError: it has no table, as schedulers of flow matching.
        ValueError: a prediction type that is unknown here, or a table that does not decrease.

    Example:
        >>> schedule = DiffusersSchedule(DDIMScheduler(clip_sample=False))
        >>> score = schedule.score(unet)
        >>> x = sample(schedule.process, score, (16, 3, 32, 32), grid=schedule.grid(50), solver=DDIM(), seed=0)
    """

    def __init__(self, scheduler: Any) -> None:
        table, config = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "config", None)
        if not isinstance(table, Tensor) or config is None:
            inner = "; give the pipeline's, pipe.scheduler" if hasattr(scheduler, "scheduler") else ""
            raise TypeError(
                f"a scheduler has alphas_cumprod and config, and this {type(scheduler).__name__} lacks them{inner}. "
                "One of flow matching has no table: its networks go into NetworkScore(net, Rectified(), 'flow')"
            )
        self.predicts, self.process = prediction_of(scheduler), process_of(scheduler)
        self._scheduler = scheduler
        changes = [name for name in ("clip_sample", "thresholding") if setting(scheduler, name, False)]
        if changes:
            warnings.warn(
                f"{' and '.join(changes)} of this scheduler changes its denoised states, and is not done here; make it "
                f"with {'=False, '.join(changes)}=False to compare",
                stacklevel=2,
            )

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """The levels of the scheduler for a number of steps, as times, and where the last ends, float64.

        They are asked of a copy of the scheduler, so that every class and option has its own: spacings, offsets, Karras
        levels, ends. Each step ends where the next one starts; their DDIM with ``"linspace"``, or with ``"trailing"``
        where ``steps`` does not divide its table, ends elsewhere, which `DiffusersScheduler` does too.

        Args:
            steps: evaluations.
            spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; the scheduler's own by default.

        Raises:
            ValueError: more steps than the table has, or an unknown spacing.
        """
        scheduler = self._scheduler
        steps = whole_number(steps, "steps", 1)
        own = setting(scheduler, "timestep_spacing", "leading")
        again = spacing not in (None, own)
        if hasattr(scheduler, "set_timesteps") and (not again or hasattr(scheduler, "from_config")):
            if spacing not in (None, *SPACINGS):
                raise ValueError(f"spacing={spacing!r} is unknown; choose one of {', '.join(map(repr, SPACINGS))}")
            if again:
                scheduler = changed(type(scheduler), scheduler.config, timestep_spacing=spacing)
            return levels(scheduler, self.process, steps).times
        offset, to_zero = setting(scheduler, "steps_offset", 0), setting(scheduler, "set_alpha_to_one", True)
        return timesteps(int(self.process.t_max), steps, spacing or own, offset=offset, to_zero=to_zero)

    def score(self, model: nn.Module, *, classes: int = 0, learned_variance: bool = False) -> NetworkScore:
        """The score of a model that was trained with this scheduler; arguments as for `DiffusersNet`.

        Of a pipeline its model is taken, ``unet`` or ``transformer``, and the pipeline's scheduler has to predict what
        this one does.

        Raises:
            ValueError: it predicts something else, or by another table.
        """
        theirs = getattr(model, "scheduler", None)
        if theirs is not None and not isinstance(model, nn.Module):
            self._check_same(theirs)
            model = getattr(model, "unet", None) or getattr(model, "transformer", model)
        net = DiffusersNet(
            model,
            steps=int(self.process.t_max),
            classes=classes,
            timestep=_from_zero,
            learned_variance=learned_variance,
        )
        return NetworkScore(net, self.process, self.predicts)

    def _check_same(self, theirs: Any) -> None:
        """Refuses a pipeline that samples by something else than this scheduler."""
        told, own = (setting(s, "prediction_type", "epsilon") for s in (theirs, self._scheduler))
        if told != own:
            raise ValueError(
                f"the pipeline's scheduler has prediction_type={told!r}, and this one {own!r}: give "
                "DiffusersSchedule(pipe.scheduler)"
            )
        table, ours = getattr(theirs, "alphas_cumprod", None), self._scheduler.alphas_cumprod
        if not isinstance(table, Tensor) or table.shape != ours.shape or not torch.allclose(table, ours, rtol=1e-3):
            raise ValueError(
                "the pipeline's scheduler has another table of alphas_cumprod: give DiffusersSchedule(pipe.scheduler)"
            )


SPACINGS = ("leading", "trailing", "linspace")


def _from_zero(t: Tensor) -> Tensor:
    return t - 1
