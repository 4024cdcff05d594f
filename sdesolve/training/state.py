"""The state of a training run: how one step changes it, and its way to the disk and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve._internal.generators import seeded
from sdesolve._internal.modes import evaluation_mode
from sdesolve.integrate.probing import ByRow
from sdesolve.nn.ema import EMA
from sdesolve.nn.labels import Given, LabelledNetwork, check_inputs, check_labels, inputs_of, masks_of, nulls_of
from sdesolve.nn.normalizer import Normalizer
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import per_sample
from sdesolve.training import checkpoints
from sdesolve.training.batches import AbstractBatches, Batch, Position, TensorBatches
from sdesolve.training.losses import AbstractObjective
from sdesolve.training.ranks import Ranks, Reduction
from sdesolve.training.scale import warn_of_scale

_ROWS_CHECKED = (0, 8, 64, 512, 4096)  # steps before which it is checked that the network keeps rows apart

Metrics = Callable[[nn.Module], Mapping[str, float]]


class Part(NamedTuple):
    """A part of a batch that goes through the network at once."""

    score: nn.Module
    x0: Tensor
    first_sample: int


@final
class Run:
    """All that changes while training.

    Args:
        score: what is trained, in place.
        loss: its objective.
        ema: decay of the averaged weights, or several.
        weight_decay: of AdamW, for parameters that are not vectors.
        seed: of all randomness.
        accumulate: parts that a batch is cut into.
        autocast: 16-bit type of the network's forward pass, or None.
        dropout: share of samples that lose a condition, by its name; under ``""`` that of all of them at once.
        nulls: what stands for no condition, by its name; the null class for a label of a `LabelledNetwork`.
        reduction: how ranks add their gradients.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range, or nothing to train.
    """

    def __init__(
        self,
        score: nn.Module,
        loss: AbstractObjective,
        ema: float | Sequence[float],
        weight_decay: float,
        seed: int,
        *,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        dropout: Mapping[str, float] | None = None,
        nulls: Mapping[str, Tensor | float] | None = None,
        reduction: Reduction = "exact",
    ) -> None:
        if not isinstance(score, nn.Module):
            raise TypeError(f"score must be a module, such as a NetworkScore; got {kind_of(score)}")
        if not isinstance(loss, AbstractObjective):
            raise TypeError(f"loss must be an Objective, such as DenoisingScoreMatching(); got {kind_of(loss)}")
        self.parameters = {name: p for name, p in score.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"this {type(score).__name__} has no parameters that require gradients: nothing to train"
                f"{checkpoints.hidden_modules(score)}"
            )
        decays = checkpoints.decays_of(ema)
        if not decays or len(set(decays)) < len(decays) or not all(0.0 <= d < 1.0 for d in decays):
            several = "" if isinstance(ema, float | int) else ", or several different ones"
            raise ValueError(f"ema must be in [0, 1){several}, got {short(ema)}; 0 means no averaging")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast takes torch.bfloat16 or None, got {short(autocast)}; gradients in float16 would vanish "
                "without scaling of the loss"
            )
        self.score, self.loss, self.seed = score, loss, whole_number(seed, "seed", 0)
        self.accumulate = whole_number(accumulate, "accumulate", 1)
        self.autocast, self.dropout, self.nulls = autocast, dict(dropout or {}), dict(nulls or {})
        self.device = next(iter(self.parameters.values())).device
        self.ranks = Ranks(self.device, reduction)
        self.ranks.check_parts(self.accumulate)
        self.ranks.share(score)
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # The fused update takes a third of the time of the loop over tensors, on CPUs as well.
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            fused=self.device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in matrices + vectors),
        )
        self.averages = {decay: EMA(score, decay) for decay in decays}
        self.average = self.averages[decays[0]]
        self.looked = False
        self.step, self.position, self.told = 0, Position(), frozenset[str]()
        self.losses: list[float] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def take(self, batches: AbstractBatches) -> None:
        """Takes the data, and refuses tensors that some step would refuse: before hours of work, not after."""
        self.batches = batches
        if not isinstance(batches, TensorBatches):
            return
        dtypes = {p.dtype.to_real() if p.is_complex() else p.dtype for p in self.parameters.values()}
        if batches.data.dtype not in dtypes:
            ours = ", ".join(sorted(map(str, dtypes)))
            raise TypeError(
                f"the data is {batches.data.dtype} and the score's parameters are {ours}; convert one to the other"
            )
        self._check_range(batches.data)
        for name, value in self._checked(batches.conditions).items():
            if any(self._shares(name)):
                self._null(name, value)

    @property
    def always_given(self) -> frozenset[str]:
        """Conditions that no sample so far was without; without a mask everything is there, which was trained too."""
        net = self.score.net if isinstance(self.score, NetworkScore) else None
        bound = frozenset(net.conditions if isinstance(net, Given) else ())
        return (bound | {name for name in self.told if not any(self._shares(name))}).difference(masks_of(net))

    def _shares(self, name: str) -> tuple[float, float]:
        """Share of samples that lose this condition with all others, and for itself; masks are no part of "all"."""
        net = self.score.net if isinstance(self.score, NetworkScore) else None
        return 0.0 if name in masks_of(net) else self.dropout.get("", 0.0), self.dropout.get(name, 0.0)

    def advance(self, batch: Batch, lr: float, clip: float | None, file: Path | None) -> tuple[float, float]:
        """One step; the loss and the norm of its gradient."""
        x0, told = self._prepared(batch)
        if not self.looked:
            warn_of_scale(self.score, x0)
            self.looked = True
        if self.step in _ROWS_CHECKED:
            self._check_rows(x0, told)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(self.accumulate, dtype=torch.float64, device=self.device)
        parts = dict(self._parts(x0, told))

        def differentiate(k: int) -> None:
            if k in parts:
                score, part, first = parts[k]
                with self._drawing(k):
                    with self._precision():
                        loss = self.loss(score, part, seed=self.seed, first_sample=first) * (len(part) / len(x0))
                    loss.backward()
                losses[k] = loss.detach()

        self.ranks.differentiate(tuple(self.parameters.values()), losses, differentiate)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), math.inf if clip is None else clip)
        # One transfer from the device per step. It must come before the update, or a bad step would spoil the weights.
        value, size = torch.stack([total, norm.double()]).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            raise FloatingPointError(self._failure(x0, told, value, size, file))
        self.optimizer.step()
        for average in self.averages.values():
            average.update()
        self.step, self.position = self.step + 1, batch.position
        if isinstance(self.score, NetworkScore):
            self.score.record_training(self.always_given)
        self.losses.append(value)
        return value, size

    def _check_rows(self, x0: Tensor, told: dict[str, Tensor]) -> None:
        """Refuses a network that takes the times of rows for those of columns or hidden units, as many as there happen
        to be of them.
        """
        compiled = getattr(getattr(self.score, "net", None), "_compiled_call_impl", None)
        if not isinstance(self.score, NetworkScore) or compiled is not None:
            return
        score, x, first = next(self._parts(x0, told))[1]
        t = self.loss.times(score, x, seed=self.seed, first_sample=first)
        if isinstance(score, NetworkScore) and x.ndim > 1 and t.is_floating_point():
            with evaluation_mode(score), self._precision():
                ByRow(score.output, "network", t).check(x, t)

    def measure(self, metrics: Metrics) -> None:
        """Calls ``metrics`` on the score with averaged weights and notes what it says; nothing else changes."""

        def measured() -> Mapping[str, float]:
            with (
                evaluation_mode(self.score), self.average.swap(), torch.no_grad(),
                seeded("metrics", self.seed, self.step, device=self.device),
            ):  # fmt: skip
                return metrics(self.score)

        found = self.ranks.once(measured)
        if not isinstance(found, Mapping):
            raise TypeError(f"metrics must return numbers by name, a dict; got {type(found).__name__}")
        self.metrics.append((self.step, {name: float(value) for name, value in found.items()}))

    def save(self, file: Path, config: dict[str, Any]) -> None:
        """Writes the whole run to ``file``, atomically.

        Raises:
            FloatingPointError: the weights are not finite, which the next step would find too late for this file.
        """
        tensors = {f"weights.{name}": value for name, value in checkpoints.named(self.score).items()}
        for name in (f"weights.{name}" for name in self.parameters):  # a buffer may hold inf, as masks do
            if name in tensors and not bool(tensors[name].isfinite().all()):
                kept = f"; the last good checkpoint is {file}" if file.exists() else ""
                raise FloatingPointError(
                    f"the weights are not finite after step {self.step - 1} ({name.removeprefix('weights.')}), and "
                    f"were not saved{kept}. A lower lr is the usual cure"
                )
        for k, average in enumerate(self.averages.values()):
            prefix = checkpoints.average_prefix(k)
            tensors |= {prefix + name: checkpoints.on_host(value) for name, value in average.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adamw.{key}.{name}"] = checkpoints.on_host(value)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        header = {
            "kind": checkpoints.TRAINING, "fingerprint": checkpoints.fingerprint(self.score), "config": config,
            "step": self.step, "position": list(self.position), "updates": self.average.updates,
            "metrics": self.metrics, "begun": self.batches.begun(self.position),
        } | checkpoints.record_of(self.score)  # fmt: skip
        checkpoints.write(file, tensors, header)

    def restore(self, file: Path, config: dict[str, Any], steps: int) -> None:
        """Takes up the run in ``file``, or says why it is another one."""
        tensors, header = checkpoints.read(file)
        if header["kind"] != checkpoints.TRAINING:
            raise ValueError(f"{file} holds weights only, no training run; to start from them call load(score, path)")
        checkpoints.check_fingerprint(self.score, header, file)
        theirs, ours = header["config"], json.loads(json.dumps(config))
        changed = [
            f"{k}={theirs.get(k)!r} (now {ours.get(k)!r})" for k in theirs | ours if theirs.get(k) != ours.get(k)
        ]
        if changed:
            raise ValueError(
                f"the run in {file} was made with {', '.join(changed)}: call train with the same arguments to continue "
                "it, or give another folder"
            )
        if header["step"] > steps:
            raise ValueError(f"the run in {file} is at step {header['step']}, beyond steps={steps}; ask for more steps")
        optimizer = self._optimizer_state(tensors, header["step"], file)
        weights = checkpoints.part(tensors, "weights.")
        checkpoints.check_tensors(self.score.state_dict(), weights, file)
        for k, average in enumerate(self.averages.values()):
            given = checkpoints.part(tensors, checkpoints.average_prefix(k))
            checkpoints.check_tensors(average.state_dict(), given, file)
        losses = tensors.get("losses")
        if losses is None or losses.shape != (header["step"],) or losses.dtype != torch.float64:
            raise checkpoints.damaged(file, f"it does not hold a loss for each of its {header['step']} steps")
        # All is checked; only now is anything written.
        checkpoints.load_named(self.score, weights)
        for k, average in enumerate(self.averages.values()):
            average.load_state_dict(checkpoints.part(tensors, checkpoints.average_prefix(k)), header["updates"])
        self.optimizer.load_state_dict(optimizer)
        self.step, self.position = header["step"], Position(*header["position"])
        self.losses = losses.tolist()
        self.metrics = [(step, found) for step, found in header["metrics"]]
        self.batches.expected = header.get("begun", "")
        checkpoints.restore_record(self.score, header)

    def _prepared(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """States and conditions of a batch: checked where they are, moved, normalised, some conditions dropped."""
        x0, told, _ = batch
        normalizer = self._check_range(x0)
        x0 = x0.to(self.device)
        if normalizer is not None:
            x0 = normalizer(x0)
        told = self._checked(told)
        self.told = frozenset(told)
        if any(self.dropout.values()):
            told = self._dropped(told)
        return x0, {name: value.to(self.device) for name, value in told.items()}

    def _check_range(self, x0: Tensor) -> Normalizer | None:
        normalizer = self.score.normalizer if isinstance(self.score, NetworkScore) else None
        if normalizer is not None:
            normalizer.check(x0)
        return normalizer

    def _checked(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions that the network takes, with labels as int64."""
        if not isinstance(self.score, NetworkScore):
            if told:
                raise TypeError(
                    f"{', '.join(told)} need a NetworkScore to be given to, got {type(self.score).__name__}"
                )
            return {}
        net = self.score.net
        takes = inputs_of(net)
        if "label" in told and takes is not None and "label" not in takes[0]:
            raise TypeError("labels need a NetworkScore of a LabelledNetwork, such as nn.UNet(shape, classes=10)")
        check_inputs(net, told)
        missing = [name for name in (takes[1] if takes else ()) if name not in told]
        if missing:
            raise ValueError(
                f"the network needs {missing[0]!r} and the data hold {', '.join(told) or 'the state alone'}; name what "
                "they hold by fields="
            )
        for name in (*self.dropout, *self.nulls):
            if name and name not in told:
                raise ValueError(
                    f"{short(name)} is to be dropped, and the data hold {', '.join(told) or 'no conditions'}; name "
                    "what they hold by fields="
                )
        if "label" in told and isinstance(net, LabelledNetwork):
            return {**told, "label": check_labels(told["label"], net.classes, null=False)}
        return dict(told)

    def _null(self, name: str, value: Tensor) -> Tensor:
        """What stands for no such condition, in its dtype."""
        nulls = {**nulls_of(self.score.net if isinstance(self.score, NetworkScore) else None), **self.nulls}
        if name not in nulls:
            raise ValueError(
                f"to drop {short(name)} it must be known what stands for none: give it as null={{{short(name)}: value}}"
            )
        null = torch.as_tensor(nulls[name]).to(value)
        try:
            null = null.expand(value.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"the null value of {name} has shape {tuple(null.shape)}, and its rows {tuple(value.shape[1:])}"
            ) from None
        return null

    def _dropped(self, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each number that decides is a function of the seed, the sample and the condition's place (`drop_labels`)."""
        names = sorted(told, key=lambda name: (name != "label", name))
        rows = len(next(iter(told.values()), ()))
        u = uniform(
            rows, len(names), seed=self.seed, stream=Stream.DROPOUT, first_path=self.position.samples,
            dtype=torch.float64,
        )  # fmt: skip
        kept = dict(told)
        for k, name in enumerate(names):
            (together, share), value = self._shares(name), told[name]
            if together or share:
                lost = ((u[:, 0] < together) | (u[:, k] < share)).to(value.device)
                kept[name] = torch.where(per_sample(lost, value), self._null(name, value), value)
        return kept

    def _drawing(self, k: int) -> AbstractContextManager[None]:
        """What the network draws for part ``k`` depends on no other part."""
        parts = () if self.accumulate == 1 else (k,)
        return seeded("network", self.seed, self.step, *parts, device=self.device)

    def _parts(self, x0: Tensor, told: dict[str, Tensor]) -> Iterator[tuple[int, Part]]:
        """A batch in parts by number, each with the score that its loss is to see."""
        first = self.position.samples
        split = {name: value.tensor_split(self.accumulate) for name, value in told.items()}
        for k, x in enumerate(x0.tensor_split(self.accumulate)):
            if len(x):
                # given() exists: conditions are there for a NetworkScore only
                score = self.score.given(**{n: v[k] for n, v in split.items()}) if told else self.score  # type: ignore[operator]
                yield k, Part(score, x, first)
                first += len(x)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast is not None)

    def _optimizer_state(self, tensors: dict[str, Tensor], step: int, file: Path) -> dict[str, Any]:
        """What AdamW knew; its update reads as many numbers of it as a parameter has, whatever is there."""
        state = self.optimizer.state_dict()
        names = {id(p): name for name, p in self.parameters.items()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        count = torch.empty(())
        expected: dict[str, Tensor] = {}
        for k, p in enumerate(ordered):
            name = names[id(p)]
            if f"adamw.step.{name}" in tensors:  # it had a gradient
                keys = {"step": count, "exp_avg": p, "exp_avg_sq": p}
                expected |= {f"adamw.{key}.{name}": like for key, like in keys.items()}
                state["state"][k] = {key: tensors.get(f"adamw.{key}.{name}") for key in keys}
        given = {name: value for name, value in tensors.items() if name.startswith("adamw.")}
        checkpoints.check_tensors(expected, given, file)
        for name, like in expected.items():
            value = given[name]
            steps = like is not count or (0 <= float(value) <= step and float(value).is_integer())
            if value.dtype != like.dtype or not steps or not bool(value.isfinite().all()):
                raise checkpoints.damaged(file, f"{name} is none that AdamW leaves after {step} steps")
        return state

    def _failure(self, x0: Tensor, told: dict[str, Tensor], value: float, size: float, file: Path | None) -> str:
        each_part, t_part = [], []
        for k, (score, part, first) in self._parts(x0, told):
            with torch.no_grad(), self._precision(), self._drawing(k):
                each_part.append(self.loss.per_sample(score, part, seed=self.seed, first_sample=first))
                t_part.append(self.loss.times(score, part, seed=self.seed, first_sample=first))
        each, t = torch.cat(each_part), torch.cat(t_part)
        bad = (~each.isfinite()).nonzero().flatten()
        row = int(bad[0]) if len(bad) else int(each.argmax())
        what = "the loss" if not math.isfinite(value) else f"the loss is {value:.6g} but the norm of its gradient"
        cause = "" if bool(x0.isfinite().all()) else " The batch itself holds nan or inf."
        kept = "" if file is None or not file.exists() else f" The last good checkpoint is {file}."
        return (
            f"{what} is {value if not math.isfinite(value) else size} at step {self.step}: sample {row} of the batch, "
            f"at time t = {float(t[row]):.6g}, has the loss {float(each[row]):.6g}.{cause} The weights are those "
            f"before this step.{kept} A lower lr or a larger t_min are the usual cures"
        )
