"""Labels, several averages, batches in parts, 16 bits, compilation, metrics; and runs with all of them resume."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sdesolve.diffusions import VP
from sdesolve.nn import MLP, Normalizer, UNet
from sdesolve.scores.network import NetworkScore
from sdesolve.training import checkpoints
from sdesolve.training.checkpoints import load
from sdesolve.training.losses import DenoisingScoreMatching, Objective
from sdesolve.training.train import train

LOSS = DenoisingScoreMatching("simple", "stratified")


class Stop(Exception):
    pass


def run(score, data, **options):
    return train(score, data, **{"loss": LOSS, "steps": 8, "warmup": 2, "lr": 3e-3, "progress": False} | options)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def conditional(seed=0, **options):
    torch.manual_seed(seed)
    return NetworkScore(MLP(2, width=16, depth=1, classes=3, **options), VP(), "edm")


@pytest.fixture
def labels(data):
    return torch.arange(len(data)) % 3


class Recorder(Objective):
    """A loss that notes what it was called with."""

    def __init__(self):
        self.seen = []

    def times(self, score, x0, *, seed, first_sample=0):
        return torch.full((len(x0),), 0.5)

    def per_sample(self, score, x0, *, seed, first_sample=0):
        label = score.net.label if hasattr(score.net, "label") and isinstance(score.net.label, torch.Tensor) else None
        self.seen.append((x0, label, first_sample, torch.is_autocast_enabled("cpu")))
        return (score.output(x0, torch.tensor(0.5)) - x0).square().mean(1)

    def __repr__(self):
        return "Recorder()"


# Averages


def test_several_averages_are_those_of_runs_with_one_each(make_score, data, tmp_path):
    score = make_score()
    result = run(score, data, ema=(0.5, 0.9, 0.0), checkpoint=tmp_path)
    assert list(result.averages) == [0.5, 0.9, 0.0]
    for decay in (0.5, 0.9, 0.0):
        alone, loaded = make_score(), make_score(seed=5)
        run(alone, data, ema=decay)
        result.averages[decay].copy_to()
        assert same(score, alone)
        load(loaded, tmp_path, ema=decay)
        assert same(loaded, alone)
    first, by_default = make_score(seed=5), make_score(seed=6)
    load(first, tmp_path, ema=0.5)
    load(by_default, tmp_path)
    assert same(first, by_default)
    with pytest.raises(ValueError, match=r"averages with decays 0.5, 0.9, 0.0; ema=0.99 is not there"):
        load(first, tmp_path, ema=0.99)
    checkpoints.save(score, tmp_path / "w")
    with pytest.raises(ValueError, match=r"holds weights only, no averages; ema=0.5 is not there"):
        load(first, tmp_path / "w", ema=0.5)


def test_the_first_average_is_left_in_the_score(make_score, data):
    score, alone = make_score(), make_score()
    run(score, data, ema=[0.9, 0.5])
    run(alone, data, ema=0.9)
    assert same(score, alone)


# Labels


def test_the_loss_sees_the_labels_of_its_samples(data, labels):
    def shown(data, **options):
        loss = Recorder()
        run(conditional(), data, loss=loss, steps=5, **options)
        return [(x0, label) for x0, label, *_ in loss.seen]

    of = {tuple(x.tolist()): int(k) for x, k in zip(data, labels, strict=True)}
    loader = DataLoader(TensorDataset(data, labels), batch_size=64, shuffle=True)
    for batches in (shown(data, labels=labels, batch_size=70), shown(loader, label_dropout=0.0)):
        for x0, label in batches:
            assert [of[tuple(x.tolist())] for x in x0] == label.tolist()
    assert all(label is None for _, label in shown(data, batch_size=70))


def test_labels_are_dropped_at_the_stated_rate_sample_by_sample(labels, data):
    def dropped(share, **options):
        loss = Recorder()
        run(conditional(), data, loss=loss, steps=20, labels=labels, label_dropout=share, batch_size=300, **options)
        return torch.cat([label for _, label, *_ in loss.seen]) == 3

    lost = dropped(0.2)
    assert abs(float(lost.double().mean()) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 6000)
    assert not torch.equal(lost[:300], lost[300:600])
    assert torch.equal(lost, dropped(0.2, accumulate=7))  # a function of the sample's number
    assert not torch.equal(lost, dropped(0.2, seed=1))
    assert not bool(dropped(0.0).any())
    assert bool(dropped(1.0).all())


def test_a_class_conditional_score_is_learned():
    torch.manual_seed(0)
    labels = torch.arange(1000) // 500
    data = 0.1 * torch.randn(1000, 1) + (2 * labels[:, None] - 1)
    score = NetworkScore(MLP(1, width=32, depth=1, classes=2), VP(), "data")
    run(score, data, labels=labels, label_dropout=0.5, steps=400, lr=5e-3, decay="cosine", ema=0.95)
    x, t = torch.linspace(-1.0, 1.0, 21)[:, None], torch.tensor(0.3)
    alpha, sigma = score.process.alpha(t), score.process.sigma(t)
    S2 = sigma**2 + 0.01 * alpha**2
    of_class = [m + 0.01 * alpha / S2 * (x - alpha * m) for m in (-1, 1)]
    share = torch.sigmoid(2 * alpha * x / S2)
    with torch.no_grad():
        found = [score.given(k).data(x, t) for k in range(3)]
    # E[x_0 | x_t] of each class and, for the null class, of both: 2 and about 1 apart. Over three initialisations the
    # errors were at most 0.02, 0.02 and 0.031.
    for mean, exact in zip(found, [*of_class, torch.lerp(*of_class, share)], strict=True):
        assert float((mean - exact).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((300,), 3)}, ValueError, "labels must be in 0 ... 2; got 3"),
        ({"labels": torch.full((300,), -1)}, ValueError, "labels must be in 0 ... 2; got -1"),
        ({"labels": torch.zeros(299).long()}, ValueError, r"one entry for each of the 300 samples, got shape \(299,\)"),
        ({"labels": torch.zeros(300)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": [0] * 300}, TypeError, r"labels must be a tensor \(300,\) of integers, got list"),
        ({"label_dropout": 0.1}, ValueError, "label_dropout is for data with classes; give them as labels="),
        ({"labels": torch.zeros(300).long(), "label_dropout": 1.5}, ValueError, r"label_dropout must be a share"),
        ({"data": [torch.ones(4, 2)], "label_dropout": 0.1}, ValueError, r"data and labels \(4,\) .* got nothing"),
        ({"data": [(torch.ones(4, 2), torch.ones(3))], "label_dropout": 0.1}, ValueError, r"got Tensor \(3,\)"),
        ({"data": [torch.ones(4, 2)], "labels": torch.zeros(4)}, ValueError, r"a loader gives pairs \(data, labels\)"),
        ({"score": "plain", "labels": torch.zeros(300).long()}, ValueError, "built without classes"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(data, make_score, change, error, message):
    score = make_score() if change.pop("score", "") else conditional()
    with pytest.raises(error, match=message):
        run(score, change.pop("data", data), **change)


def test_one_bad_label_or_sample_is_refused_before_the_first_step(data, labels):
    score, steps = conditional(), []
    labels[-1] = 7
    with pytest.raises(ValueError, match=r"labels must be in 0 ... 2; got 7"):
        run(score, data, labels=labels, batch_size=2, steps=3, callback=steps.append)
    data[-1] = 50.0
    ranged = NetworkScore(MLP(2, width=8), VP(), normalizer=Normalizer.range(-10, 10))
    with pytest.raises(ValueError, match=r"must lie in \[-10, 10\]"):
        run(ranged, data, batch_size=2, steps=3, callback=steps.append)
    assert not steps


def test_labels_need_a_network_that_takes_them(data):
    score = NetworkScore(torch.nn.Bilinear(2, 1, 2), VP())
    with pytest.raises(TypeError, match="labels need a NetworkScore of a LabelledNetwork"):
        run(score, data, labels=torch.zeros(300).long())


# Parts, 16 bits, compilation


@pytest.mark.parametrize("accumulate", [2, 3, 64, 100])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(data, labels, accumulate):
    whole, parts = conditional().double(), conditional().double()
    options = {"labels": labels, "label_dropout": 0.3, "batch_size": 64, "ema": 0.0, "clip": None}
    expected = run(whole, data.double(), **options)
    result = run(parts, data.double(), accumulate=accumulate, **options)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-10, atol=0)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    loss = Recorder()
    run(conditional(), data, loss=loss, steps=1, batch_size=64, accumulate=accumulate)
    sizes = [len(x0) for x0, *_ in loss.seen]
    assert sum(sizes) == 64
    assert len(sizes) == min(accumulate, 64)
    assert [first for *_, first, _ in loss.seen] == [sum(sizes[:k]) for k in range(len(sizes))]


def test_autocast_runs_the_network_in_16_bits_and_keeps_the_weights(make_score, data, tmp_path):
    full, mixed = make_score(), make_score()
    widths = []
    mixed.net.inlet.register_forward_hook(lambda _, __, out: widths.append(out.dtype))
    expected = run(full, data)
    result = run(mixed, data, autocast=torch.bfloat16, checkpoint=tmp_path)
    assert set(widths) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert not torch.equal(result.losses, expected.losses)
    # bfloat16 has 8 bits: outputs of order one are wrong by some 2^-8, and the loss by the like of it.
    torch.testing.assert_close(result.losses, expected.losses, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match=r"autocast takes torch.bfloat16 or None, got torch.float16"):
        run(make_score(), data, autocast=torch.float16)


def test_compiled_training_compiles_the_network_and_nothing_else(make_score, data, monkeypatch):
    compiled = []

    def fake(module):
        compiled.append(module)
        module.compile = None

    monkeypatch.setattr(torch.nn.Module, "compile", fake)
    score, plain = make_score(), make_score()
    run(score, data, compile=True)
    run(plain, data)
    assert compiled == [score.net]
    assert same(score, plain)


def test_a_compiled_network_trains_as_an_eager_one(make_score, data):
    eager, compiled = make_score(), make_score()
    compiled.net.compile(backend="aot_eager")
    expected, result = run(eager, data, steps=4), run(compiled, data, steps=4)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-5, atol=0)
    assert eager.state_dict().keys() == compiled.state_dict().keys()


# Metrics


def test_metrics_see_the_average_in_evaluation_and_change_nothing(make_score, data):
    score, plain, heard = make_score(dropout=0.2), make_score(dropout=0.2), []

    def metrics(given):
        assert given is score
        assert not given.training
        assert not torch.is_grad_enabled()
        heard.append({name: value.clone() for name, value in given.state_dict().items()})
        return {"draw": torch.rand(()), "loss": LOSS(given, data, seed=9)}

    result = run(score, data, metrics=metrics, metrics_every=3, ema=(0.9, 0.5))
    run(plain, data, ema=0.9)
    assert same(score, plain)
    assert [step for step, _ in result.metrics] == [3, 6, 8]
    assert all(torch.equal(value, score.state_dict()[name]) for name, value in heard[-1].items())
    with torch.no_grad():
        assert result.metrics[-1][1]["loss"] == float(LOSS(score, data, seed=9))
    draws = [found["draw"] for _, found in result.metrics]
    assert len(set(draws)) == 3
    again = run(make_score(dropout=0.2), data, metrics=lambda s: {"draw": torch.rand(())}, metrics_every=3)
    assert [found["draw"] for _, found in again.metrics] == draws
    with pytest.raises(TypeError, match="metrics must return numbers by name, a dict; got float"):
        run(make_score(), data, metrics=lambda s: 1.0, metrics_every=1)
    with pytest.raises(ValueError, match="metrics_every must be at least 1"):
        run(make_score(), data, metrics=metrics, metrics_every=0)


def test_numbers_of_numpy_are_numbers(data, labels, tmp_path):
    plain = {
        "seed": 2, "batch_size": 16, "accumulate": 2, "lr": 0.5**6, "clip": 0.5, "label_dropout": 0.25,
        "ema": [0.5, 0.75],
    }  # fmt: skip
    numpy = {name: np.asarray(value)[()] for name, value in plain.items()} | {
        "ema": [np.float32(v) for v in (0.5, 0.75)]
    }
    ours, theirs = conditional(), conditional()
    run(theirs, data, labels=labels, steps=5, **plain)
    for steps in (3, 5):
        run(ours, data, labels=labels, steps=steps, **numpy, checkpoint=tmp_path)
    assert same(ours, theirs)


def test_a_report_says_what_the_step_was(make_score, data):
    reports = []
    run(make_score(), data, batch_size=50, lr=1e-2, warmup=4, ema=(0.9, 0.5), callback=reports.append)
    assert [report.samples for report in reports] == [50 * k for k in range(1, 9)]
    assert [report.learning_rate for report in reports] == pytest.approx([2.5e-3, 5e-3, 7.5e-3] + [1e-2] * 5)
    assert list(reports[0].averages) == [0.9, 0.5]
    assert reports[0].average is reports[0].averages[0.9]


# All at once, stopped and taken up


@pytest.mark.parametrize("change", [{}, {"autocast": torch.bfloat16}])
def test_a_run_with_everything_stopped_and_resumed_ends_with_the_same_bits(tmp_path, change):
    generator = torch.Generator().manual_seed(4)
    data, labels = 16 * torch.rand(60, 3, 5, generator=generator), torch.arange(60) % 3
    options = {
        "labels": labels, "label_dropout": 0.2, "accumulate": 3, "ema": (0.9, 0.5), "batch_size": 16,
        "metrics": lambda score: {"draw": torch.rand(())}, "metrics_every": 2, "checkpoint_every": 3,
    } | change  # fmt: skip

    def make(seed=0):
        torch.manual_seed(seed)
        net = UNet((3, 5), channels=4, multipliers=(1, 2), blocks=1, classes=3, dropout=0.2)
        return NetworkScore(net, VP(), "edm", normalizer=Normalizer.range(0.0, 16.0))

    def stop(report):
        if report.step == 5:
            raise Stop

    whole, resumed = make(), make(7)
    expected = run(whole, data, **options)
    with pytest.raises(Stop):
        run(make(), data, checkpoint=tmp_path, callback=stop, **options)
    result = run(resumed, data, checkpoint=tmp_path, **options)
    assert result.resumed_from == 3
    assert torch.equal(result.losses, expected.losses)
    assert result.metrics == expected.metrics
    for decay in (0.9, 0.5):
        for each in (expected, result):
            each.averages[decay].copy_to()
        assert same(whole, resumed)
    changes = (("ema", 0.9), ("accumulate", 2), ("label_dropout", 0.1), ("labels", labels.flip(0)))
    for name, value in changes:
        with pytest.raises(ValueError, match="was made with"):
            run(make(), data, checkpoint=tmp_path, **options | {name: value})


def test_a_loss_that_breaks_in_a_part_is_named_by_its_row_in_the_batch(data, labels):
    class Breaks(Recorder):
        def times(self, score, x0, *, seed, first_sample=0):
            return torch.arange(first_sample, first_sample + len(x0)) / 1000

        def per_sample(self, score, x0, *, seed, first_sample=0):
            number = first_sample + torch.arange(len(x0))
            return super().per_sample(score, x0, seed=seed) + torch.where(number == 58, math.nan, 0.0)

    with pytest.raises(FloatingPointError, match=r"at step 3: sample 10 of the batch, at time t = 0.058"):
        run(conditional(), data, loss=Breaks(), labels=labels, batch_size=16, accumulate=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": ()}, r"ema must be in \[0, 1\), or several different ones, got \(\)"),
        ({"ema": (0.9, 0.9)}, "several different ones"),
        ({"ema": (0.9, 1.0)}, "several different ones"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_bad_options_are_refused(make_score, data, options, message):
    with pytest.raises(ValueError, match=message):
        run(make_score(), data, **options)
