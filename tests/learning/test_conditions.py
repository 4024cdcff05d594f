"""What a batch holds beside the data: named, given to the network, dropped on request, and never lost in silence."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import sdesolve as sds
from sdesolve.training.identity import identity

LOSS = sds.DenoisingScoreMatching("simple", "stratified")
VP = sds.VP()
N = 60
X, C = torch.randn(N, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 3 * N).reshape(N, 3)
M, Y = torch.arange(N) % 2 == 0, torch.arange(N) % 3
ALL = {"x": X, "context": C, "mask": M}
NAMES = ("x", "context", "mask")


def run(score, data, **options):
    return sds.train(score, data, **{"loss": LOSS, "steps": 6, "progress": False} | options)


class Net(nn.Module):
    """A network that notes what it was told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 2))
        self.told = []

    def forward(self, x, t, context=None, mask=None):
        context = x.new_zeros(len(x), 3) if context is None else context
        mask = x.new_zeros(len(x), dtype=torch.bool) if mask is None else mask
        self.told.append((context, mask))
        return self.inner(torch.cat([x, t.expand(len(x))[:, None], context, mask.to(x.dtype)[:, None]], 1))


def made():
    return sds.NetworkScore(Net(), VP)


def weights(score):
    return torch.cat([p.detach().flatten() for p in score.parameters()])


class Rows(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return dict(zip(NAMES, (column[i] for column in self.columns), strict=False))


def test_all_kinds_of_data_with_the_same_names_train_the_same_score():
    def trained(data, **options):
        score = made()
        run(score, data, **options)
        return weights(score)

    whole = trained(ALL, batch_size=20)
    renamed = {"pixels": X, "context": C, "mask": M, "file": torch.arange(N)}
    for data, fields in (
        ((X, C, M), NAMES),
        (TensorDataset(X, C, M), NAMES),
        ((X, Y, C, M), ("x", None, "context", "mask")),
        (renamed, {"pixels": "x", "file": None}),
    ):
        assert torch.equal(trained(data, fields=fields, batch_size=20), whole)
    loader = trained(DataLoader(TensorDataset(X, C, M), 20, shuffle=True), fields=NAMES)
    assert torch.equal(trained(DataLoader(Rows(X, C, M), 20, shuffle=True)), loader)
    assert torch.equal(trained(Rows(X, C, M), batch_size=20), loader)
    alone = trained(X, batch_size=20)
    assert not torch.equal(alone, whole)
    assert torch.equal(trained((X, M), fields=("x", None), batch_size=20), alone)


def test_the_network_is_told_the_rows_of_its_samples_and_its_parts():
    score, of = made(), {tuple(c.tolist()): bool(m) for c, m in zip(C, M, strict=True)}
    run(score, ALL, batch_size=20, accumulate=3)
    assert [len(context) for context, _ in score.net.told] == [7, 7, 6] * 6
    for context, mask in score.net.told:
        assert [of[tuple(c.tolist())] for c in context] == mask.tolist()
    assert len({tuple(c.tolist()) for context, _ in score.net.told for c in context}) == N


def test_conditions_are_dropped_at_the_stated_rates_together_or_each_for_itself():
    null = {"context": torch.tensor([7.0, 8.0, 9.0]), "mask": False}

    def lost(dropout):
        score = made()
        run(score, ALL | {"mask": torch.ones_like(M)}, condition_dropout=dropout, null=null, steps=50, batch_size=N)
        context, mask = (torch.cat(told) for told in zip(*score.net.told, strict=True))
        return (context == null["context"]).all(1), ~mask

    n = 50 * N
    context, mask = lost(0.25)
    assert torch.equal(context, mask)
    assert abs(int(context.sum()) - n / 4) < 4 * math.sqrt(n * 0.25 * 0.75)
    context, mask = lost({"context": 0.5, "mask": 0.2})
    assert abs(int(context.sum()) - n / 2) < 4 * math.sqrt(n * 0.25)
    assert abs(int((context & mask).sum()) - n / 10) < 4 * math.sqrt(n * 0.1 * 0.9)


def test_a_score_of_a_continuous_condition_is_learned():
    torch.manual_seed(0)
    mean = torch.rand(2000) * 2 - 1
    data = {"x": mean[:, None] + 0.2 * torch.randn(2000, 1), "mean": mean}

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

        def forward(self, x, t, mean):
            absent = mean > 5
            return self.inner(torch.stack([x[:, 0], t, torch.where(absent, 0, mean), absent.to(x)], 1))

    score = sds.NetworkScore(Told(), VP, "edm")
    run(score, data, condition_dropout=0.3, null={"mean": 9.0}, steps=300, lr=5e-3, decay="cosine", ema=0.95)
    x, t = torch.linspace(-1, 1, 9)[:, None], torch.tensor(0.4)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    with torch.no_grad():
        for c in (-0.6, 0.0, 0.7):
            exact = c + 0.04 * alpha / (0.04 * alpha**2 + sigma**2) * (x - alpha * c)
            # 0.14 here; a score that does not look at the condition is off by up to 0.7.
            assert float((score.given(mean=c).data(x, t) - exact).abs().max()) < 0.25
        each = torch.linspace(-0.6, 0.7, 9)
        together = score.given(mean=each).data(x, t)
        alone = torch.cat([score.given(mean=c).data(x[k : k + 1], t) for k, c in enumerate(each)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_conditions_go_to_sampling_guidance_and_likelihood():
    score, options = made(), {"steps": 3, "seed": 0, "backend": "eager"}
    run(score, ALL, condition_dropout=0.2, null={"context": 0.0, "mask": False}, batch_size=20)
    told = {"context": C[:4], "mask": M[:4]}
    bound = sds.sample(VP, score.given(**told), (4, 2), **options)
    assert torch.equal(sds.sample(VP, score, (4, 2), given=told, **options), bound)
    assert torch.equal(sds.sample(VP, score.given(context=C[:4]), (4, 2), given={"mask": M[:4]}, **options), bound)
    guided = sds.ClassifierFreeGuidance(score, scale=2.0, **told)
    by_hand = sds.ClassifierFreeGuidance(score.given(**told), score, scale=2.0)
    drawn = sds.sample(VP, guided, (4, 2), **options)
    assert torch.equal(sds.sample(VP, by_hand, (4, 2), **options), drawn)
    assert torch.equal(
        sds.sample(VP, sds.ClassifierFreeGuidance(score, score, scale=2.0), (4, 2), given=told, **options), drawn
    )
    each = [
        sds.sample(
            VP, score.given(context=C[k : k + 1], mask=bool(M[k])), (1, 2), steps=3, backend="eager",
            noise=sds.BrownianPath(0, first_path=k),
        )
        for k in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(each), bound, rtol=1e-5, atol=1e-5)
    log_p = sds.log_likelihood(VP, score.given(**told), X[:4], steps=4)
    one = sds.log_likelihood(VP, score.given(context=C[2:3], mask=M[2:3]), X[2:3], steps=4, first_sample=2)
    torch.testing.assert_close(log_p[2:3], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run(made(), [(X, M)]), ValueError, r"2 entries, and all but the first would be lost: name them"),
        (lambda: run(made(), (X, C, M)), ValueError, r"3 entries, and all but the first would be lost"),
        (lambda: run(made(), [(X, M)], fields=("x",)), ValueError, r"a name, or None, for each of the 2 entries"),
        (lambda: run(made(), ALL, fields={"y": "x"}), ValueError, r"must map keys of the data \('x', 'context'"),
        (lambda: run(made(), {"image": X}), ValueError, r"nothing here is called 'x', the data: there is 'image'"),
        (lambda: run(made(), {"x": X, "msk": M}), TypeError, "this Net takes no 'msk': after x and t it takes context"),
        (lambda: run(made(), {"x": X, "mask": M[:3]}), ValueError, r"for each of the 60 samples, got Tensor \(3,\)"),
        (lambda: run(made(), [{"x": X, "mask": M[:3]}]), ValueError, r"for each of the 60 samples, got Tensor \(3,\)"),
        (lambda: run(made(), {"x": X, "mask": ["a"] * N}), TypeError, "mask must be a tensor .* got list"),
        (lambda: run(made(), ALL, condition_dropout=0.1), ValueError, r"what stands for none: give it as null={"),
        (lambda: run(made(), {"x": X}, condition_dropout={"mask": 0.1}), ValueError, "'mask' is to be dropped"),
        (lambda: run(made(), ALL, condition_dropout={"mask": 2}), ValueError, "condition_dropout mask must be a share"),
        (
            lambda: run(made(), ALL, condition_dropout=0.1, null={"context": torch.ones(4), "mask": False}),
            ValueError, r"null value of context has shape \(4,\), and its rows \(3,\)",
        ),
        (lambda: run(made(), (X, X), fields=("x", "x")), ValueError, "for one entry of the data, got 'x', 'x'"),
        (lambda: run(made(), {"x": X, "y": X}, fields={"y": "x"}), ValueError, "each name is for one entry"),
        (lambda: run(made(), X, fields=NAMES), ValueError, "a name, or None, for each of the 1 entries"),
        (lambda: run(made(), {"x": X, "label": Y}, labels=Y), ValueError, "labels= and labels in the data"),
        (lambda: run(sds.EnergyScore(nn.Linear(2, 1)), ALL), TypeError, "context, mask need a NetworkScore"),
        (lambda: run(sds.NetworkScore(Net().__call__, VP), X), ValueError, "calls a Net, which is no part"),
        (lambda: run(sds.NetworkScore(lambda x, t: x, VP), X), ValueError, "its network is a function without any"),
        (lambda: made().given(ctx=C), TypeError, "this Net takes no 'ctx': after x and t it takes context, mask"),
        (lambda: made().given(context="a cat"), TypeError, "context must be a tensor with a row for each sample"),
        (lambda: made().given(context=C[:5])(X, torch.tensor(0.5)), ValueError, "context has 5 rows and there are 60"),
        (
            lambda: sds.sample(VP, made(), (4, 2), steps=2, given={"mask": M[:3]}), ValueError,
            "mask has 3 rows and there are 4 samples",
        ),
        (lambda: sds.sample(VP, lambda x, t: x, (4, 2), steps=2, given={"mask": M}), TypeError, "for a NetworkScore"),
        (lambda: sds.ClassifierFreeGuidance(lambda x, t: x, scale=2.0, mask=M), TypeError, "conditions need a Network"),
        (lambda: sds.ClassifierFreeGuidance(made(), scale=2.0), TypeError, "unconditional must be a function"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_network_needs_what_it_has_no_default_for():
    class Needy(nn.Linear):
        def forward(self, x, t, context):
            return super().forward(x) + context[:, :2]

    score = sds.NetworkScore(Needy(2, 2), VP)
    with pytest.raises(ValueError, match="the network needs 'context' and the data hold the state alone"):
        run(score, X)
    run(score, {"x": X, "context": C})


# What was never trained


def test_a_network_that_always_had_a_condition_is_not_asked_without(tmp_path):
    def refused(score, name):
        for call in (
            lambda: sds.sample(VP, score, (2, 2), steps=2, backend="eager"),
            lambda: sds.solve(VP.reverse(score), X[:2], 1.0, 0.1, 2, solver=sds.EulerMaruyama(), seed=0),
            lambda: sds.log_likelihood(VP, score, X[:2], steps=2),
            lambda: sds.ClassifierFreeGuidance(lambda x, t: x, score, scale=2.0),
        ):
            with pytest.raises(ValueError, match=f"trained with a {name} for every sample, .* never trained: give one"):
                call()
        sds.ClassifierFreeGuidance(lambda x, t: x, score, scale=1.0)

    torch.manual_seed(0)
    score = sds.NetworkScore(sds.nn.MLP(2, width=8, depth=1, classes=3), VP)
    assert score.always_given is None
    sds.ClassifierFreeGuidance(score, scale=2.0, label=1)  # nothing is known of its training
    run(score, X, labels=Y)
    refused(score, "label")
    refused(score.given(3), "label")  # the null class
    refused(score.given(torch.tensor([0, 3])), "label")
    sds.sample(VP, score.given(1), (2, 2), steps=2, backend="eager")
    sds.save(score, tmp_path / "weights")
    again = sds.NetworkScore(sds.nn.MLP(2, width=8, depth=1, classes=3), VP)
    sds.load(again, tmp_path / "weights")
    refused(again, "label")
    alone = sds.NetworkScore(sds.nn.MLP(2, width=8, depth=1, classes=3), VP)
    run(alone.given(1), X)
    refused(alone, "label")
    run(score, X, labels=Y, label_dropout=0.1)
    sds.ClassifierFreeGuidance(score, scale=2.0, label=1)
    told = made()
    run(told, ALL, condition_dropout={"mask": 0.1}, null={"mask": False}, checkpoint=tmp_path)
    refused(told, "context")
    refused(told.given(mask=True), "context")
    sds.sample(VP, told.given(context=C[:1]), (2, 2), steps=2, backend="eager")
    resumed = made()
    sds.load(resumed, tmp_path)
    assert resumed.always_given == {"context"}


@pytest.mark.parametrize("call", [sds.save, sds.load])
def test_a_score_without_weights_is_not_saved(call, tmp_path):
    net, chain = Net(), sds.DDPM.linear(30)
    for score, message in (
        (sds.NetworkScore(lambda x, t: net(x, t), VP), "calls a Net, which is no part of it: give the module itself"),
        (sds.NetworkScore(net.__call__, VP, normalizer=sds.nn.Normalizer(0.0, 2.0)), "calls a Net"),
        (sds.ChainScore(lambda x, k: x, chain), "its network is a function without any"),
        (sds.EnergyScore(lambda x, t: net(x, t).sum(1)), "calls a Net"),
    ):
        with pytest.raises(ValueError, match=f"no weights to save or load(?=.*{message})"):
            call(score, tmp_path / "weights")
    assert not list(tmp_path.iterdir())


# Which data


class Opaque:
    """Batches that cannot be looked into."""

    def __init__(self, x):
        self.__dict__["make"] = lambda: iter(x.split(20))

    def __iter__(self):
        return self.make()


def changed(x):
    other = x.clone()
    other[37, 1] += 1e-3
    return other


DATA = {
    "tensor": lambda x: x,
    "dictionary": lambda x: {"x": x, "context": C},
    "condition": lambda x: {"x": X, "context": torch.cat([x, x[:, :1]], 1)},
    "tensor data set": lambda x: TensorDataset(x),
    "loader": lambda x: DataLoader(TensorDataset(x), 20, shuffle=True),
    "subset": lambda x: DataLoader(Subset(TensorDataset(x), range(50)), 20),
    "rows": lambda x: Rows(x.numpy(), C.numpy()),
    "list": lambda x: list(x.split(20)),
    "order": lambda x: DataLoader(Subset(TensorDataset(X), [int(k) for k in x[:, 1].argsort()]), 20),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_run_is_not_taken_up_on_other_data(kind, tmp_path):
    options = {"checkpoint": tmp_path, "batch_size": 20 if kind in ("tensor", "dictionary", "condition") else None}
    other = X.flip(0) if kind == "order" else changed(X)
    run(made(), DATA[kind](X), steps=2, **options)
    with pytest.raises(ValueError, match="was made with data="):
        run(made(), DATA[kind](other), steps=4, **options)
    assert run(made(), DATA[kind](X.clone()), steps=4, **options).resumed_from == 2


def test_a_loader_that_begins_otherwise_is_warned_of(tmp_path):
    run(made(), Opaque(X), steps=2, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="began epoch 0 with another batch than in the run that is taken up"):
        run(made(), Opaque(X + 1), steps=4, checkpoint=tmp_path)
    run(made(), Opaque(X), steps=5, checkpoint=tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(made(), Opaque(X), steps=7, checkpoint=tmp_path / "b")


def test_identity_tells_values_shapes_and_types_apart():
    values = [
        X, changed(X), X.double(), X.reshape(-1), X.T, [X], (X,), [X, X], {"a": X}, {"b": X}, ["a", "b"], ["ab"],
        np.arange(4), np.arange(4.0), torch.arange(4), torch.zeros(0, 2), None, 1, 1.0, X.to(torch.complex64).conj(),
    ]  # fmt: skip
    assert len({identity(value) for value in values}) == len(values)
    assert identity(X) == identity(X.T.contiguous().T)
    assert identity(X.double().conj()) == identity(X.double())
    cycle = [X]
    cycle.append(cycle)
    assert identity(cycle) == identity(cycle)
