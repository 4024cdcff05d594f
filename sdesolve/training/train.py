"""Training of scores: `train`, with exact resume."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sdesolve._internal.arguments import flag, kind_of, number, short, whole_number
from sdesolve._internal.modes import training_mode
from sdesolve._internal.progress import progress_bar
from sdesolve._internal.transforms import runs_as_it_is
from sdesolve.nn.ema import EMA
from sdesolve.scores.network import NetworkScore
from sdesolve.training import checkpoints
from sdesolve.training.batches import Fields, batches_of
from sdesolve.training.identity import identity
from sdesolve.training.losses import AbstractObjective
from sdesolve.training.ranks import Reduction
from sdesolve.training.state import Metrics, Run

Decay = Literal["constant", "cosine"]


class StepReport(NamedTuple):
    """What a callback hears after each step."""

    step: int
    """Steps done, from 1."""
    loss: float
    gradient_norm: float
    """Before clipping."""
    average: EMA
    """The running average; ``with report.average.swap(): ...`` evaluates it."""
    averages: Mapping[float, EMA]
    """All running averages by their decay."""
    learning_rate: float
    """Of this step."""
    samples: int
    """Training samples seen so far, repeats counted."""


class TrainingResult(NamedTuple):
    """What `train` did."""

    losses: Tensor
    """Loss of every step of the run, ``(steps,)``, float64, those from before a resume included."""
    steps: int
    resumed_from: int
    """Step at which this call took the run up; 0 for a new run."""
    samples: int
    """Training samples seen in the run, repeats counted."""
    seconds: float
    """Time of this call."""
    checkpoint: Path | None
    """The file that holds the run, if one was asked for."""
    averages: Mapping[float, EMA]
    """The averaged weights by their decay: ``result.averages[0.99].copy_to()`` puts others into the score."""
    metrics: list[tuple[int, dict[str, float]]]
    """Steps and what ``metrics`` found there, from before a resume as well."""


@runs_as_it_is
def train(
    score: nn.Module,
    data: Tensor | Mapping[str, Tensor] | Dataset[Any] | Iterable[object],
    *,
    loss: AbstractObjective,
    steps: int,
    batch_size: int | None = None,
    lr: float = 1e-3,
    warmup: int = 100,
    decay: Decay = "constant",
    weight_decay: float = 0.0,
    ema: float | Sequence[float] = 0.999,
    clip: float | None = 1.0,
    labels: Tensor | None = None,
    label_dropout: float | None = None,
    fields: Fields | None = None,
    condition_dropout: float | Mapping[str, float] | None = None,
    null: Mapping[str, Tensor | float] | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    callback: Callable[[StepReport], object] | None = None,
    metrics: Metrics | None = None,
    metrics_every: int = 1000,
    reduction: Reduction = "exact",
) -> TrainingResult:
    """Trains ``score`` in place by AdamW and leaves it in evaluation mode with the averaged weights.

    Step ``k`` (from 0) uses the learning rate ``lr min(1, (k + 1) / warmup)``, times ``(1 + cos(pi k / steps)) / 2``
    with ``decay="cosine"`` (Loshchilov and Hutter 2017, eq. 5; 2019 for AdamW). Weight decay spares vectors: biases and
    normalisation. Gradients are clipped by their global norm.

    Everything random in step ``k`` is a function of ``seed`` and ``k``: the order of the data, the times and noise of
    the loss, and what the network draws for itself, in each part. With ``checkpoint`` given, a run that was stopped
    anywhere goes on from its last checkpoint when `train` is called again with the same arguments. On a CPU, with the
    same number of threads, it ends with bitwise the weights of a run that never stopped. Asking for more ``steps``
    later extends a finished run (not with ``decay="cosine"``, whose learning rates depend on the number of steps).

    Under ``torchrun`` (or any initialised ``torch.distributed``) the ranks share the parts of each batch, which
    ``accumulate`` makes: nothing is wrapped, all ranks call `train` with the same arguments, and the first rank's
    weights are everybody's. Gradients of parts are added along one tree, so on machines of one kind the run has the
    same bits for any number of ranks, one included, and can be taken up by another number. Every rank reads all data
    and takes its rows. Metrics are measured, and checkpoints written, by the first rank; a callback hears on all.

    Data go through the score's `Normalizer` first, if it has one. Where the data hold more than ``x``, each entry has
    the name of an input of the network, ``net(x, t, label=..., context=..., mask=...)``, and the loss sees
    ``score.given(label=..., context=..., mask=...)``, so that every objective trains conditional networks. An entry
    without a name is refused. Dropped conditions make a network fit for classifier-free guidance; without them what it
    says unconditionally was never trained, and guidance and sampling refuse it. The loss is over all entries of ``x``,
    whatever a mask says to the network.

    Args:
        score: a `NetworkScore`, or another module whose ``score(x, t)`` the loss understands.
        data: samples ``(samples, *state)``; a dictionary or tuple of tensors with as many rows, or a ``Dataset``; or an
            iterable of batches of the same kinds, which is gone through again every epoch.
        loss: such as `DenoisingScoreMatching`.
        steps: length of the run, the part before a resume included.
        batch_size: for data that are not in batches; 256 by default.
        lr: highest learning rate.
        warmup: steps over which the learning rate grows.
        decay: what the learning rate does afterwards.
        weight_decay: decoupled, per learning rate.
        ema: limit of the decay of the averaged weights (`EMA`), in [0, 1); several for as many averages, of which the
            first ends in the score and the others in the result and in the checkpoint (``load(..., ema=)``).
        clip: largest gradient norm; None for no limit.
        labels: classes ``(samples,)`` of a tensor of samples, for a class-conditional network.
        label_dropout: share of labels that are replaced by the null class, in [0, 1]; 0 where only ``labels`` is given.
            With pairs (data, labels) it is what says that the labels are to be used.
        fields: what is what in the data: a name for each entry of a tuple, ``("x", "context")``, or a name by key,
            ``{"pixel_values": "x"}``; None in place of a name for what is not used. Keys are names by default, and
            a single tensor is ``"x"``.
        condition_dropout: share of samples that lose all their conditions at once, but masks of `nn.UNet` and `nn.DiT`;
            or a share by name.
        null: what stands for a condition that was dropped, by name: a number, or a tensor like one row. Networks of
            `sdesolve.nn` know theirs, as does one with an attribute ``nulls``: the null class of a label, and nan.
        accumulate: parts that each batch is cut into, to go through the network one after another for less memory. The
            gradient is that of the whole batch; what the network draws for itself is drawn for each part.
        autocast: ``torch.bfloat16`` to let matrix products of the network run in 16 bits (`torch.autocast`); weights,
            their averages, noise and loss stay as they are.
        compile: compile the network in place with `torch.nn.Module.compile`; it stays compiled.
        seed: of all randomness here; the initial weights are the caller's.
        checkpoint: folder of this run. Data are part of it, by a checksum that reads them once at the start: whole
            tensors, and of a loader what its data set holds (tensors, arrays, lists, texts). A loader that begins an
            epoch with another batch than in the run that is taken up is warned of.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        progress: show a bar with the loss.
        callback: called after each step with a `StepReport`.
        metrics: called as ``metrics(score)`` every ``metrics_every`` steps and at the end, with the averaged weights,
            in evaluation mode and without gradients; the numbers it returns by name are in the result. What it draws
            from torch's generators is a function of seed and step, and does not disturb the training.
        metrics_every: steps between them.
        reduction: under ``torchrun``, ``"exact"`` for those bits, by ``world - 1`` gradients that each rank receives;
            ``"fast"`` for one all-reduce, equal to rounding.

    Raises:
        TypeError: ``score`` is no module, ``loss`` no `Objective`; integer data; labels that are not integers;
            conditions that the network does not take; a count that is not an integer, or a number that is none.
        ValueError: an argument out of range, more ranks than parts of a batch, ranks with other arguments, a module
            with batch statistics under several ranks, empty data, entries of the data without a name or with another
            number of rows, data outside the range of the normalizer, labels outside the classes, nothing to train, or a
            checkpoint that is damaged or belongs to another run.
        FloatingPointError: the loss or its gradient is not finite. The message says at which step, sample and time;
            the weights in ``score`` are those before the step.
        OSError: a checkpoint could not be written; the one before it is intact.
    """
    started = time.perf_counter()
    labelled = labels is not None or label_dropout is not None
    dropped = 0.0 if label_dropout is None else number(label_dropout, "label_dropout")
    shares = {"label": dropped} if dropped else {}
    if isinstance(condition_dropout, Mapping):
        shares |= condition_dropout
    elif condition_dropout is not None:
        shares |= {"": condition_dropout}
    for name, share in shares.items():
        what = "label_dropout" if name == "label" and dropped else f"condition_dropout {name}".strip()
        _check_range(what, share, lambda v: 0 <= v <= 1, "a share in [0, 1]")
    if reduction not in ("exact", "fast"):
        raise ValueError(f"reduction must be 'exact' or 'fast', got {short(reduction)}")
    run = Run(
        score, loss, ema, weight_decay, seed, accumulate=accumulate, autocast=autocast, dropout=shares, nulls=null,
        reduction=reduction,
    )  # fmt: skip
    steps, warmup = whole_number(steps, "steps", 1), whole_number(warmup, "warmup", 0)
    whole_number(checkpoint_every, "checkpoint_every", 1)
    whole_number(metrics_every, "metrics_every", 1)
    _check_range("lr", lr, lambda v: 0 < v < math.inf, "positive and finite")
    _check_range("weight_decay", weight_decay, lambda v: 0 <= v < math.inf, "at least 0 and finite")
    if clip is not None:
        _check_range("clip", clip, lambda v: v > 0, "positive, or None for no clipping")
    if decay not in _DECAYS:
        raise ValueError(f"decay={short(decay)} is unknown; choose one of {', '.join(map(repr, _DECAYS))}")
    for name, function in (("callback", callback), ("metrics", metrics)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {kind_of(function)}")
    batches = batches_of(data, batch_size, run.seed, labels, labelled=labelled, fields=fields)
    run.take(batches)
    file = _checkpoint_file(checkpoint)
    config: dict[str, Any] = {  # numbers of Python alone: those of numpy are no JSON
        "loss": repr(loss), "data": "" if file is None and run.ranks.world == 1 else batches.identity(),
        "batch_size": batches.size,
        "lr": float(lr), "warmup": warmup, "decay": decay, "weight_decay": float(weight_decay),
        "ema": list(run.averages) if isinstance(ema, Sequence) else float(ema),
        "clip": None if clip is None else float(clip), "label_dropout": None if label_dropout is None else dropped,
        "accumulate": run.accumulate, "autocast": None if autocast is None else str(autocast),
        "compile": bool(compile), "seed": run.seed,
    } | ({"steps": steps} if decay == "cosine" else {})  # fmt: skip
    if condition_dropout is not None:
        config |= {"condition_dropout": {k: float(v) for k, v in shares.items()}, "null": identity(null)}
    if fields is not None:
        config["fields"] = repr(fields)
    if run.accumulate > 1:
        config["parts"] = "a tree, and a stream of the network's own for each"
    run.ranks.check_same(config | {"steps": steps, "reduction": reduction})
    if file is not None and run.ranks.once(file.exists):
        run.restore(file, config, steps)
    first = run.step
    if flag(compile, "compile"):
        (score.net if isinstance(score, NetworkScore) and isinstance(score.net, nn.Module) else score).compile()

    rate = _DECAYS[decay]
    stream = batches.after(run.position)
    with (
        training_mode(score),
        progress_bar(progress and run.ranks.rank == 0, total=steps, initial=first, unit="step", desc="train") as bar,
    ):
        while run.step < steps:
            warm = min(1.0, (run.step + 1) / warmup) if warmup else 1.0
            rate_now = lr * warm * rate(run.step / steps)
            batch = next(stream)
            if run.step == first:
                run.ranks.compare(functools.partial(identity, [batch.x0, batch.conditions]))
            value, norm = run.advance(batch, rate_now, clip, file)
            if metrics is not None and (run.step % metrics_every == 0 or run.step == steps):
                run.measure(metrics)
            if file is not None and (run.step % checkpoint_every == 0 or run.step == steps):
                run.ranks.once(functools.partial(run.save, file, config))
            found = {k: f"{v:.4g}" for k, v in run.metrics[-1][1].items()} if run.metrics else {}
            recent = run.losses[-100:]
            bar.set_postfix({"loss": f"{sum(recent) / len(recent):.4f}"} | found, refresh=False)
            bar.update()
            if callback is not None:
                callback(StepReport(run.step, value, norm, run.average, run.averages, rate_now, run.position.samples))
    run.average.copy_to()
    score.eval()
    losses = torch.tensor(run.losses, dtype=torch.float64)
    seconds = time.perf_counter() - started
    return TrainingResult(losses, run.step, first, run.position.samples, seconds, file, run.averages, run.metrics)


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def _checkpoint_file(folder: str | Path | None) -> Path | None:
    if folder is None:
        return None
    if Path(folder).is_file():
        raise ValueError(f"checkpoint must be a folder, and {folder} is a file")
    return Path(folder) / checkpoints.TRAINING_FILE


def _check_range(name: str, value: float, good: Callable[[float], bool], rule: str) -> None:
    if not good(number(value, name)):
        raise ValueError(f"{name} must be {rule}, got {short(value)}")
