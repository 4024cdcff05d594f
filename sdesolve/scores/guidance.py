"""Scores of data with a class: classifier guidance and classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from sdesolve_kernels import Stream, perturb, uniform
from torch import Tensor, nn

from sdesolve._internal.arguments import flag, number, short, whole_number
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.nn.labels import Given, GivenTogether, check_labels, labels_for
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
    """``free + sum_k scale_k (given_k - free)``, from networks trained with conditions and without.

    For one condition two conventions are in use and differ by 1: ``scale``, where 0 is no condition and 1 the plain
    conditional score (most code), and ``weight = scale - 1``, ``(1 + weight) given - weight free`` (Ho and Salimans
    2022, eq. 6). Give either by its name. For several conditions, each with a scale of its own, this is the score of
    ``p(x) prod_k p(c_k | x)^scale_k`` (Liu et al. 2022, eq. 11), at scales of 1 that of all conditions together where
    these are independent given ``x``; a negative scale leads away from its condition. All parts may be scores, or
    networks whose output is affine in the score, as all of `NetworkScore` are. What was said of scales other than 1 in
    `ClassifierGuidance` holds here too.

    Args:
        conditional: ``(x, t)``, such as ``score.given(labels)`` (`NetworkScore.given`), or a list of them, one for each
            condition. With ``conditions``, the score that they are given to.
        unconditional: ``(x, t)``, such as ``score`` itself, given nothing; not called for one condition at scale 1.
            With ``conditions``, ``conditional`` without them by default.
        scale: not negative: a number; ``(batch,)`` for one of each sample; or a function of ``t`` that gives either.
            For a list, a list of as many, of either sign. With ``conditions``, also a scale by name,
            ``{"text": 3.0, ("image", "mask"): 1.5}``, where each is a condition of its own. Or
        weight: at least -1, likewise, for one condition.
        interval: times ``(low, high)`` within which samples are guided; elsewhere the scales are 1 (Kynkaanniemi et al.
            2024).
        one_call: evaluate all parts by one call of the network with the rows of all, ``2 batch`` for one condition. All
            have to be scores of one network, which has to keep rows apart: with batch statistics in training mode the
            parts are called one by one. Values differ by rounding, 2e-7 of the largest, as products of larger matrices
            add up in another order. Off by default: on a CPU it took .63 to .74 of the time with one row, .65 to .92
            with 16, and 1.08 to 1.36 with 4096 rows of an `MLP` or 256 of a `UNet`; and it keeps kernels from fusing.
        conditions: by name, as for `NetworkScore.given`.

    Raises:
        TypeError: a part cannot be called; conditions for what is no `NetworkScore`, or that its network does not take.
        ValueError: both or neither of ``scale`` and ``weight``, or one that is out of range or not finite; not as many
            scales as conditions; a network that `train` never saw without its conditions; ``one_call`` for parts that
            cannot be, and why. When called: results of different shapes.

    Example:
        >>> guided = ClassifierFreeGuidance(score, scale=3.0, label=7)  # score.given(7) and score
        >>> both = ClassifierFreeGuidance([score.given(7), score.given(2)], score, scale=[2.0, -0.5])
    """

    def __init__(
        self,
        conditional: Score | Sequence[Score],
        unconditional: Score | None = None,
        *,
        scale: Scale | Sequence[Scale] | Mapping[Any, Scale] | None = None,
        weight: Scale | None = None,
        interval: tuple[float, float] | None = None,
        one_call: bool = False,
        **conditions: Tensor | float,
    ) -> None:
        if conditions:
            if not isinstance(conditional, NetworkScore):
                raise TypeError(f"conditions need a NetworkScore to be given to, got {type(conditional).__name__}")
            unconditional = conditional if unconditional is None else unconditional
            if isinstance(scale, Mapping):
                groups, scale = _groups(scale, conditions), list(scale.values())
                conditional = [conditional.given(**group) for group in groups]  # type: ignore[arg-type]
            else:
                conditional = conditional.given(**conditions)  # type: ignore[arg-type]
        several = isinstance(conditional, list | tuple)
        given: tuple[Any, ...] = tuple(conditional) if isinstance(conditional, list | tuple) else (conditional,)
        for name, function in (*(("conditional", part) for part in given), ("unconditional", unconditional)):
            if not callable(function):
                raise TypeError(f"{name} must be a function of (x, t), got {type(function).__name__}")
        if (scale is None) == (weight is None):
            raise ValueError("give scale (1 is the plain conditional score) or weight = scale - 1, exactly one of them")
        assert unconditional is not None  # or it could not be called
        self.conditionals, self.unconditional = given, unconditional
        self.scales = _checked_scales(scale, weight, len(given) if several else None)
        self.interval = _checked_interval(interval)
        self.used = self._used()
        called = [part for part, used in zip(self.parts, self.used, strict=True) if used]
        for score in called:
            if isinstance(score, NetworkScore):
                score.check_conditions()
        self._together: NetworkScore | None = None
        if flag(one_call, "one_call") and len(called) > 1:
            self._together = _joined(called)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score, of the shape of ``x: (batch, *state)``."""
        if self.used.count(True) > 1:
            self.check_rows(len(x))
        plain = self.interval is None and all(isinstance(scale, float) for scale in self.scales)
        scales = [] if plain else [self._at(scale, x, t) for scale in self.scales]
        values = iter(self._evaluated(x, t))
        *given, free = (next(values) if used else None for used in self.used)
        found = [g for g in given if g is not None]
        if free is None or not found:
            return found[0] if free is None else free
        for part in found:
            if part.shape != free.shape:
                raise ValueError(
                    f"conditional and unconditional score must have one shape, got {tuple(part.shape)} and "
                    f"{tuple(free.shape)}"
                )
        guided = free
        if plain:
            for scale, g in zip(self.scales, given, strict=True):
                guided = guided if g is None else guided + scale * (g - free)  # type: ignore[operator]
            return guided
        # Where scales are 1 or 0, the bits are those of a run at these alone.
        for s, g in zip(scales, given, strict=True):
            guided = guided if g is None else torch.where(s == 0.0, guided, guided + s * (g - free))
        for k, g in enumerate(given):
            if g is not None:
                alone = scales[k] == 1.0
                for other in scales[:k] + scales[k + 1 :]:
                    alone = alone & (other == 0.0)
                guided = torch.where(alone, g, guided)
        return guided

    @property
    def parts(self) -> tuple[Score, ...]:
        """The conditional scores, then the unconditional one; `used` says for each whether it is called."""
        return (*self.conditionals, self.unconditional)

    def check_rows(self, samples: int) -> None:
        """Refuses scales of another number of samples.

        Raises:
            ValueError: there are.
        """
        for scale in self.scales:
            if isinstance(scale, Tensor) and scale.ndim and len(scale) != samples:
                raise ValueError(
                    f"there are {len(scale)} scales and {samples} samples; give one for all, or one for each"
                )

    def of(self, *parts: Score, scales: Sequence[Scale] | None = None) -> ClassifierFreeGuidance:
        """The same guidance, by other scores: conditional ones, then the unconditional one; at ``scales``, if given."""
        one_call = self._together is not None and all(isinstance(part, NetworkScore) for part in parts)
        return ClassifierFreeGuidance(
            parts[:-1], parts[-1], scale=scales or self.scales, interval=self.interval, one_call=one_call
        )

    def _used(self) -> tuple[bool, ...]:
        given = [self.interval is not None or not isinstance(s, float) or s != 0.0 for s in self.scales]
        left = [s for s, used in zip(self.scales, given, strict=True) if used]
        plain = len(left) == 1 and isinstance(left[0], float) and left[0] == 1.0
        return (*given, not plain)

    def _evaluated(self, x: Tensor, t: Tensor) -> Sequence[Tensor]:
        """The scores of the parts that are used."""
        if self._together is None or _mixes_rows(self._together):
            return [part(x, t) for part, used in zip(self.parts, self.used, strict=True) if used]
        n = self.used.count(True)
        return self._together(torch.cat([x] * n), t if t.ndim == 0 else torch.cat([t] * n)).chunk(n)

    def _at(self, value: Scale, x: Tensor, t: Tensor) -> Tensor:
        scale = torch.as_tensor(value(t) if callable(value) else value).to(x)
        if scale.ndim and scale.shape != x.shape[:1]:
            raise ValueError(f"a scale at time t is a number or one for each of {len(x)} samples, got {short(scale)}")
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((t >= low) & (t <= high), scale, torch.ones_like(scale))
        return per_sample(scale, x)


def _groups(scale: Mapping[Any, Scale], conditions: Mapping[str, Tensor | float]) -> list[dict[str, Tensor | float]]:
    """Conditions by the scale that each has."""
    groups = [key if isinstance(key, tuple) else (key,) for key in scale]
    named = [name for group in groups for name in group]
    if sorted(map(str, named)) != sorted(conditions):
        raise ValueError(
            f"scale by name must name each condition once, {', '.join(sorted(conditions))}; got {short(tuple(named))}. "
            "What belongs together has one scale, {('context', 'mask'): 3.0}"
        )
    return [{name: conditions[name] for name in group} for group in groups]


def _joined(scores: Sequence[Score]) -> NetworkScore:
    """One score of the rows of several, which are those of one network under other conditions."""
    of_networks = [score for score in scores if isinstance(score, NetworkScore)]
    nets = [score.net.net if isinstance(score.net, Given) else score.net for score in of_networks]
    kinds = {(id(score.process), score.predicts, score.sigma_data) for score in of_networks}
    if len(nets) < len(scores) or any(net is not nets[0] for net in nets) or len(kinds) > 1:
        raise ValueError(
            "one_call needs scores of one network, such as score.given(label=7) and score; leave it out for others"
        )
    given = [score.net.conditions if isinstance(score.net, Given) else {} for score in of_networks]
    first = of_networks[0]
    joined = NetworkScore(GivenTogether(nets[0], given), first.process, first.predicts, first.sigma_data)
    joined.training = first.training
    return joined


def _mixes_rows(score: NetworkScore) -> bool:
    """Whether its network takes statistics of its batch now."""
    return any(part.training for part in score.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))


def _checked_scales(
    scale: Scale | Sequence[Scale] | Mapping[Any, Scale] | None, weight: Scale | None, count: int | None
) -> tuple[Scale, ...]:
    """A scale for each of ``count`` conditions; for the one that stands for itself, where that is None."""
    if isinstance(scale, Mapping):
        raise TypeError("a scale by name needs conditions by name, ClassifierFreeGuidance(score, text=..., scale=...)")
    if count is None:
        if isinstance(scale, list | tuple):
            raise TypeError(f"scale must be a number, a tensor (batch,) or a function of time, got {short(scale)}")
        single: Any = scale
        return (_checked_scale(weight, "weight") if scale is None else _checked_scale(single, "scale"),)
    if count == 0:
        raise ValueError("conditional must be a score or a list of them, got an empty one")
    if scale is None:
        raise ValueError("weight is for one condition; give several ones scale=[...]")
    if not isinstance(scale, list | tuple) or len(scale) != count:
        raise ValueError(f"scale must be a list of one for each of {count} conditions, got {short(scale)}")
    return tuple(_checked_scale(value, f"scale[{k}]", signed=count > 1) for k, value in enumerate(scale))


def _checked_scale(value: Scale | None, name: str, *, signed: bool = False) -> Scale:
    """A scale: a number, a tensor ``()`` or ``(batch,)`` of them, or a function of time; from a weight, 1 more."""
    more = 1.0 if name == "weight" else 0.0
    if isinstance(value, Tensor) and (value.ndim == 0 or value.ndim == 1):
        scales = value.detach() + more
        if not bool((scales.isfinite() & ((scales >= 0) | signed)).all()):
            sign = "" if signed else " and not negative"
            raise ValueError(f"{'1 + ' * bool(more)}{name} must be finite{sign} for every sample")
        return scales if scales.ndim else float(scales)
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number or one for each sample, (batch,), got {short(value)}")
    if callable(value):
        return (lambda t: value(t) + more) if more else value
    scale = more + number(value, name)
    if signed and not math.isfinite(scale):
        raise ValueError(f"{name} must be finite, got {short(value)}")
    return scale if signed else _finite(scale, "1 + weight" if more else name)


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
