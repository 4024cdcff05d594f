"""Every operation that generated kernels know, beside torch's; those that they do not know are refused by name."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch

import sdesolve as sds

_Z = torch.Generator().manual_seed(2)
# What operations.txt speaks of, besides x.
W, w = torch.randn(4, 4, dtype=torch.float64, generator=_Z), torch.randn(4, dtype=torch.float64, generator=_Z)
F = torch.nn.functional
idx, mask = torch.tensor([2, 0, 3]), torch.tensor([True, False, True, True])


def pos(x):
    return x.abs() + 0.1


def u(x):
    return torch.tanh(x) * 0.9


def groups():
    """Operations of ``operations.txt`` by heading."""
    name, found = "", {}
    for line in (Path(__file__).parent / "operations.txt").read_text().splitlines():
        if line.startswith("# "):
            name = line[2:]
        elif line:
            found.setdefault(name, []).append(line)
    return found


def function(text):
    return eval(f"lambda x: {text}", globals())


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # torch's, about its own old spellings
        warnings.simplefilter("ignore")
        yield


def rows(y):
    return y.reshape(len(y), -1)


def observed(functions, x, names):
    """What each function makes of ``x`` in a fused run."""
    widths = [rows(f(x)).shape[1] for f in functions]
    sol = sds.solve(
        sds.ODE(lambda x, t: -x), x, 0.0, 1.0, 1, solver=sds.EulerMaruyama(), save_at="grid", backend="fused",
        observable=lambda x: torch.cat([rows(f(x)).to(x.dtype) for f in functions], 1),
    )  # fmt: skip
    return zip(names, functions, sol.xs[0].split(widths, 1), strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("texts", [pytest.param(v, id=k) for k, v in groups().items()])
def test_operations(texts, dtype, interpreted, difference, normals):
    """Functions of torch are good to a few roundings, as are the forms that replace them."""
    x = normals(7, 4, dtype=dtype)
    for text, f, value in observed([function(text) for text in texts], x, texts):
        assert difference(value, rows(f(x)).to(dtype)) < 30 * torch.finfo(dtype).eps, text


PRIMITIVES = """
x+w.to(x); x-w.to(x); x*w.to(x); x/w.to(x); -x; x.abs(); pos(x).sqrt(); x.exp(); x.expm1(); pos(x).log(); x.tan()
pos(x).log1p(); x.sin(); x.cos(); x.tanh(); x.sinh(); x.cosh(); u(x).asin(); u(x).acos(); x.atan(); x.atan2(w.to(x))
(3*x).floor(); (3*x).ceil(); (3*x).trunc(); (3*x).round(); x.erf(); x.sign(); pos(x)**x; x**3; pos(x)**-1.5; 2**x
x.maximum(w.to(x)); x.minimum(w.to(x)); torch.where((x>0)&~(x>1)|(x<=-1),x,2.); x.amax(1); (x>=0)^(x<1); (x==x)|(x!=1)
x@W.to(x); x.sum(1); x.logsumexp(1); (3*x).long()*2-1; (3*x).long().abs(); (x>0).long().sum(1); (3*x).long().clamp(-1,1)
x.to(torch.float64).sin(); (x.to(torch.float64)*1.1).to(torch.float32); (x>0)*x; (x>0)+(x<1); (x>0).max(1)[0]; (4*x).erfc()
x.cos(); torch.fmod(5*x,1.3); torch.remainder(5*x,-1.3); torch.hypot(x,w.to(x)); x.asinh(); torch.where(x>0,1,0); (x>0).any(1)
x.cumsum(1); x.flip(1); x[:,idx]; x[:,mask]; x.softmax(1); x.var(1); x.lerp(w.to(x),0.3); x.logical_not(); (x>w.to(x))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.thorough), torch.float32], ids=str)
def test_primitives_in_kernels(dtype, difference, normals):
    """One kernel a precision: whatever an expression can be made of."""
    texts = [text.strip() for text in PRIMITIVES.replace("\n", ";").split(";") if text.strip()]
    x = normals(130, 4, dtype=dtype)
    for text, f, value in observed([function(text) for text in texts], x, texts):
        assert difference(value, rows(f(x)).to(dtype)) < 30 * torch.finfo(dtype).eps, text


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.5, 1e-30, -1e30, 3e38, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_special_values(dtype, interpreted, difference):
    """Infinities and nan where torch has them."""
    special, a = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype), "x[:, 0]"
    x = torch.zeros_like(special)
    unary = """exp expm1 log log1p sqrt rsqrt sin tan tanh sinh atan asinh acosh atanh sigmoid erf erfc exp2 log2 log10 abs
        sign round floor trunc reciprocal square isnan isinf isfinite signbit relu"""  # noqa: E501
    texts = [f"{a}.{name}()" for name in unary.split()]
    for name in ("add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "hypot", "atan2", "logaddexp",
                  "xlogy", "copysign", "lt", "ge", "eq", "ne"):  # fmt: skip
        texts.append(f"torch.{name}({a}, x[:, 1])")
    texts += [f"F.{name}({a})" for name in ("softplus", "silu", "elu", "leaky_relu", "hardtanh", "logsigmoid")]
    texts += [f"x.{name}(1)" for name in ("softmax", "log_softmax", "logsumexp", "amax", "amin")]
    texts += [f"{a}**{n}" for n in (2, 3, -1, -2, 0.5, -0.5, 1.5, 0)]
    texts += ["x.clamp(-1, 1)", "x.norm(dim=1)", "torch.where(x > 0, x, 1 / x)", "x.nan_to_num()"]
    # A quotient of more digits than a number has leaves nothing but rounding errors.
    texts += [
        f"torch.{n}({a}, torch.where({a}.abs() > 1e6 * x[:, 1].abs(), {a}, x[:, 1]))" for n in ("fmod", "remainder")
    ]
    functions = [lambda x, f=function(text): f(torch.where(x == 0, special, x)) for text in texts]  # noqa: B008
    for text, f, value in observed(functions, x, texts):
        assert difference(value, rows(f(x)).to(dtype)) < 30 * torch.finfo(dtype).eps, text


TAILS = ["x.erfc()", "torch.special.erfcx(x)", "x.expm1()", "x.log1p()", "x.asinh()", "(x/30).atanh()",
         "torch.special.log_ndtr(-x)", "x.tanh()", "torch.hypot(x,2*x)", "F.logsigmoid(x)"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_results_have_all_their_digits(dtype, interpreted):
    """Relative errors, from tiny arguments to those where a tail is all but 0; against torch in float64."""
    x = torch.logspace(-8, 0.9, 400, dtype=dtype).reshape(-1, 1)
    for text, f, value in observed([function(text) for text in TAILS], x, TAILS):
        error = (value.double() / f(x.double()) - 1).abs().max().item()
        # An argument rounded in its last place counts x^2 times in e^(-x^2).
        assert error < 100 * torch.finfo(dtype).eps, text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_remainders_of_quotients_that_round_to_whole_numbers(dtype):
    """In kernels, whose fused multiply-adds make ``a - q b`` exact."""
    b = torch.tensor([0.1, 0.3, 1.3, -0.7], dtype=dtype)[:, None]
    whole = (b * torch.arange(-40, 41, dtype=dtype)).reshape(-1)
    a = torch.cat([whole, whole.nextafter(whole + 1), whole.nextafter(whole - 1)])
    x = torch.stack([a, b.expand(4, 81).reshape(-1).repeat(3)], 1)
    texts = [
        "torch.fmod(x[:, 0], x[:, 1])",
        "torch.remainder(x[:, 0], x[:, 1])",
        "x[:, 0] // x[:, 1]",
        "x[:, 0] // 0.1",
    ]
    texts += ["x[:, 0] // x[:, 1]", "x[:, 0] // 0.1", "(x[:, 0] / 0.1).floor()"]
    texts += ["torch.div(x[:, 0], 0.3, rounding_mode='trunc')", "(x[:, 0] * 0.1).ceil()"]
    for text, f, value in observed([function(text) for text in texts], x, texts):
        assert (value[:, 0] - f(x)).abs().max() < 8 * torch.finfo(dtype).eps, text


def test_signs_of_zero_and_dtypes_of_norms(interpreted, difference):
    x = torch.tensor([[0.0, -0.0, 3.0, -4.0]])
    texts = ["1 / (0 - x)", "(0 - x).atan2(x * 0 - 1)", "x // 0", "x // torch.inf", "-x // torch.inf"]
    texts += ["torch.linalg.vector_norm(1e30 * x, dim=1, dtype=torch.float64) * 1e-30"]
    for text, f, value in observed([function(text) for text in texts], x, texts):
        assert difference(value, rows(f(x)).float()) < 1e-6, text


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("x.lgamma()", "lgamma"),
        ("x.sort(1)[0]", "sort"),
        ("x.argmax(1)", "argmax"),
        ("x.max(1)[1] * x[:, 0]", "index of a largest"),
        ("x.min(1, keepdim=True)[1].squeeze(1).float()", "index of a largest"),
        ("F.max_pool1d(x[:, None], 3, 1, 1)[:, 0]", "index of a largest"),
        ("w.repeat(2)[torch.bucketize(x[:, 0].double(), w)]", "not constant"),
        ("x.topk(2, 1)[0]", "topk"),
        ("x.median(1)[0]", "median"),
        ("torch.linalg.inv(x.reshape(-1, 2, 2))", "inv"),
        ("F.conv1d(x[:, None], w.to(x)[None, None, :3])", "convolution"),
        ("torch.complex(x, x).abs()", "complex"),
        ("torch.fft.rfft(x).abs()", "complex|fft"),
        ("x.half()", "float16"),
        ("x.long() // 3", "whole numbers"),
        ("x.long() % 3", "whole numbers"),
        ("x[x > 0]", "not constant"),
        ("x.gather(1, (x > 0).long())", "not constant"),
        ("torch.add(x, 1, out=torch.empty_like(x))", "out="),
        ("torch.rand_like(x)", "random"),
        ("x + torch.randn(4)", "random"),
        ("torch.bernoulli(x.sigmoid())", "random"),
        ("F.dropout(x, 0.5)", "random"),
    ],
)
def test_what_is_not_supported_is_named_with_its_line(text, operation, normals):
    with pytest.raises(ValueError, match=operation) as error:
        list(observed([function(text)], normals(5, 4, dtype=torch.float32), [text]))
    assert "cannot be fused" in str(error.value)


def test_the_line_is_the_users(normals):
    def drift(x, t):
        y = 2 * x
        return y.lgamma()  # this very line

    with pytest.raises(ValueError, match=r"test_operations.py:\d+: return y.lgamma\(\)"):
        sds.solve(sds.ODE(drift), normals(3, 2), 0.0, 1.0, 1, solver=sds.RK4(), backend="fused")
