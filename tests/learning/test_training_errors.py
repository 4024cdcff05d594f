import errno
import math
import os
import re
import resource
import warnings

import pytest
import torch

import sdesolve as sds
from sdesolve.training import checkpoints
from sdesolve.training.batches import batches_of
from sdesolve.training.losses import DenoisingScoreMatching, Objective
from sdesolve.training.train import train

LOSS = DenoisingScoreMatching("simple", "stratified")


def run(score, data, **options):
    return train(score, data, **{"loss": LOSS, "steps": 20, "warmup": 5, "lr": 3e-3, "progress": False} | options)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class FixedLoss(Objective):
    def times(self, score, x0, *, seed, first_sample=0):
        return torch.linspace(0.1, 0.9, len(x0))

    def per_sample(self, score, x0, *, seed, first_sample=0):
        raise NotImplementedError

    def __repr__(self):
        return type(self).__name__


class BreaksAt(FixedLoss):
    def __init__(self, sample):
        self.sample = sample

    def per_sample(self, score, x0, *, seed, first_sample=0):
        each = (score.net(x0, torch.tensor(0.5)) - x0).square().mean(1)
        numbers = first_sample + torch.arange(len(x0))
        return each + torch.where(numbers == self.sample, math.nan, 0.0)


class Flat(FixedLoss):
    """1 for finite weights however large, with the same gradient in each of them."""

    def per_sample(self, score, x0, *, seed, first_sample=0):
        return 1.0 + sum((p - p.detach()).sum() for p in score.parameters()).expand(len(x0))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_sample_and_time(make_score, data, tmp_path):
    score = make_score()
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 7: sample 2 of the batch, at time t = 0.328571"
    ) as e:
        run(score, data, batch_size=8, loss=BreaksAt(58), checkpoint=tmp_path, checkpoint_every=5)
    assert "The last good checkpoint is" in str(e.value)
    tensors, header = checkpoints.read(tmp_path / checkpoints.TRAINING_FILE)
    assert header["step"] == 5
    assert all(value.isfinite().all() for value in tensors.values())
    assert all(value.isfinite().all() for value in score.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_the_run(make_score, data):
    class Kink(FixedLoss):
        def per_sample(self, score, x0, *, seed, first_sample=0):
            return score.net(x0, torch.tensor(0.5)).abs().sum(1).sqrt() + 1.0  # sqrt at 0: a finite value, no slope

    with pytest.raises(FloatingPointError, match="the loss is 1 but the norm of its gradient is nan at step 0"):
        run(make_score(), data, loss=Kink())


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(make_score, data, tmp_path):
    options = {"batch_size": 8, "checkpoint": tmp_path, "checkpoint_every": 1, "steps": 60, "clip": None}
    # Adam's steps have the size of lr whatever the gradient: some twenty of them reach the end of float32.
    with pytest.raises(FloatingPointError, match=r"not finite after step \d+ .* saved; the last good checkpoint is"):
        run(make_score(), data, lr=2e37, loss=Flat(), **options)
    tensors, _ = checkpoints.read(tmp_path / checkpoints.TRAINING_FILE)
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_data_that_is_not_finite_is_named_as_the_cause(make_score, data):
    data[17, 1] = math.nan
    with pytest.raises(FloatingPointError, match="The batch itself holds nan or inf"):
        run(make_score(), data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": 10.0}, TypeError, "steps must be an integer, got 10.0"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3' of type str"),
        ({"ema": "0.99"}, TypeError, "ema must be a number, got '0.99'"),
        ({"labels": [0, 1]}, TypeError, r"labels must be a tensor \(\d+,\) of integers, got list"),
        ({"loss": sds.DenoisingScoreMatching}, TypeError, r"did you mean DenoisingScoreMatching\(...\)\?"),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"decay": "linear"}, ValueError, "decay='linear' is unknown; choose one of 'constant', 'cosine'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"ema": 1.0}, ValueError, r"ema must be in \[0, 1\), got 1.0"),
        ({"ema": -0.5}, ValueError, r"ema must be in \[0, 1\), got -0.5"),
        ({"clip": 0.0}, ValueError, "clip must be positive, or None for no clipping, got 0.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ({"loss": "dsm"}, TypeError, "loss must be an Objective, such as DenoisingScoreMatching.*; got str"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(make_score, data, options, error, message):
    score = make_score()
    with pytest.raises(error, match=message):
        run(score, data, **options)
    assert same(score, make_score())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.ones(8, 2, dtype=torch.int64), TypeError, "training data must be float32 or float64, got torch.int64"),
        (torch.ones(8, 2, dtype=torch.float64), TypeError, "the score's parameters are torch.float32"),
        (torch.ones(0, 2), ValueError, r"with at least one sample, got \(0, 2\)"),
        (torch.tensor(1.0), ValueError, r"training data must be \(samples, \*state\)"),
        (torch.ones(8, 3), ValueError, r"takes states of shape \(2,\)"),
        (3, TypeError, "must be a tensor .* or an iterable of batches, got int"),
        (torch.ones(8, 2).numpy(), TypeError, r"made a tensor with torch.as_tensor\(data\)"),
        ([], ValueError, "the loader gave no batch in epoch 0"),
        (["text"], TypeError, "a loader must give tensors, or tuples whose first entry is one; got str"),
        ([(1, torch.ones(2))], TypeError, "got tuple starting with int"),
        ([torch.ones(4, 2).long()], TypeError, "float32 or float64, got torch.int64"),
        ([torch.ones(0, 2)], ValueError, r"batches \(batch, \*state\) that are not empty, got \(0, 2\)"),
        ((batch for batch in [torch.ones(4, 2)]), ValueError, "the loader gave no batch in epoch 1; it must hold data"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(make_score, data, error, message):
    with pytest.raises(error, match=message):
        run(make_score(), data)


def test_a_loader_keeps_its_own_batch_size(make_score, data):
    with pytest.raises(ValueError, match="a loader already decides the size of its batches"):
        run(make_score(), [data], batch_size=8)
    assert batches_of([data], None, 0).identity().startswith("list ")


def test_there_must_be_something_to_train(make_score, data):
    with pytest.raises(TypeError, match="score must be a module, such as a NetworkScore; got function"):
        run(lambda x, t: x, data)
    score = make_score()
    score.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        run(score, data)


# Data of another scale


def shown(score, data):
    """The warning of a run, if there is one, by its text."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        run(score, data, loss=DenoisingScoreMatching(), steps=2)
    return "".join(str(each.message) for each in met)


PIXELS = torch.arange(64 * 16).remainder(256).reshape(64, 1, 4, 4).float()
OFF = {
    "deviation 100": (lambda x: 100 * x, {}, r"deviation 1\d\d, and VP with predicts='noise' is made for about 1"),
    "pixels": (lambda x: PIXELS, {"dim": (1, 4, 4)}, r"mean 128 and standard deviation 73.9, and VP with"),
    "far away": (lambda x: x + 50, {"process": sds.Rectified()}, r"mean 5\d.* and Rectified with"),
    "tiny": (lambda x: 1e-4 * x, {"process": sds.EDM()}, r"predicts='noise' has noise of 0.002 where it stops"),
    "beyond the noise": (lambda x: 60 * x, {"process": sds.EDM()}, r"starts to sample from 0 and 80"),
    "edm": (lambda x: 20 * x, {"predicts": "edm"}, "and sigma_data=1"),
    "centred edm": (
        lambda x: 20 * (x - x.mean(0)), {"predicts": "edm", "process": sds.EDM(0.01, 500.0)}, "and sigma_data=1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFF)
def test_data_far_from_the_expected_scale_are_warned_of_with_the_figure(make_score, data, kind):
    change, options, message = OFF[kind]
    options = {"predicts": "noise"} | options
    there = change(data)
    text = shown(make_score(**options), there)
    assert re.search(message, text)
    assert not shown(make_score(**options), (there - there.mean()) / there.std())
    score = make_score(**options)  # the advice, followed
    if "sigma_data=" in text.split("suffer: ")[1]:
        told = float(re.search(r"sigma_data=([\d.]+), or", text)[1])
        fitted = sds.NetworkScore(score.net, score.process, score.predicts, told)
        assert not shown(fitted, there)
    fitted = sds.NetworkScore(score.net, score.process, score.predicts, normalizer=sds.nn.Normalizer.fit(there))
    assert not shown(fitted, there)


def test_data_of_usual_scales_are_not_warned_of(make_score, data):
    for process in (sds.VP(), sds.SubVP(), sds.VE(), sds.EDM(), sds.Rectified(), sds.OU()):
        for scale in (0.25, 1.0, 2.0):
            assert not shown(make_score("noise", process=process), scale * (data - data.mean(0)) / data.std(0)), process


# What a checkpoint refuses


@pytest.fixture
def finished(make_score, data, tmp_path):
    """A run of 10 steps in a folder."""
    run(make_score(), data, steps=10, batch_size=64, checkpoint=tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-4}, r"was made with lr=0.003 \(now 0.0001\): call train with the same arguments"),
        ({"seed": 3}, r"seed=0 \(now 3\)"),
        ({"batch_size": 32}, r"batch_size=64 \(now 32\)"),
        ({"loss": DenoisingScoreMatching("sigma2")}, "weighting='simple'"),
        ({"clip": None}, r"clip=1.0 \(now None\)"),
        ({"decay": "cosine"}, r"decay='constant' \(now 'cosine'\)"),
        ({"steps": 5}, "is at step 10, beyond steps=5"),
    ],
)
def test_a_run_with_other_arguments_is_not_continued(make_score, data, finished, changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_score(), data, **{"steps": 20, "batch_size": 64, "checkpoint": finished} | changes)


def test_a_run_on_other_data_is_not_continued(make_score, data, finished):
    with pytest.raises(ValueError, match="data='tensor"):
        run(make_score(), data + 1, batch_size=64, checkpoint=finished)


def test_a_run_of_another_score_is_not_continued(make_score, data, finished):
    with pytest.raises(
        ValueError, match=r"net.inlet.bias: torch.float32 \[16\] in the file, torch.float32 \[32\] here"
    ):
        run(make_score(width=32), data, batch_size=64, checkpoint=finished)


def test_a_weights_file_is_not_a_run(make_score, data, tmp_path):
    checkpoints.save(make_score(), tmp_path / checkpoints.TRAINING_FILE)
    with pytest.raises(ValueError, match="holds weights only, no training run"):
        run(make_score(), data, checkpoint=tmp_path)


def test_a_checkpoint_is_a_folder(make_score, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder, and .*file is a file"):
        run(make_score(), data, checkpoint=tmp_path / "file")


def test_a_damaged_checkpoint_is_not_continued(make_score, data, finished):
    file = finished / checkpoints.TRAINING_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged, cut short, or of another kind.* deleted to start afresh"):
        run(make_score(), data, batch_size=64, checkpoint=finished)


def test_a_full_disk_keeps_the_previous_checkpoint(make_score, data, finished):
    file = finished / checkpoints.TRAINING_FILE
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses bytes beyond, as a full disk does
    try:
        with pytest.raises(
            OSError, match=r"could not write .*; the previous checkpoint is still there and whole"
        ) as error:
            run(make_score(), data, batch_size=64, checkpoint=finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert file.read_bytes() == before
    assert os.listdir(finished) == [checkpoints.TRAINING_FILE]
    resumed, whole = make_score(seed=2), make_score()
    assert run(resumed, data, batch_size=64, checkpoint=finished).resumed_from == 10
    run(whole, data, batch_size=64)
    assert same(resumed, whole)


class Hidden(torch.nn.Module):
    """Adds the time, as it comes or as a column, to a hidden layer."""

    def __init__(self, width, as_it_comes):
        super().__init__()
        self.first, self.last, self.as_it_comes = torch.nn.Linear(2, width), torch.nn.Linear(width, 2), as_it_comes
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + (t if self.as_it_comes else t[:, None]) * self.w))


def test_a_network_that_takes_times_of_rows_for_those_of_hidden_units_is_refused():
    """As many as there happen to be of them: nothing broke, and each unit had the time of a sample."""
    data, options = torch.randn(64, 2), {"loss": sds.DenoisingScoreMatching(), "steps": 2, "batch_size": 16}
    with pytest.raises(ValueError, match=r"network is not right for a time per row.*t.reshape\(-1, 1\)"):
        sds.train(sds.NetworkScore(Hidden(16, True), sds.VP()), data, **options)
    sds.train(sds.NetworkScore(Hidden(16, False), sds.VP()), data, **options)
