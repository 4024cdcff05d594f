"""Traces against Jacobians written out, and estimators against all their probes or their known variance."""

import itertools
import math

import pytest
import torch
from sdesolve_kernels import Stream, normal

from sdesolve.likelihood.trace_estimators import ExactTrace, Hutchinson, HutchPP

D = 4
A = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def field(x):
    return torch.sin(x @ A.T) + 0.5 * x.flip(1)


def points(n):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def jacobians(x):
    return torch.stack([torch.autograd.functional.jacobian(lambda v: field(v[None])[0], row.detach()) for row in x])


def test_the_exact_trace_is_the_trace_of_the_jacobian():
    x = points(5)
    ours = ExactTrace()(field(x), x, ExactTrace().probes(x, seed=0))
    torch.testing.assert_close(ours, jacobians(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True))


def test_rademacher_probes_average_to_the_trace_with_the_stated_variance():
    x, J = points(3), jacobians(points(3))
    all_probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)
    ours = Hutchinson(2**D)(field(x), x, all_probes[:, None, :].expand(-1, 3, -1))
    torch.testing.assert_close(ours.mean(1), J.diagonal(dim1=1, dim2=2).sum(1))
    S = 0.5 * (J + J.mT)
    variance = 2 * (S.square().sum((1, 2)) - S.diagonal(dim1=1, dim2=2).square().sum(1))
    torch.testing.assert_close(ours.var(1, correction=0), variance)


def test_gaussian_probes_have_the_stated_variance():
    x, n = points(1), 40_000
    S = 0.5 * (jacobians(x)[0] + jacobians(x)[0].mT)
    many = x.detach().expand(n, -1).clone().requires_grad_()
    law = Hutchinson(1, "gaussian")
    ours = law(field(many), many, law.probes(many, seed=2))[:, 0]
    expected = math.sqrt(2 * float(S.square().sum()))
    assert abs(float(ours.mean() - S.trace())) < 5 * expected / math.sqrt(n)
    # A quadratic form has at most the kurtosis of a square of a normal, 15: the variance is known to sqrt(14 / n).
    assert abs(float(ours.var()) / expected**2 - 1) < 5 * math.sqrt(14 / n)


@pytest.mark.parametrize("rank", [1, 2])
def test_hutch_pp_averages_to_the_trace(rank):
    n = 20_000
    x, law = points(1), HutchPP(1, rank)
    many = x.detach().expand(n, -1).clone().requires_grad_()
    ours = law(field(many), many, law.probes(many, seed=3))[:, 0]
    assert abs(float(ours.mean() - jacobians(x)[0].trace())) < 5 * float(ours.std()) / math.sqrt(n)
    assert float(ours.std()) > 1e-3


def test_hutch_pp_is_exact_where_its_subspace_or_the_identity_holds_everything():
    x = points(6)
    low_rank = torch.outer(A[0], A[1]) + torch.outer(A[2], A[3])
    cases = {
        "all dimensions": (field(x), HutchPP(3, D), jacobians(x).diagonal(dim1=1, dim2=2).sum(1)),
        "more than all": (field(x), HutchPP(3, 2 * D), jacobians(x).diagonal(dim1=1, dim2=2).sum(1)),
        "all but one": (field(x), HutchPP(3, D - 1), jacobians(x).diagonal(dim1=1, dim2=2).sum(1)),
        "two dimensions": (x @ low_rank, HutchPP(3, 2), low_rank.trace().expand(6)),
        "the identity": (-0.3 * x, HutchPP(3, 1), torch.full((6,), -0.3 * D, dtype=torch.float64)),
    }
    for name, (s, law, trace) in cases.items():
        ours = law(s, x, law.probes(x, seed=4))
        assert ours.shape == (6, 3)
        torch.testing.assert_close(ours, trace[:, None].expand(-1, 3), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("law", [Hutchinson(5), Hutchinson(5, "gaussian"), HutchPP(5, 2)], ids=repr)
def test_probes_are_a_function_of_seed_and_number(law):
    x = points(8)
    whole = law.probes(x, seed=7)
    torch.testing.assert_close(law.probes(x[3:5], seed=7, first_path=3), whole[:, 3:5])
    assert not torch.equal(law.probes(x, seed=8), whole)
    if law.__class__ is Hutchinson and law.law == "rademacher":
        assert bool((whole.abs() == 1).all())
    else:
        z = normal(8, len(whole) * D, seed=7, stream=Stream.PROBES, dtype=torch.float64)
        torch.testing.assert_close(whole, z.reshape(8, len(whole), D).transpose(0, 1))


@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(2), HutchPP(2, 2)], ids=repr)
def test_a_field_without_its_state_has_no_divergence(law):
    x, w = points(2), torch.ones(D, dtype=torch.float64, requires_grad=True)
    for s in (torch.ones(2, D, dtype=torch.float64), w.expand(2, D)):
        assert float(law(s, x, law.probes(x, seed=0)).abs().max()) == 0.0


@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(2), HutchPP(2, 2)], ids=repr)
def test_states_of_any_shape_and_gradients_of_the_trace(law):
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    trace = law(c * x**2, x, law.probes(x, seed=0), create_graph=True)
    if isinstance(law, ExactTrace):
        torch.testing.assert_close(trace[:, 0], 2 * c * x.sum((1, 2)))
    (gradient,) = torch.autograd.grad(trace.sum(), c)
    torch.testing.assert_close(gradient * c, trace.sum())  # the trace is linear in c


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hutchinson(0), ValueError, "probes must be at least 1, got 0"),
        (lambda: Hutchinson(1.5), TypeError, "probes must be an integer"),
        (
            lambda: Hutchinson(2, "uniform"),
            ValueError,
            "law='uniform' of probes is unknown; choose one of 'rademacher'",
        ),
        (lambda: HutchPP(2, 0), ValueError, "rank must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
