"""Scores of data with a class: classifier guidance and classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from sdesolve_kernels import Stream, perturb, uniform
from torch import Tensor, nn

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.nn.labels import check_labels, labels_for
from sdesolve.reverse import Score
from sdesolve.scores.base import check_process
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import per_sample

Scale = float | Tensor | Callable[[Tensor], Tensor | float]


@final
class ClassifierGuidance:
    """``score(x, t) + scale grad_x log p(label | x_t = x)`` from a classifier of noised states.

    With the exact noised classifier and ``scale = 1`` this is the score of the class (Bayes). With another scale it is,
    at every ``t``, the score of ``p_t(x) p_t(label | x)^scale``; those laws are not the noised versions of the one at
    ``t = 0``, so that what is sampled is sharper than that one but not equal to it. Dhariwal and Nichol 2021,
    algorithm 1. Not differentiable itself.

    Args:
        score: ``grad_x log p_t(x)``.
        classifier: a function or module ``(x, t) -> logits (batch, classes)``, trained on noised states
            (`noised_cross_entropy`); ``t`` is ``(batch,)`` in the dtype of ``x``.
        labels: one for all samples, or ``(batch,)``.
        scale: of the guidance.

    Raises:
        TypeError: score or classifier cannot be called; labels that are not integers.
        ValueError: negative labels, a scale that is negative or not finite. When called: not as many labels as samples,
            logits that are not ``(batch, classes)``, labels outside these classes.
    """

    def __init__(
        self, score: Score, classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor | int, scale: float = 1.0
    ) -> None:
        for name, function in (("score", score), ("classifier", classifier)):
            if not callable(function):
                raise TypeError(f"{name} must be a function of (x, t), got {type(function).__name__}")
        self.score, self.classifier = score, classifier
        checked = check_labels(labels)
        self._labels, self._largest = Copies(checked), int(checked.max()) if checked.numel() else 0
        self.scale = _finite(scale, "scale")

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The guided score, of the shape of ``x: (batch, *state)``; ``t`` is ``()`` or ``(batch,)``."""
        t = as_time(t)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = (x.clone() if x.is_inference() else x).detach().requires_grad_()
            logits = self.classifier(leaf, t.to(x).expand(len(x)))
            self._check(logits, len(x))
            log_p = logits.log_softmax(1).gather(1, labels_for(self._labels.like(x), x)[:, None])
            (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
        return self.score(x, t) + self.scale * gradient

    def _check(self, logits: Tensor, batch: int) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the classifier must return logits (batch, classes) = ({batch}, classes), got {got}")
        if self._largest >= logits.shape[1]:
            raise ValueError(
                f"label {self._largest} is outside the {logits.shape[1]} classes of this classifier; labels run from 0 "
                f"to {logits.shape[1] - 1}"
            )


@final
class ClassifierFreeGuidance:
    """``unconditional + scale (conditional - unconditional)``, from one network trained with and without labels.

    Two conventions are in use and differ by 1: ``scale``, where 0 is no label and 1 the plain conditional score (most
    code), and ``weight = scale - 1``, ``(1 + weight) conditional - weight unconditional`` (Ho and Salimans 2022, eq.
    6). Give either by its name. Both arguments may be scores, or networks whose output is affine in the score, as all
    of `NetworkScore` are. What was said of scales other than 1 in `ClassifierGuidance` holds here too.

    Args:
        conditional: ``(x, t)``, such as ``score.given(labels)`` (`NetworkScore.given`). With ``conditions``, the score
            that they are given to.
        unconditional: ``(x, t)``, such as ``score`` itself, given nothing; not called at scale 1. With ``conditions``,
            ``conditional`` without them by default.
        scale: not negative: a number; ``(batch,)`` for one of each sample; or a function of ``t`` that gives either. Or
        weight: at least -1, likewise.
        interval: times ``(low, high)`` within which samples are guided; elsewhere the scale is 1 (Kynkaanniemi et al.
            2024).
        conditions: by name, as for `NetworkScore.given`.

    Raises:
        TypeError: either cannot be called; conditions for what is no `NetworkScore`, or that its network does not take.
        ValueError: both or neither of ``scale`` and ``weight``, or one that is out of range or not finite; a network
            that `train` never saw without its conditions. When called: results of different shapes.

    Example:
        >>> guided = ClassifierFreeGuidance(score, scale=3.0, label=7)  # score.given(7) and score
    """

    def __init__(
        self,
        conditional: Score,
        unconditional: Score | None = None,
        *,
        scale: Scale | None = None,
        weight: Scale | None = None,
        interval: tuple[float, float] | None = None,
        **conditions: Tensor | float,
    ) -> None:
        if conditions:
            if not isinstance(conditional, NetworkScore):
                raise TypeError(f"conditions need a NetworkScore to be given to, got {type(conditional).__name__}")
            unconditional = conditional if unconditional is None else unconditional
            conditional = conditional.given(**conditions)  # type: ignore[arg-type]
        for name, function in (("conditional", conditional), ("unconditional", unconditional)):
            if not callable(function):
                raise TypeError(f"{name} must be a function of (x, t), got {type(function).__name__}")
        if (scale is None) == (weight is None):
            raise ValueError("give scale (1 is the plain conditional score) or weight = scale - 1, exactly one of them")
        assert unconditional is not None  # or it could not be called
        self.conditional: Score = conditional
        self.unconditional: Score = unconditional
        self.scale: Scale = _checked_scale(weight, "weight") if scale is None else _checked_scale(scale, "scale")
        self.interval = _checked_interval(interval)
        for score, used in zip((conditional, unconditional), self.used, strict=True):
            if used and isinstance(score, NetworkScore):
                score.check_conditions()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score, of the shape of ``x: (batch, *state)``."""
        uses_given, uses_free = self.used
        if not uses_free:
            return self.conditional(x, t)
        free = self.unconditional(x, t)
        if not uses_given:
            return free
        self.check_rows(len(x))
        given = self.conditional(x, t)
        if given.shape != free.shape:
            raise ValueError(
                f"conditional and unconditional score must have one shape, got {tuple(given.shape)} and "
                f"{tuple(free.shape)}"
            )
        if isinstance(self.scale, float) and self.interval is None:
            return free + self.scale * (given - free)
        scale = self._scale_at(x, t)
        # Where a scale is 1 or 0, the bits are those of a run at that scale alone.
        return torch.where(scale == 1.0, given, torch.where(scale == 0.0, free, free + scale * (given - free)))

    @property
    def used(self) -> tuple[bool, bool]:
        """Whether the conditional score is called, and the unconditional one."""
        if not isinstance(self.scale, float):
            return True, True
        return self.scale != 0.0 or self.interval is not None, self.scale != 1.0

    def check_rows(self, samples: int) -> None:
        """Refuses scales of another number of samples.

        Raises:
            ValueError: there are.
        """
        if isinstance(self.scale, Tensor) and self.scale.ndim and len(self.scale) != samples:
            raise ValueError(
                f"there are {len(self.scale)} scales and {samples} samples; give one for all, or one for each"
            )

    def of(self, conditional: Score, unconditional: Score) -> ClassifierFreeGuidance:
        """The same guidance, by other scores."""
        return ClassifierFreeGuidance(conditional, unconditional, scale=self.scale, interval=self.interval)

    def _scale_at(self, x: Tensor, t: Tensor) -> Tensor:
        scale = torch.as_tensor(self.scale(t) if callable(self.scale) else self.scale).to(x)
        if scale.ndim and scale.shape != x.shape[:1]:
            raise ValueError(f"a scale at time t is a number or one for each of {len(x)} samples, got {short(scale)}")
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((t >= low) & (t <= high), scale, torch.ones_like(scale))
        return per_sample(scale, x)


def _checked_scale(value: Scale | None, name: str) -> Scale:
    """A scale: a number, a tensor ``()`` or ``(batch,)`` of them, or a function of time; from a weight, 1 more."""
    more = 1.0 if name == "weight" else 0.0
    if isinstance(value, Tensor) and (value.ndim == 0 or value.ndim == 1):
        scales = value.detach() + more
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError(f"{'1 + ' * bool(more)}{name} must be finite and not negative for every sample")
        return scales if scales.ndim else float(scales)
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number or one for each sample, (batch,), got {short(value)}")
    if callable(value):
        return (lambda t: value(t) + more) if more else value
    return _finite(more + number(value, name), "1 + weight" if more else "scale")


def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise TypeError(f"interval must be two times, (low, high), got {short(interval)}")
    low, high = number(interval[0], "interval[0]"), number(interval[1], "interval[1]")
    if not low < high:
        raise ValueError(f"interval must be two times, low before high, got {short(interval)}")
    return low, high


def drop_labels(labels: Tensor, probability: float, *, null_label: int, seed: int, first_sample: int = 0) -> Tensor:
    """Labels of which some are replaced by "no class", for classifier-free training (Ho and Salimans 2022, alg. 1).

    Sample ``i`` of the batch has the number ``first_sample + i`` of the training run, as for `Objective`; whether its
    label is dropped is a function of the seed and that number alone.

    Args:
        labels: ``(batch,)``, integers.
        probability: of being dropped, from 0 to 1; 0.1 to 0.2 is usual.
        null_label: the label that stands for none, usually the number of classes.
        seed: of the training run.
        first_sample: number of the first sample.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels that are not ``(batch,)``, a probability outside ``[0, 1]``, negative labels.

    Example:
        >>> kept = drop_labels(labels, 0.1, null_label=10, seed=0, first_sample=k * len(labels))
        >>> loss = objective(score.given(kept), x0, seed=0, first_sample=k * len(labels))
    """
    checked = check_labels(labels)
    if checked.ndim != 1:
        raise ValueError("labels must have shape (batch,), got a single one")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must lie between 0 and 1, got {short(probability)}")
    null = whole_number(null_label, "null_label", 0)
    u = uniform(
        len(checked),
        1,
        seed=seed,
        stream=Stream.DROPOUT,
        first_path=whole_number(first_sample, "first_sample", 0),
        dtype=torch.float64,
        device=checked.device,
    )
    return torch.where(u[:, 0] < probability, null, checked)


def noised_cross_entropy(
    classifier: Callable[[Tensor, Tensor], Tensor],
    process: AbstractDiffusion,
    x0: Tensor,
    labels: Tensor,
    *,
    seed: int,
    first_sample: int = 0,
) -> Tensor:
    """Cross-entropy ``(batch,)`` of a classifier at ``x_t = alpha x_0 + sigma z``, ``t`` uniform on ``[t_min, t_max]``.

    Its minimum is the exact ``p(label | x_t)``, which `ClassifierGuidance` needs; a classifier of clean data knows
    nothing of noised states. A function of ``seed`` and of each sample's number ``first_sample + i``.

    Args:
        classifier: ``(x, t) -> logits (batch, classes)``.
        process: the forward process.
        x0: data, ``(batch, *state)``.
        labels: ``(batch,)``.
        seed: of times and noise.
        first_sample: number of the first sample.

    Raises:
        TypeError: no diffusion; labels that are not integers.
        ValueError: not as many labels as samples; logits of another shape; labels outside the classes.
    """
    check_process(process)
    checked = labels_for(check_labels(labels), x0)
    first = whole_number(first_sample, "first_sample", 0)
    u = uniform(
        len(x0), 1, seed=seed, stream=Stream.TIMES, first_path=first, dtype=torch.float64, device=x0.device
    ).squeeze(1)
    t = (process.t_min + (process.t_max - process.t_min) * u).to(x0.dtype)
    x_t = perturb(
        x0, process.alpha(t), process.sigma(t), seed=seed, stream=Stream.PERTURBATION, first_path=first, step=0
    )
    logits = classifier(x_t, t)
    if logits.ndim != 2 or len(logits) != len(x0):
        raise ValueError(f"the classifier must return logits (batch, classes), got {tuple(logits.shape)}")
    check_labels(checked, logits.shape[1], null=False)
    return nn.functional.cross_entropy(logits, checked, reduction="none")


def _finite(value: float, name: str) -> float:
    if not 0.0 <= number(value, name) < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {short(value)}")
    return float(value)
