"""Training by several ranks has the bits of one, whatever dies on the way."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import subprocess
import sys
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sdesolve as sds
from sdesolve.training import checkpoints
from sdesolve.training.ranks import _nodes

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


class Net(nn.Module):
    """With dropout, and a weight that has a gradient in some parts only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.rare, self.never = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def forward(self, x, t):
        y = self.body(torch.cat([x, t[:, None]], 1))
        return y + self.rare if float(x.detach().sum()) > 0 else y


def trained(folder=None, seed=0, steps=6, accumulate=4, net=Net, **options):
    torch.manual_seed(seed)
    score = sds.NetworkScore(net(), sds.VP())
    options = {"batch_size": 10, "ema": (0.9, 0.99), "warmup": 2, "progress": False} | options
    found = sds.train(
        score, DATA, loss=sds.DenoisingScoreMatching(), steps=steps, accumulate=accumulate, checkpoint=folder,
        checkpoint_every=2, **options,
    )  # fmt: skip
    return score, found


def fingerprint(folder=None, **options):
    score, found = trained(folder, **options)
    tensors = {**score.state_dict(), "losses": found.losses}
    for decay, average in found.averages.items():
        tensors |= {f"{decay}.{k}": v for k, v in average.state_dict().items()}
    if folder is not None:
        tensors |= checkpoints.read(folder / checkpoints.TRAINING_FILE)[0]
    return hashlib.sha256(b"".join(tensors[k].contiguous().numpy().tobytes() for k in sorted(tensors))).hexdigest()


def on_ranks(world, action, store, deaths=()):
    """What ``action(rank)`` returns on each of ``world`` forks that are ranks, or the error as text."""
    pipes = [os.pipe() for _ in range(world)]
    children = []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                file = dist.FileStore(str(store), world)
                dist.init_process_group("gloo", store=file, rank=rank, world_size=world)
                answer = str(action(rank))
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}" + ("" if str(error) else traceback.format_exc())
            os.write(pipes[rank][1], answer.encode()[:4000])
            os._exit(0)
        children.append(child)
    answers = []
    for rank, child in enumerate(children):
        os.close(pipes[rank][1])
        with os.fdopen(pipes[rank][0], "rb") as end:
            answers.append(end.read().decode())
        assert (os.waitpid(child, 0)[1] == signal.SIGKILL) == (rank in deaths)
    return answers


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return fingerprint(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_has_the_bits_of_one(world, alone, tmp_path):
    # ranks begin with other weights: those of the first count
    answers = on_ranks(world, lambda rank: fingerprint(tmp_path / "run", seed=rank), tmp_path / "store")
    assert answers == [alone] * world


def test_a_rank_that_is_killed_and_a_restart_by_others(alone, tmp_path):
    def action(rank):
        def killed(report):
            if rank == 1 and report.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        return fingerprint(tmp_path / "run", callback=killed)

    answers = on_ranks(2, action, tmp_path / "store", deaths=(1,))
    assert answers[1] == ""
    assert answers[0]  # an error: what it says is gloo's affair
    answers = on_ranks(4, lambda rank: fingerprint(tmp_path / "run"), tmp_path / "other")
    assert answers == [alone] * 4


def test_a_kill_while_the_checkpoint_is_written(alone, tmp_path):
    def action(rank):
        renamed, count = os.replace, 0

        def replace(a, b):
            nonlocal count
            count += 1
            if count == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            renamed(a, b)

        os.replace = replace
        return fingerprint(tmp_path / "run")

    on_ranks(2, action, tmp_path / "store", deaths=(0,))
    assert checkpoints.read(tmp_path / "run" / checkpoints.TRAINING_FILE)[1]["step"] == 2
    assert fingerprint(tmp_path / "run") == alone


def test_one_all_reduce_is_equal_to_rounding(tmp_path):
    whole = trained()[0]

    def action(rank):
        other = trained(reduction="fast")[0]
        pairs = zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs) < 1e-4  # AdamW divides by small numbers

    assert on_ranks(2, action, tmp_path / "store") == ["True", "True"]


def test_metrics_are_measured_once(tmp_path):
    def action(rank):
        calls = []

        def metrics(score):
            calls.append(1)
            return {"rank": float(rank)}

        found = trained(metrics=metrics, metrics_every=3)[1]
        return len(calls), found.metrics

    answers = on_ranks(2, action, tmp_path / "store")
    assert answers == [f"({calls}, [(3, {{'rank': 0.0}}), (6, {{'rank': 0.0}})])" for calls in (2, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"accumulate": 1},
            "2 ranks share the parts of each batch, and accumulate=1 makes 1 of them; take ",
        ),
        ({"net": lambda: nn.Sequential(nn.BatchNorm1d(2))}, "is a BatchNorm1d, whose statistics would differ"),
        ({"lr": (1e-3, 2e-3)}, "ranks 1 and 0 were called with lr=0.002 and 0.001: give all of them the same"),
        ({"metrics": lambda score: {}["loss"]}, "KeyError: 'loss'"),
    ],
)
def test_every_rank_raises_the_same(options, message, tmp_path):
    def action(rank):
        return trained(**{k: v[rank] if isinstance(v, tuple) else v for k, v in options.items()})

    answers = on_ranks(2, action, tmp_path / "store")
    assert all(message in answer for answer in answers), answers


def test_a_loss_that_is_not_finite_is_named_by_all(tmp_path):
    class Bad(Net):
        def forward(self, x, t):
            return super().forward(x, t) / 0.0

    answers = on_ranks(2, lambda rank: trained(net=Bad), tmp_path / "store")
    assert answers[0] == answers[1]
    assert "FloatingPointError: the loss is" in answers[0]


def test_parts_are_summed_along_one_tree():
    assert _nodes(0, 8, 2, 8) == [(2, 4), (4, 8)]
    for parts in range(1, 12):
        for world in range(1, parts + 1):
            nodes = [_nodes(0, parts, parts * r // world, parts * (r + 1) // world) for r in range(world)]
            flat = [node for own in nodes for node in own]
            assert [a for a, _ in flat] == [0, *(b for _, b in flat[:-1])]
            assert flat[-1][1] == parts


@pytest.mark.thorough
def test_under_torchrun(alone, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.learning.test_ranks import fingerprint\n"
        "sys.stdout.write(f'{fingerprint(Path(sys.argv[1]))}\\n')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(next(p for p in map(type(tmp_path), [*sys.path, os.getcwd()]) if (p / "tests" / "learning").is_dir()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, f"{root}/kernels"])}
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=300)
    done = run([*torchrun, str(script), str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(alone) == 2


def test_arguments():
    with pytest.raises(ValueError, match="reduction must be 'exact' or 'fast'"):
        trained(reduction="slow")


IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source", ["tensors", "loader"])
def test_a_labelled_u_net_from_tensors_or_a_loader(source, tmp_path):
    """With attention, dropout, labels left out at random; each rank takes its parts of the loader's batch."""

    def action(rank):
        torch.manual_seed(rank)
        net = sds.nn.UNet((1, 8, 8), channels=4, multipliers=(1, 2), blocks=1, attention=(4,), classes=3, dropout=0.2)
        score = sds.NetworkScore(net, sds.VP())
        labels = torch.arange(24) % 3
        pairs = torch.utils.data.TensorDataset(IMAGES, labels)
        given = {"labels": labels, "batch_size": 6}
        if source == "loader":
            given = {"batch_size": None}
        data = IMAGES if source == "tensors" else torch.utils.data.DataLoader(pairs, batch_size=6, shuffle=True)
        found = sds.train(
            score, data, loss=sds.DenoisingScoreMatching(), steps=2, accumulate=3, label_dropout=0.3, ema=0.9,
            progress=False, **given,
        )  # fmt: skip
        values = [*score.state_dict().values(), found.losses]
        return hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for v in values)).hexdigest()

    answers = on_ranks(3, action, tmp_path / "store")
    assert answers == [action(0)] * 3


@pytest.mark.parametrize("kind", ["distributed", "own order", "same"])
def test_ranks_that_read_different_batches_are_told(kind, tmp_path):
    def action(rank):
        data = TensorDataset(DATA)
        own = torch.Generator().manual_seed(rank)
        how = {
            "distributed": lambda: {"sampler": DistributedSampler(data, shuffle=False)},
            "own order": lambda: {"shuffle": True, "generator": own},
            "same": lambda: {"shuffle": True},
        }[kind]()
        score = sds.NetworkScore(Net(), sds.VP())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sds.train(
                score, DataLoader(data, 10, **how), loss=sds.DenoisingScoreMatching(), steps=2, accumulate=2,
                progress=False,
            )  # fmt: skip
        return sum("have read different batches" in str(w.message) for w in caught)

    assert on_ranks(2, action, tmp_path / "store") == ["0" if kind == "same" else "1"] * 2
