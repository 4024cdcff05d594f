"""torchsde by its own names: values against our `solve`, against torchsde on the same path, and what is refused."""

import importlib
import math
import warnings

import pytest
import torch
import torchsde as theirs

import sdesolve as sds
from sdesolve.adapters import FromTorchSDE
from sdesolve.compat import torchsde as ours

F64 = torch.float64
CHANNELS = {"diagonal": 3, "scalar": 1, "additive": 2, "general": 2}
TIMES = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)


class Equation(ours.BaseSDE):
    """Numbers that tell entries and channels apart, and a parameter in drift and diffusion."""

    def __init__(self, noise_type, sde_type="ito"):
        super().__init__(noise_type, sde_type)
        self.a = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=F64))
        self.calls = 0  # a function that counts is not fused, so that nothing here is compiled

    def f(self, t, y):
        self.calls += 1
        return self.a * (1 + t) - y.sin()

    def h(self, t, y):
        return -y

    def g(self, t, y):
        b = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.5, 0.2]], dtype=F64) + self.a[:, None]
        if self.noise_type == "diagonal":
            return 0.3 * y + 0.1 * self.a
        if self.noise_type == "scalar":
            return (0.4 * y * b[:, 0]).unsqueeze(-1)
        return ((1 + t) * b).expand(len(y), 3, 2) if self.noise_type == "additive" else y.cos().unsqueeze(-1) * b


class Moved(Equation):
    """The motion itself, whose Euler steps add up to its increments whatever they are."""

    b = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.5, 0.2]], dtype=F64)

    def f(self, t, y):
        return torch.zeros_like(y)

    def g(self, t, y):
        self.calls += 1
        return self.b.expand(len(y), 3, 2)


def start(batch=4):
    return torch.linspace(-1.0, 1.0, 3 * batch, dtype=F64).reshape(batch, 3)


def interval(noise, areas="foster", **options):
    return ours.BrownianInterval(0.0, 1.0, (4, CHANNELS[noise]), F64, levy_area_approximation=areas, **options)


class AsTheirs(theirs.BaseBrownian):
    """One of our motions as torchsde asks it."""

    def __init__(self, motion):
        self.motion, self.shape, self.dtype, self.device = motion, motion.shape, motion.dtype, motion.device
        self.levy_area_approximation = motion.levy_area_approximation

    dtype = device = shape = levy_area_approximation = None

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        return self.motion(ta, tb, return_U, return_A)

    def __repr__(self):
        return "AsTheirs()"


METHODS = [
    *(("ito", "euler", noise) for noise in CHANNELS),
    *(("ito", "milstein", noise) for noise in ("diagonal", "scalar", "additive")),
    ("ito", "srk", "additive"),
    *(("stratonovich", m, noise) for m in ("heun", "midpoint", "euler_heun") for noise in ("diagonal", "general")),
    ("stratonovich", "milstein", "diagonal"),
    *(("stratonovich", "reversible_heun", noise) for noise in CHANNELS),
    *(("stratonovich", "log_ode", noise) for noise in ("diagonal", "general")),
]  # fmt: skip


@pytest.mark.parametrize(("calculus", "method", "noise"), METHODS)
def test_the_same_scheme_takes_the_same_path_to_the_same_states(calculus, method, noise):
    sde, bm = Equation(noise, calculus), interval(noise, entropy=3)
    with torch.no_grad():
        mine = ours.sdeint(sde, start(), TIMES, bm, method, dt=1 / 8)
        other = theirs.sdeint(sde, start(), TIMES, AsTheirs(bm), method, dt=1 / 8)
    assert mine.shape == (4, 4, 3)
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_a_call_is_one_of_solve_with_the_same_seed():
    sde, grid = Equation("diagonal"), torch.linspace(0, 1, 9, dtype=F64)
    bm = interval("diagonal", entropy=11)
    ys = ours.sdeint(sde, start(), TIMES, bm, "srk", dt=0.125)
    same = sds.solve(FromTorchSDE(sde), start(), grid=grid, solver=sds.SRIW1(), seed=11, save_at=TIMES)
    assert torch.equal(ys, same.xs)
    assert torch.equal(ys[0], start())
    torch.manual_seed(5)
    first = ours.sdeint(sde, start(), TIMES, dt=0.125)
    torch.manual_seed(5)
    assert torch.equal(first, ours.sdeint(sde, start(), TIMES, dt=0.125))
    assert not torch.equal(first, ours.sdeint(sde, start(), TIMES, dt=0.125))


def test_states_at_times_between_steps_are_ends_of_steps():
    """torchsde takes the chord, whose variance is too small: 3/4 of a half-way motion's at the middle of a step."""
    bm = ours.BrownianInterval(0.0, 1.0, (20_000, 1), F64, entropy=1)

    class Motion(ours.SDEIto):
        def f(self, t, y):
            return torch.zeros_like(y)

        def g(self, t, y):
            return torch.ones_like(y)

    ys = ours.sdeint(Motion("diagonal"), torch.zeros(20_000, 1, dtype=F64), [0.0, 0.5, 1.0], bm, "euler", dt=1.0)
    assert abs(float(ys[1].var()) - 0.5) < 5 * 0.5 * math.sqrt(2 / 20_000)
    torch.testing.assert_close(ys[1], bm(0.0, 0.5))
    torch.testing.assert_close(ys[2] - ys[1], bm(0.5, 1.0))


@pytest.mark.parametrize("method", ["milstein", "reversible_heun"])
def test_both_adjoints_give_the_gradients_of_the_scheme(method, monkeypatch):
    calculus = "ito" if method == "milstein" else "stratonovich"
    found = []
    for function, budget in ((ours.sdeint, 0), (ours.sdeint_adjoint, 1 << 30), (ours.sdeint_adjoint, 0)):
        monkeypatch.setattr(importlib.import_module("sdesolve.compat.torchsde.sdeint"), "_BUDGET", budget)
        sde, y0 = Equation("diagonal", calculus), start().requires_grad_()
        ys = function(sde, y0, TIMES, interval("diagonal", entropy=2), method, dt=1 / 16)
        (ys * torch.arange(ys.numel(), dtype=F64).reshape(ys.shape).cos()).sum().backward()
        found.append((ys.detach(), y0.grad, sde.a.grad))
    for plain, kept, taken_again in zip(*found, strict=True):
        torch.testing.assert_close(kept, plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(taken_again, plain, rtol=1e-9, atol=1e-9)
    sde, bm = Equation("diagonal", calculus), interval("diagonal", entropy=2)
    sde.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda y: ours.sdeint(sde, y, TIMES, bm, method, dt=1 / 4)[-1], start().requires_grad_()
    )


@pytest.mark.parametrize("noise", list(CHANNELS))
def test_divergences_are_torchsdes_and_those_of_solve(noise):
    sde, bm = Equation(noise), interval(noise, areas="none", entropy=4)
    if noise == "diagonal":
        bm = ours.BrownianInterval(0.0, 1.0, (4, 4), F64, entropy=4)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        ys, kl = ours.sdeint(sde, start(), TIMES, bm, "euler", dt=1 / 8, logqp=True)
        _, other = theirs.sdeint(sde, start(), TIMES, AsTheirs(bm), "euler", dt=1 / 8, logqp=True)
    assert any("infinite" in str(w.message) for w in caught) == (noise != "diagonal")
    assert ys.shape == (4, 4, 3)
    assert kl.shape == (3, 4)
    torch.testing.assert_close(kl, other, rtol=1e-9, atol=1e-9)
    if noise == "diagonal":
        ys, kl = ours.sdeint(sde, start(), TIMES, None, "euler", dt=1 / 8, logqp=True)
        assert bool((kl > 0).all())


def test_a_run_goes_on_with_what_it_carried_and_can_be_turned_round():
    sde, bm = Equation("general", "stratonovich"), interval("general", entropy=6, dt=1 / 8)
    options = {"method": "reversible_heun", "dt": 1 / 8, "bm": bm}
    whole, (f, g, z) = ours.sdeint(sde, start(), TIMES, extra=True, **options)
    assert g.shape == (4, 3, 2)
    half, carried = ours.sdeint(sde, start(), TIMES[:3], extra=True, **options)
    rest = ours.sdeint(sde, half[-1], TIMES[2:], extra_solver_state=carried, **options)
    torch.testing.assert_close(rest[-1], whole[-1])

    class Minus:
        noise_type, sde_type = "general", "stratonovich"
        f = staticmethod(lambda t, y: -sde.f(-t, y))
        g = staticmethod(lambda t, y: -sde.g(-t, y))

    options["bm"] = ours.ReverseBrownian(bm)
    back = ours.sdeint(Minus, whole[-1], -TIMES.flip(0), extra_solver_state=(-f, -g, z), **options)
    torch.testing.assert_close(back.flip(0), whole)


def test_adaptive_runs_share_steps_converge_and_say_what_they_replace():
    sde, bm = Equation("diagonal").requires_grad_(False), interval("diagonal", entropy=9)
    adaptive = [ours.sdeint(sde, start(), TIMES, bm, "milstein", adaptive=True, rtol=r, atol=r) for r in (0.1, 1e-3)]
    fine = ours.sdeint(sde, start(), TIMES, interval("diagonal", entropy=9, halfway_tree=True, tol=1e-9), dt=1 / 64)
    errors = [float((ys - fine).abs().max()) for ys in adaptive]
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.01
    with pytest.warns(UserWarning, match="Milstein is taken"):
        ours.sdeint(sde, start(), TIMES, method="euler", adaptive=True, rtol=0.3, atol=0.3)
    with pytest.warns(UserWarning, match="Heun on"):
        ours.sdeint(Equation("general"), start(), TIMES, adaptive=True, method="euler", rtol=0.3, atol=0.3)
    with pytest.raises(ValueError, match="take 'heun'"):
        ours.sdeint(Equation("diagonal", "stratonovich"), start(), TIMES, method="reversible_heun", adaptive=True)


class Ways(torch.nn.Module):
    noise_type, sde_type = "general", "ito"

    def __init__(self, **methods):
        super().__init__()
        vars(self).update(methods)


def test_functions_by_other_names_together_and_as_products():
    sde, v = Equation("general"), interval("general", entropy=1)
    f, g = sde.f, sde.g

    def g_prod(t, y, v):
        return (g(t, y) @ v.unsqueeze(-1)).squeeze(-1)

    expected = ours.sdeint(sde, start(), TIMES, v, "euler", dt=0.125)
    for methods, names in (
        ({"f_and_g": lambda t, y: (f(t, y), g(t, y))}, None),
        ({"f": f, "g_prod": g_prod}, None),
        ({"f_and_g_prod": lambda t, y, v: (f(t, y), g_prod(t, y, v))}, None),
        ({"drift": f, "noise": g}, {"drift": "drift", "diffusion": "noise"}),
    ):
        made = ours.sdeint(Ways(**methods), start(), TIMES, v, "euler", dt=0.125, names=names)
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_a_motion_is_the_same_in_any_order_and_its_pieces_fit():
    times = [0.03, 0.41, 0.42, 0.9]
    made = []
    for order in (1, -1):
        bm = interval("general", entropy=8, halfway_tree=True, tol=1e-6)
        pairs = [(a, b) for a in times for b in times if a < b][::order]
        made.append({pair: bm(*pair, return_U=True, return_A=True) for pair in pairs})
    for pair, parts in made[0].items():
        assert all(map(torch.equal, parts, made[1][pair]))
    (W, U, A), (W1, U1, _), (W2, U2, _) = (made[0][p] for p in ((0.03, 0.9), (0.03, 0.42), (0.42, 0.9)))
    torch.testing.assert_close(W1 + W2, W)
    torch.testing.assert_close(U1 + U2 + (0.9 - 0.42) * W1, U)
    torch.testing.assert_close(A, -A.mT)
    assert A.shape == (4, 2, 2)


def test_a_motion_of_given_increments_has_the_law_of_a_bridge():
    n = 20_000
    W, H = torch.full((n, 1), 1.5, dtype=F64), torch.full((n, 1), -0.4, dtype=F64)
    bm = ours.BrownianInterval(1.0, 3.0, W=W, H=H, entropy=0, levy_area_approximation="space-time")
    torch.testing.assert_close(bm(1.0, 3.0, return_U=True), (W, 2 * (W / 2 + H)))
    half, mean_U = bm(1.0, 2.0, return_U=True)
    # Given W and H over a length h the middle has the mean W/2 + 3 H/2 and the variance h/16; U = h/2 (W/2 + H).
    error = 5 * math.sqrt(2 / 16 / n)
    assert abs(float(half.mean()) - (0.75 - 0.6)) < error
    assert abs(float(half.var()) - 2 / 16) < 5 * 2 / 16 * math.sqrt(2 / n)
    assert abs(float((mean_U - 0.5 * half).mean()) - (-0.4 / 4)) < 5 * float((mean_U - 0.5 * half).std()) / math.sqrt(n)
    w0, w1 = torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)
    tree = ours.BrownianTree(0.0, w0, 1.0, w1, entropy=3)
    torch.testing.assert_close(tree(1.0), w1)
    assert abs(float(tree(0.25).mean()) - 0.25) < 5 * math.sqrt(3 / 16 / n)
    path = ours.BrownianPath(0.0, torch.ones(4, 2))
    torch.testing.assert_close(path(7.5), 1.0 + path(0.0, 2.25) + path(2.25, 7.5))


def test_a_motion_that_has_been_used_keeps_its_path():
    sde, bm = Equation("additive"), interval("additive", entropy=5)
    first = bm(0.0, 0.25), ours.sdeint(sde, start(), TIMES, bm, "euler", dt=1 / 8)
    again = interval("additive", entropy=5)
    second = again(0.0, 0.25), ours.sdeint(sde, start(), TIMES, again, "euler", dt=1 / 8)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(bm(0.25, 0.5) + bm(0.5, 0.75), bm(0.25, 0.75))
    moved = Moved("additive")
    for dt in (1 / 4, 1 / 8, 0.1, 1 / 64):
        ys = ours.sdeint(moved, start(), TIMES, bm, "euler", dt=dt)
        for t, y in zip(TIMES[1:].tolist(), ys[1:], strict=True):
            torch.testing.assert_close(y, start() + bm(0.0, t) @ moved.b.mT)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "runge"}, "method must be one of"),
        ({"method": "heun"}, "stratonovich"),
        ({"method": "milstein", "noise": "general"}, "milstein is for"),
        ({"method": "srk", "bm": ours.BrownianInterval(0.0, 1.0, (4, 3), F64)}, "levy_area_approximation"),
        ({"bm": ours.BrownianInterval(0.0, 1.0, (5, 3), F64)}, "shape"),
        ({"bm": ours.BrownianInterval(0.0, 0.5, (4, 3), F64), "method": "euler"}, "known on"),
        ({"ts": [0.0, 0.5, 0.5]}, "increasing"),
        ({"y0": torch.ones(3)}, "y0 must"),
        ({"dt": -0.1}, "dt must be positive"),
        ({"names": {"drift": "nothing"}}, "lacks f"),
        ({"rtol": torch.tensor(0.1, requires_grad=True)}, "must not require"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do(change, match):
    given = {"y0": start(), "ts": TIMES, "dt": 0.125} | change
    sde = Equation(given.pop("noise", "diagonal"))
    with pytest.raises(ValueError, match=match):
        ours.sdeint(sde, **given)


def test_other_arguments_are_looked_at():
    with pytest.warns(UserWarning, match="unexpected arguments: bogus"):
        ours.sdeint(Equation("diagonal"), start(), TIMES, dt=0.25, bogus=1)
    with pytest.raises(ValueError, match="adjoint_params"):
        ours.sdeint_adjoint(Ways.__new__(type("Bare", (), {})), start(), TIMES)
    for bad in ({"tol": -1.0}, {"t0": 2.0}, {"size": None}, {"halfway_tree": True}, {"levy_area_approximation": "x"}):
        with pytest.raises(ValueError, match=r"must|give|one of"):
            ours.BrownianInterval(**({"size": (2, 2)} | bad))
    with pytest.raises(ValueError, match="has no U"):
        ours.BrownianInterval(size=(2, 2))(0.0, 0.5, return_U=True)
    with pytest.warns(UserWarning, match="outside"):
        assert torch.equal(ours.BrownianInterval(size=(2, 2))(2.0, 3.0), torch.zeros(2, 2))


class Coupled(Equation):
    """Noise that is declared diagonal, and mixes components."""

    def g(self, t, y):
        self.calls += 1
        return 0.5 + 0.2 * y.roll(1, 1).sin()


@pytest.mark.parametrize("method", ["milstein", "srk"])
def test_diagonal_noise_that_mixes_components_runs_as_there_with_a_warning(method):
    motion = interval("diagonal", entropy=5)

    def ends(n, how):
        return ours.sdeint(Coupled("diagonal"), start(), TIMES, bm=motion, method=how, dt=1.0 / n)[-1].detach()

    with pytest.warns(UserWarning, match=f"depends on another component than its own, and {method} has no terms"):
        few, many = (ends(n, method) for n in (8, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = ends(1024, "euler")
        ours.sdeint(Equation("diagonal"), start(), TIMES, method=method, dt=0.25)
    assert (many - fine).abs().max() < 0.5 * (few - fine).abs().max()
    assert (many - fine).abs().max() < 0.05  # strong order 1/2: about .2 sqrt(1/256) of noise between components
    with pytest.raises(ValueError, match="needs every diffusion component"):
        sds.solve(FromTorchSDE(Coupled("diagonal")), start(), 0.0, 1.0, 8, solver=sds.SRIW1(), seed=0)
