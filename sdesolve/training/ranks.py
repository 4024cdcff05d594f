"""Ranks: processes that share each batch of a training, and sums of their gradients that do not depend on how many."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

Reduction = Literal["exact", "fast"]
Gradient = list[Tensor | None]
_BUCKET = 1 << 22  # numbers that are sent at once
_T = TypeVar("_T")


@final
class Ranks:
    """The processes of a run, this one among them; one alone without ``torch.distributed``.

    A batch goes through the network in parts. Their gradients are added along one binary tree over the parts, in which
    ``[a, b)`` is the sum of its halves, whoever has computed which parts: the result has the same bits for any number
    of ranks.

    Args:
        device: of the weights.
        reduction: ``"exact"``, or ``"fast"`` for one sum over ranks, which is equal to rounding.
    """

    def __init__(self, device: torch.device, reduction: Reduction = "exact") -> None:
        if not dist.is_available():
            self.rank, self.world = 0, 1
            return
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_end)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._fast = reduction == "fast"
        # NCCL sends what lies on a device, gloo what lies on the host
        self._where = device if self.world > 1 and dist.get_backend() == "nccl" else torch.device("cpu")

    def share(self, score: nn.Module) -> None:
        """Gives all ranks the weights of the first.

        Raises:
            ValueError: the module has batch statistics, which every rank would have of its own parts.
        """
        if self.world == 1:
            return
        for name, module in score.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise ValueError(
                    f"{name or 'the score'} is a {type(module).__name__}, whose statistics would differ between ranks; "
                    "take nn.GroupNorm or nn.LayerNorm"
                )
        with torch.no_grad():
            for value in score.state_dict().values():
                sent = value.detach().to(self._where, copy=True).contiguous()
                dist.broadcast(sent, 0)
                value.copy_(sent)

    def check_parts(self, parts: int) -> None:
        """Refuses a batch in fewer parts than there are ranks.

        Raises:
            ValueError: likewise.
        """
        if parts < self.world:
            raise ValueError(
                f"{self.world} ranks share the parts of each batch, and accumulate={parts} makes {parts} of them; take "
                f"accumulate={self.world}, or a multiple"
            )

    def check_same(self, config: Mapping[str, Any]) -> None:
        """Refuses ranks that were called with other arguments.

        Raises:
            ValueError: naming up to four that differ.
        """
        if self.world == 1:
            return
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, json.loads(json.dumps(config)))
        for rank, other in enumerate(every):
            wrong = [
                f"{k}={other.get(k)!r} and {every[0].get(k)!r}" for k in every[0] if other.get(k) != every[0].get(k)
            ]
            if wrong:
                raise ValueError(
                    f"ranks {rank} and 0 were called with {'; '.join(wrong[:4])}: give all of them the same"
                )

    def compare(self, batch: Callable[[], str]) -> None:
        """Warns on all ranks where they have read different batches, of which each would take its rows.

        Args:
            batch: what this rank has read, by its identity.
        """
        if self.world == 1:
            return
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, batch())
        other = [rank for rank, found in enumerate(every) if found != every[0]]
        if other:
            warnings.warn(
                f"ranks {other[0]} and 0 have read different batches, of which each takes its rows, so the run depends "
                "on the number of ranks and may leave data out. Give all of them the same loader, without a "
                "DistributedSampler, a generator of its own or randomness that torch does not seed",
                stacklevel=3,
            )

    def once(self, function: Callable[[], _T]) -> _T:
        """What ``function`` returns, or raises, on the first rank; on every rank."""
        if self.world == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
                try:
                    pickle.loads(pickle.dumps(error))
                except Exception:
                    answer[1] = RuntimeError(f"rank 0 raised {type(error).__name__}: {error}")
        dist.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise answer[1]
        found: _T = answer[0]
        return found

    def own(self, parts: int) -> range:
        """The parts of this rank."""
        return range(parts * self.rank // self.world, parts * (self.rank + 1) // self.world)

    def differentiate(self, parameters: Sequence[nn.Parameter], losses: Tensor, part: Callable[[int], None]) -> None:
        """Leaves the gradient of the sum over all parts in ``grad`` of ``parameters``, and all ``losses``.

        Args:
            parameters: of the score.
            losses: ``(parts,)``, of which ``part(k)`` sets number ``k``.
            part: adds the gradient of part ``k`` to ``grad``.
        """
        parts = len(losses)

        def gradient(a: int, b: int) -> Gradient:
            if b - a > 1:
                left = gradient(a, (a + b) // 2)
                return _added(left, gradient((a + b) // 2, b))
            part(a)
            found: Gradient = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            return found

        if self.world == 1:
            for p, g in zip(parameters, gradient(0, parts), strict=True):
                p.grad = g
            return
        every = [_nodes(0, parts, parts * r // self.world, parts * (r + 1) // self.world) for r in range(self.world)]
        own = [gradient(*node) for node in every[self.rank]]
        there = torch.tensor([any(g[k] is not None for g in own) for k in range(len(parameters))], dtype=torch.uint8)
        there = there.to(self._where)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        sent = losses.to(self._where)
        dist.all_reduce(sent)  # of numbers that one rank has and the others have zeros for
        losses.copy_(sent)
        buckets: list[list[int]] = [[]]
        for k, p in enumerate(parameters):
            if there[k]:
                if buckets[-1] and sum(parameters[j].numel() for j in buckets[-1]) + p.numel() > _BUCKET:
                    buckets.append([])
                if buckets[-1] and p.dtype != parameters[buckets[-1][0]].dtype:
                    buckets.append([])
                buckets[-1].append(k)
        for bucket in filter(None, buckets):
            self._sum(parameters, bucket, every, own)

    def _sum(
        self,
        parameters: Sequence[nn.Parameter],
        bucket: list[int],
        every: list[list[tuple[int, int]]],
        own: list[Gradient],
    ) -> None:
        def flat(gradient: Gradient) -> Tensor:
            pieces = [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for p, g in at(gradient)]
            return torch.cat(pieces).to(self._where)

        def at(gradient: Gradient) -> list[tuple[nn.Parameter, Tensor | None]]:
            return [(parameters[k], gradient[k]) for k in bucket]

        sent = [flat(gradient) for gradient in own]
        if self._fast:
            total = torch.stack(sent).sum(0)
            dist.all_reduce(total)
        else:
            parts: dict[tuple[int, int], Tensor] = {}
            for j in range(max(map(len, every))):
                mine = sent[j] if j < len(sent) else torch.zeros_like(sent[0])
                got = [torch.empty_like(mine) for _ in range(self.world)]
                dist.all_gather(got, mine)
                parts |= {nodes[j]: g for nodes, g in zip(every, got, strict=True) if j < len(nodes)}
            total = _total(parts, 0, every[-1][-1][1])
        place = 0
        for k in bucket:
            p = parameters[k]
            p.grad = total[place : place + p.numel()].reshape(p.shape).to(p.device, copy=True)
            place += p.numel()


def _nodes(a: int, b: int, first: int, end: int) -> list[tuple[int, int]]:
    """The fewest nodes of the tree over ``[a, b)`` that make up ``[first, end)``."""
    if end <= a or b <= first:
        return []
    if first <= a and b <= end:
        return [(a, b)]
    middle = (a + b) // 2
    return _nodes(a, middle, first, end) + _nodes(middle, b, first, end)


def _total(parts: Mapping[tuple[int, int], Tensor], a: int, b: int) -> Tensor:
    if (a, b) in parts:
        return parts[a, b]
    return _total(parts, a, (a + b) // 2) + _total(parts, (a + b) // 2, b)


def _added(left: Gradient, right: Gradient) -> Gradient:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(left, right, strict=True)]


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
