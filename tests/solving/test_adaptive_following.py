"""What follows, stops, changes and shows paths whose steps are their own: closed forms, laws, bits, what is refused."""

import math

import pytest
import torch

import sdesolve as sds

F64 = torch.float64
DECAY = sds.ODE(lambda x, t: -x)
NOISY = sds.SDE(lambda x, t: -x, lambda x, t: torch.ones_like(x), noise="additive", calculus="stratonovich")
PAIRS = [
    sds.DormandPrince(1e-8, 1e-10),
    sds.Tsit5(1e-8, 1e-10),
    sds.Rodas4(1e-8, 1e-10),
    sds.Adaptive(sds.RK4(), 1e-8, 1e-10),
]
NESTED = sds.Adaptive(sds.SPaRK(), 5e-2, 1e-2, first_steps=2)


def first(x, t):
    return x[:, 0]


def shown(x, t, c):
    return torch.stack([x[:, 0], t, c], 1)


@pytest.mark.parametrize("solver", PAIRS, ids=lambda s: type(s).__name__)
def test_odes_stop_on_the_curve_of_the_solver_carry_and_change(solver):
    x0 = torch.tensor([[1.0], [2.0], [0.7], [9.0]], dtype=F64)
    falls = sds.Crossing(lambda x, t: x[:, 0] - 0.5, -1)
    sol = sds.solve(
        DECAY, x0, 0.0, 2.0, solver=solver, until=[falls], carry=sds.Integral(first), save_at=[0.0, 0.5, 1.0, 2.0],
        observable=shown,
    )  # fmt: skip
    when = (x0[:, 0] / 0.5).log()
    assert sol.stopped.tolist() == [True, True, True, False]
    assert sol.boundary.tolist() == [0, 0, 0, -1]
    torch.testing.assert_close(sol.stop_time[:3], when[:3], rtol=0, atol=2e-7)
    assert sol.stop_time[3] == math.inf
    t = torch.minimum(when, sol.ts[:, None])
    x = x0[:, 0] * (-t).exp()
    torch.testing.assert_close(sol.xs, torch.stack([x, t, x0[:, 0] - x], 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(sol.xs[-1, :, 0], sol.x1[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(sol.carry, sol.xs[-1, :, 2], rtol=0, atol=0)
    assert bool((sol.stats.accepted[0] < sol.stats.accepted[3]).all())
    at = [([0.5, 1.5], lambda x, t: x + t[:, None] if t.ndim else x + t), (1.5, lambda x: 2 * x)]
    sol = sds.solve(DECAY, x0, 0.0, 2.0, solver=solver, at=at, save_at=[0.5, 1.0, 1.5], observable=lambda x, t: x * t)
    a = x0 * math.exp(-0.5) + 0.5
    b = 2 * (a * math.exp(-1.0) + 1.5)
    for got, wanted in ((sol.xs[0] / 0.5, a), (sol.xs[1], a * math.exp(-0.5)), (sol.xs[2] / 1.5, b)):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(sol.x1, b * math.exp(-0.5), rtol=1e-6, atol=0)


def test_an_ode_that_turns_back_within_a_step_has_crossed_and_backwards_runs_stop_too():
    fall = sds.ODE(lambda x, t: torch.stack([x[:, 1], -torch.ones_like(x[:, 0])], 1))  # one step is exact
    x0 = torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=F64)
    until = sds.Crossing(lambda x, t: x[:, 0] - 0.46, 1)
    sol = sds.solve(fall, x0, 0.0, 2.0, solver=sds.DormandPrince(1e-6), until=until)
    assert sol.stopped.tolist() == [True, False]
    torch.testing.assert_close(sol.stop_time[0], torch.tensor(1 - 0.08**0.5, dtype=F64), rtol=1e-9, atol=0)
    back = sds.solve(DECAY, x0[:, 1:], 3.0, 0.0, solver=PAIRS[0], until=sds.Crossing(lambda x, t: x[:, 0] - 2, 1))
    torch.testing.assert_close(back.stop_time, 3.0 - (2 / x0[:, 1]).log(), rtol=1e-7, atol=0)
    up = sds.solve(
        sds.ODE(lambda x, t: -torch.ones_like(x)), x0[:, 1:], 0.0, 2.0, solver=PAIRS[0], until=sds.Reflection(first)
    )
    assert bool((up.x1 >= 0).all())
    assert bool((up.x1 < 1e-6).all())


@pytest.mark.slow
def test_paths_of_sdes_are_functions_of_their_numbers_and_stop_in_law():
    x0, top = torch.zeros(1000, 1, dtype=F64), 1.0
    until = sds.Crossing(lambda x, t: x[:, 0] - top, 1)
    kicks = sds.Carry(0.0, lambda c, x, y, t, u, z: c + (u - t).abs().sqrt() * z[:, 0], normals=1)
    options = {
        "solver": NESTED, "until": until, "save_at": [0.3, 1.0, 2.0], "at": [(0.9, lambda x: 0.5 * x)],
        "carry": {"time": sds.Integral(lambda x, t: torch.ones_like(x[:, 0])), "kicks": kicks},
        "observable": lambda x, t, c: torch.stack([x[:, 0], t, c["time"], c["kicks"]], 1),
    }  # fmt: skip
    whole = sds.solve(NOISY, x0, 0.0, 2.0, seed=3, **options)
    part = sds.solve(NOISY, x0[:300], 0.0, 2.0, noise=sds.BrownianPath(3, first_path=400), **options)
    rows = slice(400, 700)
    pairs = [(s.x1, s.stop_time, s.carry["kicks"]) for s in (part, whole)]
    for got, wanted in zip(*pairs, strict=True):
        assert torch.equal(got, wanted[rows])
    assert torch.equal(part.xs, whole.xs[:, rows])
    ends = torch.where(whole.stopped, whole.stop_time, 2.0)
    torch.testing.assert_close(whole.xs[-1, :, 1:3], ends[:, None].expand(-1, 2), rtol=0, atol=1e-12)
    kicked = whole.carry["kicks"] / ends.sqrt()
    assert abs(float(kicked.mean())) < 4 / 1000**0.5
    assert abs(float(kicked.var()) - 1) < 4 * (2 / 1000) ** 0.5
    early = whole.stop_time <= 1.0
    assert torch.equal(whole.xs[1, early], whole.xs[2, early])
    assert bool(early.any())
    at = [([0.9, 1.0], lambda x: 0.0 * x + 7)]
    changed = sds.solve(NOISY, x0[:9], 0.0, 1.0, solver=NESTED, seed=3, at=at, save_at=[0.9])
    assert bool((changed.xs == 7).all())
    assert bool((changed.x1 == 7).all())
    plain = {**options, "at": None, "carry": None, "observable": None}
    walk, fixed = sds.solve(NOISY, x0, 0.0, 2.0, seed=5, **plain), {**plain, "solver": sds.SPaRK(), "save_at": None}
    grid = sds.solve(NOISY, x0, 0.0, 2.0, 200, seed=6, **fixed)
    for a, b in ((walk.stopped.double(), grid.stopped.double()), (walk.x1[:, 0], grid.x1[:, 0])):
        assert abs(float(a.mean() - b.mean())) < 4 * float((a.var() + b.var()) / 1000) ** 0.5


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_observables_and_moments_change_no_path(backend):
    x0 = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    for equation, solver in ((NOISY, NESTED), (DECAY, sds.DormandPrince(1e-6))):
        options = {"solver": solver, "seed": 3, "save_at": [0.0, 0.7, 2.0], "backend": backend}
        plain = sds.solve(equation, x0, 0.0, 2.0, **options)
        timed = sds.solve(equation, x0, 0.0, 2.0, observable=lambda x, t: torch.cat([x, t[:, None]], 1), **options)
        moments = sds.solve(equation, x0, 0.0, 2.0, observable=lambda x: x.square(), reduce="moments", **options)
        sums = sds.solve(equation, x0, 0.0, 2.0, observable=lambda x: x.square(), reduce="sums", **options)
        assert {sol.stats.execution for sol in (plain, timed, moments, sums)} == {backend}
        assert torch.equal(timed.xs[..., :1], plain.xs)
        assert torch.equal(timed.x1, plain.x1)
        assert torch.equal(timed.xs[..., 1], plain.ts[:, None].expand(-1, 40))
        torch.testing.assert_close(moments.mean, plain.xs.square().mean(1), rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.variance, plain.xs.square().var(1), rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(sums.sums.mean, plain.xs.square().mean(1), rtol=1e-14, atol=0)


def test_gradients_flow_through_what_is_carried_and_what_does_not_fuse_says_so():
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    ode, x0 = sds.ODE(lambda x, t: -rate * x), torch.ones(2, 1, dtype=F64)
    sol = sds.solve(ode, x0, 0.0, 1.0, solver=PAIRS[0], carry=sds.Integral(first), at=[(0.5, lambda x: rate * x)])
    sol.carry.sum().backward()
    e, h = math.exp(-0.5), 1e-6

    def area(r):
        return 2 * (1 - math.exp(-0.5 * r)) / r + 2 * r * math.exp(-0.5 * r) * (1 - math.exp(-0.5 * r)) / r

    assert float(sol.carry.detach().sum()) == pytest.approx(2 * (1 - e * e), rel=1e-7)
    assert float(rate.grad) == pytest.approx((area(1 + h) - area(1 - h)) / (2 * h), rel=1e-5)
    assert (
        "follow steps that each path chooses"
        in sds.solve(NOISY, x0, 0.0, 1.0, solver=NESTED, seed=1, carry=sds.Integral(first)).stats.reason
    )
    with pytest.raises(ValueError, match="cannot be fused: carry=, until= and at="):
        sds.solve(NOISY, x0, 0.0, 1.0, solver=NESTED, seed=1, carry=sds.Integral(first), backend="fused")
    bad = sds.Crossing(lambda x, t: (x[:, 0] - 0.5).sqrt(), -1)
    with pytest.raises(sds.DivergenceError, match=r"nan for path 0 in step \d+ of its own, which ends at t = 0.7"):
        sds.solve(DECAY, x0, 0.0, 2.0, solver=sds.DormandPrince(1e-3), until=bad, at=[(0.7, lambda x: 0.1 * x)])
    for wrong, why in ((3.0, r"outside"), (math.nan, "at")):
        with pytest.raises(ValueError, match=why):
            sds.solve(DECAY, x0, 0.0, 2.0, solver=PAIRS[0], at=[(wrong, lambda x: x)])
    shared = sds.Adaptive(sds.SPaRK(), 1e-2, shared=True)
    with pytest.raises(ValueError, match="leave shared= out"):
        sds.solve(NOISY, x0, 0.0, 1.0, solver=shared, seed=1, until=sds.Crossing(lambda x, t: x[:, 0] - 9))


def test_shared_steps_carry_and_change_as_steps_of_one_path_do():
    options = {
        "save_at": [0.4, 1.0], "at": [(0.4, lambda x: x + 3)], "seed": 3,
        "carry": {
            "time": sds.Integral(lambda x, t: torch.ones_like(x[:, 0])),
            "moved": sds.Carry(0.0, lambda c, x, y, t, u: c + (y - x)[:, 0]),
        },
        "observable": lambda x, t, c: torch.stack([x[:, 0], t, c["time"], c["moved"]], 1),
    }  # fmt: skip
    own, shared = NESTED, sds.Adaptive(sds.SPaRK(), 5e-2, 1e-2, first_steps=2, shared=True)
    x0 = torch.linspace(-1, 1, 8, dtype=F64)[:, None]
    one, alone = (sds.solve(NOISY, x0[:1], 0.0, 1.0, solver=s, **options) for s in (own, shared))
    assert torch.equal(one.xs, alone.xs)
    assert torch.equal(one.x1, alone.x1)
    all_ = sds.solve(NOISY, x0, 0.0, 1.0, solver=shared, **options)
    assert len(set(all_.stats.accepted.tolist())) == 1
    torch.testing.assert_close(all_.xs[..., 2], all_.ts[:, None].expand(-1, 8), rtol=0, atol=1e-12)
    # the map's 3 is no step: what the steps moved is the rest
    torch.testing.assert_close(all_.carry["moved"], (all_.x1 - x0)[:, 0] - 3, rtol=0, atol=1e-12)
