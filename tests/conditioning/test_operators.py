"""Operators against their own matrices: adjoint, Gram solve, pseudo-inverse; FFT blur against a loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sdesolve_kernels import normal

from sdesolve.inverse.operators import Blur, ChannelMixing, Mask, Masks, Matrix, PerSample


def draws(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=210, dtype=dtype).reshape(shape)


rank_one = draws(3, 3, 1) @ draws(4, 1, 6)
OPERATORS = {
    "matrix": Matrix(draws(0, 4, 6)),
    "matrix of an image": Matrix(draws(1, 3, 12), (2, 3, 2)),
    "tall matrix": Matrix(draws(2, 5, 3)),
    "singular matrix": Matrix(rank_one, (2, 3)),
    "mask": Mask(draws(5, 2, 3, 2) > 0),
    "one number": Mask(torch.ones((), dtype=torch.bool)),
    "grey": ChannelMixing(torch.full((1, 3), 1 / 3), (3, 2, 2)),
    "channels of a vector": ChannelMixing(draws(6, 2, 3), (3,)),
    "dependent channels": ChannelMixing(rank_one[:, :3], (3, 2)),
    "even blur": Blur(draws(7, 2), (5,)),
    "blur of an image": Blur(draws(8, 3, 2), (2, 4, 5)),
    "singular blur": Blur(torch.tensor([1.0, 1.0]) / 2, (2, 6)),
}
cases = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1)


@cases
def test_forward_and_adjoint_are_the_matrix_and_its_transpose(A):
    M = A.matrix()
    x, y = draws(20, 3, *A.state_shape), draws(21, 3, *A.observation_shape)
    assert A(x).shape == (3, *A.observation_shape)
    assert A.adjoint(y).shape == (3, *A.state_shape)
    torch.testing.assert_close(flat(A(x)), flat(x) @ M.mT)
    torch.testing.assert_close(flat(A.adjoint(y)), flat(y) @ M)


@cases
def test_numbers_of_a_gram_solve_may_stay_on_the_host(A):
    r = torch.empty(3, *A.observation_shape, device="meta")  # meta tensors refuse others as a GPU's do
    assert A.solve_gram(r, torch.tensor(0.7), torch.tensor(0.1)).device == r.device


@cases
@pytest.mark.parametrize("s", [0.0, 0.3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gram_solve(A, s, per_sample):
    M = A.matrix()
    c = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64) if per_sample else torch.tensor(0.7, dtype=torch.float64)
    r = draws(22, 3, *A.observation_shape)
    solved = flat(A.solve_gram(r, c, torch.full_like(c, s)))
    for k in range(3):
        gram = (c[k] if per_sample else c) * M @ M.mT + s * torch.eye(len(M), dtype=torch.float64)
        expected = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ flat(r)[k]
        torch.testing.assert_close(solved[k], expected, rtol=1e-9, atol=1e-10)


@cases
def test_pseudo_inverse(A):
    M, y = A.matrix(), draws(23, 2, *A.observation_shape)
    expected = flat(y) @ torch.linalg.pinv(M, rtol=1e-10).mT
    torch.testing.assert_close(flat(A.pseudo_inverse(y)), expected, rtol=1e-9, atol=1e-10)


@cases
def test_single_precision_and_gradients(A):
    x = draws(24, 2, *A.state_shape)
    y = A(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), A(x.float().double()), rtol=1e-5, atol=1e-5)
    ones = torch.ones((), dtype=torch.float32)
    assert A.solve_gram(y, ones, ones).dtype == torch.float32
    assert A.adjoint(y).dtype == torch.float32
    leaf = x.requires_grad_()
    v = draws(25, 2, *A.observation_shape)
    (gradient,) = torch.autograd.grad((A(leaf) * v).sum(), leaf)
    torch.testing.assert_close(gradient, A.adjoint(v))


def test_mask_sees_what_indexing_sees():
    mask, x = draws(5, 2, 3) > 0, draws(26, 4, 2, 3)
    assert torch.equal(Mask(mask)(x), x[:, mask])


EACH = draws(30, 3, 2, 3) > 0
OWN = {
    "masks": (Masks(EACH), [Matrix(torch.diag(m.flatten().double()), (2, 3)) for m in EACH]),
    "blurs": (PerSample(blurs := [Blur(draws(31 + i, 2), (2, 3)) for i in range(3)]), blurs),
    "matrices": (PerSample(matrices := [Matrix(draws(35 + i, 4, 6), (2, 3)) for i in range(3)]), matrices),
}


@pytest.mark.parametrize(("A", "each"), OWN.values(), ids=OWN)
def test_an_operator_for_each_state(A, each):
    """Row by row it is what the operator of that row is alone."""
    x, y = draws(40, 3, 2, 3), draws(41, 3, *A.observation_shape)
    rows = range(3)
    torch.testing.assert_close(flat(A(x)), torch.cat([flat(each[i](x[i : i + 1])) for i in rows]))
    shaped = [y[i : i + 1].reshape(1, *each[i].observation_shape) for i in rows]
    torch.testing.assert_close(flat(A.adjoint(y)), torch.cat([flat(each[i].adjoint(shaped[i])) for i in rows]))
    c = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    for s in (torch.zeros_like(c), 0.3 * c):
        solved = torch.cat([flat(each[i].solve_gram(shaped[i], c[i : i + 1], s[i : i + 1])) for i in rows])
        torch.testing.assert_close(flat(A.solve_gram(y, c, s)), solved)
    for call in (lambda: A(x[:2]), A.matrix):
        with pytest.raises(ValueError, match="map for each of 3 states"):
            call()


@pytest.mark.parametrize("sizes", [(3, 2), (2, 5), (1, 1)])
def test_blur_is_circular_convolution(sizes):
    kernel, x = draws(27, *sizes), draws(28, 1, 2, 4, 5)
    expected = torch.zeros_like(x)
    for p in itertools.product(range(4), range(5)):
        for q in itertools.product(*map(range, sizes)):
            source = [(p[i] - q[i] + sizes[i] // 2) % n for i, n in enumerate((4, 5))]
            expected[0, :, p[0], p[1]] += kernel[q] * x[0, :, source[0], source[1]]
    torch.testing.assert_close(Blur(kernel, (2, 4, 5))(x), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Matrix(torch.ones(3)), ValueError, "must be a matrix"),
        (lambda: Matrix(torch.ones(2, 3), (2, 2)), ValueError, "3 columns and a state of shape"),
        (lambda: Matrix(torch.full((1, 1), math.nan)), ValueError, "must be finite"),
        (lambda: Matrix(torch.ones(1, 1, dtype=torch.complex64)), TypeError, "must be real"),
        (lambda: Mask(torch.ones(3)), TypeError, r"mask\.bool\(\)"),
        (lambda: Mask(torch.zeros(3, dtype=torch.bool)), ValueError, "observes nothing"),
        (lambda: Masks(torch.ones(3, 2)), TypeError, r"masks\.bool\(\)"),
        (lambda: Masks(torch.eye(3, 2) > 0), ValueError, "observe something of every state"),
        (lambda: PerSample([]), ValueError, "got none"),
        (lambda: PerSample([torch.ones(2, 2)]), TypeError, "got Tensor"),
        (lambda: PerSample([Mask(m) for m in torch.eye(3) > torch.tensor([0, 0, -1])]), ValueError, "operators.Masks"),
        (lambda: ChannelMixing(torch.ones(1, 3), (2, 4)), ValueError, "as many channels"),
        (lambda: Blur(torch.ones(4), (3,)), ValueError, "does not fit"),
        (lambda: Blur(torch.ones(2, 2), (3,)), ValueError, "does not fit"),
        (lambda: Blur(torch.ones(()), (3,)), ValueError, "does not fit"),
        (lambda: Matrix(torch.ones(2, 3))(torch.ones(3)), ValueError, r"pass x\[None\]"),
        (lambda: Matrix(torch.ones(2, 3))(torch.ones(5, 4)), ValueError, "takes states of shape"),
        (lambda: Matrix(torch.ones(2, 3))(torch.ones(5, 3, dtype=torch.int64)), TypeError, "floating-point"),
    ],
)
def test_bad_operators(make, error, message):
    with pytest.raises(error, match=message):
        make()
