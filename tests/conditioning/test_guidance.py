"""Guidance against exact classes: the components of a mixture, whose noised classifier is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from sdesolve_kernels import normal

import sdesolve as sds
from sdesolve.scores import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    drop_labels,
    noised_cross_entropy,
)


def draws(seed: int, *shape: int) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=212, dtype=torch.float64).reshape(shape)


MEANS, STDS = draws(0, 3, 2), torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
DATA, PROCESS = sds.GaussianMixture(MEANS, STDS, WEIGHTS), sds.VP()
CLASSES = [sds.Gaussian(m, s**2).score(PROCESS) for m, s in zip(MEANS, STDS, strict=True)]
TIMES = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
X, LABELS = draws(1, 4, 2), torch.tensor([0, 1, 2, 1])


def logits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``log p(k | x_t)`` up to a constant of each row, which a classifier is free to add."""
    log_joint = torch.stack([c.log_prob(x, t) for c in CLASSES], dim=1) + WEIGHTS.log()
    return log_joint + x.sum(1, keepdim=True)


def conditional(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The exact score of each row's class; class 3 stands for none."""
    scores = torch.stack([*(c(x, t) for c in CLASSES), DATA.score(PROCESS)(x, t)])
    return scores[labels, torch.arange(len(x))]


def given_labels(labels: torch.Tensor | int):
    return lambda x, t: conditional(x, t, torch.as_tensor(labels).expand(len(x)))


def test_the_exact_classifier_gives_the_exact_score_of_the_class():
    guided = ClassifierGuidance(DATA.score(PROCESS), logits, LABELS)
    expected = given_labels(LABELS)(X, TIMES)
    torch.testing.assert_close(guided(X, TIMES), expected, rtol=1e-10, atol=1e-12)
    one = ClassifierGuidance(DATA.score(PROCESS), logits, 2)(X, 0.3)
    torch.testing.assert_close(one, CLASSES[2](X, 0.3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_both_guidances_are_the_score_of_the_tilted_density(scale):
    x = X.clone().requires_grad_()
    log_class = logits(x, TIMES).log_softmax(1).gather(1, LABELS[:, None])[:, 0]
    (expected,) = torch.autograd.grad((DATA.score(PROCESS).log_prob(x, TIMES) + scale * log_class).sum(), x)
    given, free = given_labels(LABELS), given_labels(3)
    for score in (
        ClassifierGuidance(DATA.score(PROCESS), logits, LABELS, scale),
        ClassifierFreeGuidance(given, free, scale=scale),
        ClassifierFreeGuidance(given, free, weight=scale - 1.0),
    ):
        torch.testing.assert_close(score(X, TIMES), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "edm"])
def test_networks_and_scores_are_guided_alike(predicts):
    net = sds.nn.MLP((2,), width=8, depth=1, classes=3).double()
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(draws(50 + k, *parameter.shape))
        score = sds.NetworkScore(net, PROCESS, predicts)
        outside = ClassifierFreeGuidance(score.given(LABELS), score, scale=2.5)
        within = ClassifierFreeGuidance(lambda x, t: net(x, t, LABELS), net, scale=2.5)
        inside = sds.NetworkScore(within, PROCESS, predicts)
        torch.testing.assert_close(outside(X, TIMES), inside(X, TIMES), rtol=1e-9, atol=1e-9)
        assert float((outside(X, TIMES) - score(X, TIMES)).norm()) > 1e-3


def test_samples_are_of_the_class():
    guided = ClassifierGuidance(DATA.score(PROCESS), logits, 0)
    x = sds.sample(PROCESS, guided, (2000, 2), solver=sds.DPMSolverPP(order=2), steps=40, seed=0, dtype=torch.float64)
    # 4.5 standard errors, and 0.02 for the steps and the start from N(0, 1).
    assert float((x.mean(0) - MEANS[0]).abs().max()) < 4.5 * 0.4 / math.sqrt(2000) + 0.02
    assert float((x.std(0) - 0.4).abs().max()) < 4.5 * 0.4 / math.sqrt(4000) + 0.02


def test_unneeded_networks_are_not_called():
    def never(x, t):
        raise AssertionError("called")

    def score(x, t):
        return -x

    assert torch.equal(ClassifierFreeGuidance(score, never, scale=1.0)(X, TIMES), -X)
    assert torch.equal(ClassifierFreeGuidance(score, never, weight=0.0)(X, TIMES), -X)
    assert torch.equal(ClassifierFreeGuidance(never, score, scale=0.0)(X, TIMES), -X)


def test_dropped_labels_are_a_function_of_seed_and_sample():
    labels = torch.arange(10000) % 10
    dropped = drop_labels(labels, 0.2, null_label=10, seed=3)
    gone = dropped == 10
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(int(gone.sum()) - 2000) < 4.5 * math.sqrt(10000 * 0.2 * 0.8)
    part = drop_labels(labels[700:900], 0.2, null_label=10, seed=3, first_sample=700)
    assert torch.equal(part, dropped[700:900])
    assert not torch.equal(drop_labels(labels, 0.2, null_label=10, seed=4), dropped)
    assert torch.equal(drop_labels(labels, 0.0, null_label=10, seed=3), labels)
    assert bool((drop_labels(labels, 1.0, null_label=10, seed=3) == 10).all())


def test_the_exact_classifier_minimises_the_noised_cross_entropy():
    n = 4000
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=torch.Generator().manual_seed(0))
    x0 = MEANS[k] + STDS[k, None] * draws(2, n, 2)

    def loss(classifier):
        return noised_cross_entropy(classifier, PROCESS, x0, k, seed=5)

    def clean(x, t):
        return logits(x, torch.full_like(t, PROCESS.t_min))

    exact, others = loss(logits), [loss(lambda x, t: 1.3 * logits(x, t)), loss(clean)]
    assert exact.shape == (n,)
    for other in others:  # paired differences, 3 standard errors above 0
        gap = other - exact
        assert float(gap.mean()) > 3 * float(gap.std()) / math.sqrt(n)
    torch.testing.assert_close(
        noised_cross_entropy(logits, PROCESS, x0[100:200], k[100:200], seed=5, first_sample=100), exact[100:200]
    )


def zero(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassifierGuidance(zero, logits, torch.tensor([0, -1])), ValueError, "got -1"),
        (lambda: ClassifierGuidance(zero, logits, torch.tensor([0.0, 1.0])), TypeError, "integers"),
        (lambda: ClassifierGuidance(zero, logits, torch.ones(2, 3, dtype=torch.int64)), ValueError, r"\(batch,\)"),
        (lambda: ClassifierGuidance(zero, logits, LABELS)(X[:3], TIMES[:3]), ValueError, "4 labels and 3 samples"),
        (lambda: ClassifierGuidance(None, logits, 0), TypeError, "score must be"),
        (lambda: ClassifierGuidance(zero, None, 0), TypeError, "classifier must be"),
        (lambda: ClassifierGuidance(zero, logits, 0, -1.0), ValueError, "scale must be finite"),
        (lambda: ClassifierGuidance(zero, logits, 0, math.nan), ValueError, "scale must be finite"),
        (lambda: ClassifierGuidance(zero, logits, 3)(X, TIMES), ValueError, "label 3 is outside the 3 classes"),
        (lambda: ClassifierGuidance(zero, lambda x, t: x[:, 0], 0)(X, TIMES), ValueError, r"logits \(batch, classes\)"),
        (lambda: ClassifierFreeGuidance(zero, zero), ValueError, "exactly one of them"),
        (lambda: ClassifierFreeGuidance(zero, zero, scale=1.0, weight=0.0), ValueError, "exactly one of them"),
        (lambda: ClassifierFreeGuidance(zero, zero, weight=-2.0), ValueError, "1 \\+ weight must be finite"),
        (lambda: ClassifierFreeGuidance(zero, 1.0, scale=2.0), TypeError, "unconditional must be"),
        (
            lambda: ClassifierFreeGuidance(zero, lambda x, t: x[:, :1], scale=2.0)(X, TIMES),
            ValueError,
            "must have one shape",
        ),
        (lambda: drop_labels(LABELS, 1.5, null_label=3, seed=0), ValueError, "probability must lie"),
        (lambda: drop_labels(torch.tensor(1), 0.5, null_label=3, seed=0), ValueError, "got a single one"),
        (lambda: drop_labels(LABELS, 0.5, null_label=-1, seed=0), ValueError, "null_label must be at least 0"),
        (lambda: noised_cross_entropy(logits, PROCESS, X, LABELS + 1, seed=0), ValueError, "must be in 0 ... 2; got 3"),
        (lambda: noised_cross_entropy(logits, PROCESS, X, LABELS[:2], seed=0), ValueError, "2 labels and 4 samples"),
        (lambda: noised_cross_entropy(logits, None, X, LABELS, seed=0), TypeError, "process must be"),
        (lambda: noised_cross_entropy(lambda x, t: x[0], PROCESS, X, LABELS, seed=0), ValueError, "must return logits"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_scale_is_a_number():
    with pytest.raises(TypeError, match="scale must be a number, got '3' of type str"):
        sds.ClassifierFreeGuidance(lambda x, t: x, lambda x, t: -x, scale="3")


def test_guidance_by_sample_is_a_loop_over_samples():
    """To the bit, at scales of 0 and 1 too, and through a whole sampler."""
    process = sds.VP()
    given, free = sds.Gaussian(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])), sds.Gaussian(torch.zeros(2), 1.0)
    given, free = given.score(process), free.score(process)
    scales = torch.tensor([0.0, 1.0, 2.5, 1.0]).repeat(8)
    together = sds.ClassifierFreeGuidance(given, free, scale=scales)
    x, t = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)
    rows = [sds.ClassifierFreeGuidance(given, free, scale=float(s))(x[i : i + 1], t) for i, s in enumerate(scales)]
    assert torch.equal(together(x, t), torch.cat(rows))
    by_weight = sds.ClassifierFreeGuidance(given, free, weight=scales - 1.0)
    assert torch.equal(by_weight(x, t), together(x, t))
    options = {"solver": sds.DPMSolverPP(2), "steps": 6, "seed": 2, "backend": "eager"}
    whole = sds.sample(process, together, (32, 2), **options)
    for i, s in enumerate(scales[:4]):
        alone = sds.ClassifierFreeGuidance(given, free, scale=float(s))
        assert torch.equal(whole[i], sds.sample(process, alone, (32, 2), **options)[i])


def test_guidance_by_time_and_within_an_interval():
    process = sds.VP()
    given, free = (lambda x, t: -x + 1.0), (lambda x, t: -x)
    x = torch.zeros(3, 2)
    ramp = sds.ClassifierFreeGuidance(given, free, scale=lambda t: 4.0 * t)
    assert torch.equal(ramp(x, torch.tensor(0.5)), torch.full((3, 2), 2.0))
    assert torch.equal(ramp(x, torch.tensor([0.0, 0.25, 1.0]))[:, 0], torch.tensor([0.0, 1.0, 4.0]))
    limited = sds.ClassifierFreeGuidance(given, free, scale=3.0, interval=(0.2, 0.6))
    assert torch.equal(limited(x, torch.tensor([0.1, 0.4, 0.7]))[:, 0], torch.tensor([1.0, 3.0, 1.0]))
    assert sds.sample(process, limited, (3, 2), steps=3, seed=0).shape == (3, 2)

    def asked(x, t):
        raise AssertionError

    with pytest.raises(ValueError, match="3 scales and 5 samples"):
        sds.sample(process, sds.ClassifierFreeGuidance(asked, asked, scale=torch.ones(3)), (5, 2), steps=3)
    for wrong, error in (({"scale": torch.tensor([1.0, -1.0])}, ValueError), ({"scale": torch.ones(2, 2)}, ValueError),
                         ({"scale": 2.0, "interval": (0.5, 0.2)}, ValueError), ({"scale": "x"}, TypeError),
                         ({"scale": 2.0, "interval": 0.5}, TypeError)):  # fmt: skip
        with pytest.raises(error):
            sds.ClassifierFreeGuidance(given, free, **wrong)


# Several conditions, and one call for all


def test_several_conditions_are_the_score_of_the_tilted_product():
    """``p(x) p(0 | x)^2 p(2 | x)^-0.5`` by automatic differentiation of exact densities."""
    x = X.clone().requires_grad_()
    log_class = logits(x, TIMES).log_softmax(1)
    joint = DATA.score(PROCESS).log_prob(x, TIMES) + 2.0 * log_class[:, 0] - 0.5 * log_class[:, 2]
    (expected,) = torch.autograd.grad(joint.sum(), x)
    guided = ClassifierFreeGuidance([given_labels(0), given_labels(2)], given_labels(3), scale=[2.0, -0.5])
    torch.testing.assert_close(guided(X, TIMES), expected, rtol=1e-9, atol=1e-11)


def test_scales_by_sample_of_several_conditions_are_a_loop_over_samples():
    parts = [sds.Gaussian(torch.tensor([float(k), 1.0 - k]), 0.5).score(PROCESS) for k in range(3)]
    scales = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.5, -0.7], [0.0, 3.0]])
    x, t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)
    together = ClassifierFreeGuidance(parts[:2], parts[2], scale=[scales[:, 0], scales[:, 1]])
    rows = [
        ClassifierFreeGuidance(parts[:2], parts[2], scale=row.tolist())(x[i : i + 1], t) for i, row in enumerate(scales)
    ]
    assert torch.equal(together(x, t), torch.cat(rows))
    ramp = ClassifierFreeGuidance(parts[:2], parts[2], scale=[lambda t: 5.0 * t, -0.7], interval=(0.3, 0.5))
    by_hand = ClassifierFreeGuidance(parts[:2], parts[2], scale=[2.0, -0.7])
    assert torch.equal(ramp(x, t), by_hand(x, t))
    ones = ClassifierFreeGuidance(parts[:2], parts[2], scale=[1.0, 1.0])
    assert torch.equal(ramp(x, torch.tensor(0.6)), ones(x, torch.tensor(0.6)))


class Told(torch.nn.Module):
    """A network of conditions that counts its rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nulls = {"text": 0.0}
        self.inner, self.norm, self.rows = torch.nn.Linear(7, 2), torch.nn.BatchNorm1d(2), []

    def forward(self, x, t, text=None, image=None):
        self.rows.append(len(x))
        text = x.new_zeros(len(x), 3) if text is None else text
        image = x.new_zeros(len(x)) if image is None else image
        seen = torch.cat([x, text, image[:, None], t[:, None]], 1)
        return self.norm(self.inner(seen)) * (1.0 + x.square())


def test_conditions_by_name_have_scales_of_their_own():
    score = sds.NetworkScore(Told().double().eval(), PROCESS)
    text, t = draws(3, 4, 3), torch.tensor(0.5, dtype=torch.float64)
    by_name = ClassifierFreeGuidance(score, scale={"text": 2.0, "image": -1.0}, text=text, image=0.3)
    by_hand = ClassifierFreeGuidance([score.given(text=text), score.given(image=0.3)], score, scale=[2.0, -1.0])
    assert torch.equal(by_name(X, t), by_hand(X, t))
    one = ClassifierFreeGuidance(score, scale={("text", "image"): 2.0}, text=text, image=0.3)
    assert torch.equal(one(X, t), ClassifierFreeGuidance(score, scale=2.0, text=text, image=0.3)(X, t))
    options = {"steps": 3, "seed": 0, "backend": "eager", "dtype": torch.float64}
    later = ClassifierFreeGuidance([score.given(text=text), score], score, scale=[2.0, -1.0])
    both = [score.given(text=text, image=0.3), score.given(image=0.3)]
    expected = sds.sample(PROCESS, ClassifierFreeGuidance(both, score, scale=[2.0, -1.0]), (4, 2), **options)
    assert torch.equal(sds.sample(PROCESS, later, (4, 2), given={"image": 0.3}, **options), expected)


def test_one_call_for_all_parts_gives_what_several_give():
    net = Told().double().eval()
    score, text = sds.NetworkScore(net, PROCESS, "edm"), draws(3, 4, 3)
    free = score.given(image=0.0)
    for parts, scale in (
        ([score.given(text=text, image=0.2), score.given(text=text[:1], image=torch.arange(4.0))], [2.0, -0.5]),
        ([score.given(text=text, image=0.2)], [torch.tensor([0.0, 1.0, 2.0, 3.0])]),
    ):
        for t in (TIMES, TIMES[1]):
            together = ClassifierFreeGuidance(parts, free, scale=scale, one_call=True)
            net.rows.clear()
            value = together(X, t)
            assert net.rows == [4 * (len(parts) + 1)]
            expected = ClassifierFreeGuidance(parts, free, scale=scale)(X, t)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    net.train()  # batch statistics of all rows at once would be others
    net.rows.clear()
    together(X, TIMES)
    assert net.rows == [4, 4]
    net.rows.clear()
    drawn = sds.sample(PROCESS, together, (4, 2), steps=3, seed=0, dtype=torch.float64)
    assert set(net.rows) == {8}
    apart = ClassifierFreeGuidance(parts, free, scale=scale)
    expected = sds.sample(PROCESS, apart, (4, 2), steps=3, seed=0, dtype=torch.float64)
    torch.testing.assert_close(drawn, expected, rtol=1e-11, atol=1e-11)
    labelled = sds.NetworkScore(sds.nn.MLP(2, width=8, depth=1, classes=3).double(), PROCESS)
    with torch.no_grad():
        for k, parameter in enumerate(labelled.parameters()):
            parameter.copy_(draws(50 + k, *parameter.shape))
    pair = [ClassifierFreeGuidance(labelled, scale=3.0, label=LABELS, one_call=one)(X, TIMES) for one in (True, False)]
    torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


def never(x, t):
    raise AssertionError("called")


def test_several_conditions_that_do_not_fit_are_refused():
    cfg, score = ClassifierFreeGuidance, sds.NetworkScore(Told(), PROCESS)
    other, two = sds.NetworkScore(Told(), PROCESS), torch.zeros(2, 3)
    for make, error, message in (
        (lambda: cfg([zero, zero], zero, scale=2.0), ValueError, "one for each of 2 conditions"),
        (lambda: cfg([zero, zero], zero, scale=[1.0]), ValueError, "one for each of 2 conditions"),
        (lambda: cfg([zero, zero], zero, scale=torch.ones(2)), ValueError, "one for each of 2"),
        (lambda: cfg([zero], zero, scale=[-1.0]), ValueError, r"scale\[0\] must be finite and not"),
        (lambda: cfg([zero, 1], zero, scale=[1.0, 1.0]), TypeError, "conditional must be a function"),
        (lambda: cfg([], zero, scale=[]), ValueError, "got an empty one"),
        (lambda: cfg([zero, zero], zero, weight=1.0), ValueError, "weight is for one condition"),
        (lambda: cfg([zero, zero], zero, scale=[1.0, math.inf]), ValueError, r"scale\[1\] must be f"),
        (lambda: cfg(zero, zero, scale=[1.0]), TypeError, "scale must be a number"),
        (lambda: cfg(zero, zero, scale={"text": 1.0}), TypeError, "needs conditions by name"),
        (lambda: cfg(score, scale={"text": 1.0}, text=two, image=0.1), ValueError, "image, text"),
        (lambda: cfg(score, scale={3: 1.0}, text=two), ValueError, "must name each condition once"),
        (lambda: cfg(never, never, scale=lambda t: torch.ones(3))(X, TIMES[0]), ValueError, "one for each of 4"),
        (lambda: cfg(score, scale={"text": 1.0, "txt": 2.0}, text=two), ValueError, "'txt'"),
        (lambda: cfg([zero, zero], zero, scale=[torch.ones(3), 1.0])(X, TIMES), ValueError, "3 scal"),
        (lambda: cfg(zero, zero, scale=2.0, one_call=True), ValueError, "scores of one network"),
        (lambda: cfg(score, other, scale=2.0, text=two, one_call=True), ValueError, "of one network"),
        (lambda: cfg(score, scale=2.0, image=0.5, one_call=True), ValueError, "given\\(image=...\\)"),
        (
            lambda: cfg(score, score.given(text=two[:, :2]), scale=2.0, text=two, one_call=True),
            ValueError, r"those of text are \(2,\) and \(3,\)",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()
