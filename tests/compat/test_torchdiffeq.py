"""torchdiffeq by its own names: values, gradients and events against torchdiffeq itself, and what is refused."""

import pytest
import torch
import torchdiffeq as theirs

from sdesolve.compat import torchdiffeq as ours

F64 = torch.float64
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri5", "bosh3", "fehlberg2", "adaptive_heun", "tsit5")
TIMES = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=F64)


class Equation(torch.nn.Module):
    """Couples a tuple of two shapes, with a parameter, time, and a count that keeps it from being compiled."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=F64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        u, v = y
        return torch.tanh(u @ self.a) + t * v, -v * u.square().mean()


def start():
    return torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=F64, requires_grad=True), torch.tensor(
        0.4, dtype=F64, requires_grad=True
    )


def run(package, times, adjoint=False, **others):
    f, y0 = Equation(), start()
    u, v = (package.odeint_adjoint if adjoint else package.odeint)(f, y0, times, **others)
    return u, v, torch.autograd.grad(u.square().sum() + v.sum(), (*y0, f.a))


def same(one, other, tolerance=1e-12):
    for a, b in zip((*one[:2], *one[2]), (*other[:2], *other[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_are_theirs(method, backwards):
    times = TIMES.flip(0) if backwards else TIMES
    for options in (None, {"step_size": 0.125}):
        given = {"method": method, "options": options}
        found = run(ours, times, **given)
        same(found, run(theirs, times, **given))
        again = run(ours, times, adjoint=True, **given)
        assert all(torch.equal(a, b) for a, b in zip((*found[:2], *found[2]), (*again[:2], *again[2]), strict=True))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps_meet_their_tolerance(method):
    exact = run(theirs, TIMES, rtol=1e-10, atol=1e-11)
    tolerance = {"fehlberg2": 1e-6, "adaptive_heun": 1e-5}.get(method, 1e-7)
    for adjoint in (False, True):
        found = run(ours, TIMES, adjoint, method=method, rtol=tolerance, atol=tolerance)
        same(found, exact, (1000 if method == "fehlberg2" else 100) * tolerance)
        assert max(float((a - b).detach().abs().max()) for a, b in zip(found[:2], exact[:2], strict=True)) > 0.0


def test_states_of_any_kind():
    turn = lambda t, z: 1j * z * t  # noqa: E731
    z0 = torch.tensor([1.0, 0.5j], dtype=torch.complex128, requires_grad=True)
    ours_z, theirs_z = (package.odeint(turn, z0, TIMES.flip(0)) for package in (ours, theirs))
    torch.testing.assert_close(ours_z, theirs_z, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(z[-1].real.sum(), z0)[0] for z in (ours_z, theirs_z)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    single = ours.odeint(lambda t, y: -y, torch.tensor(1.0), torch.tensor([0.0, 1.0]))  # tolerances below float32
    assert single.shape == (2,)
    assert abs(float(single[1]) - 0.36788) < 1e-4
    assert ours.odeint(lambda t, y: -y, single[1], torch.tensor([0.0])).shape == (1,)


def test_gradients_of_times():
    times = TIMES.clone().requires_grad_()
    y0 = torch.tensor([0.8, -0.3], dtype=F64, requires_grad=True)
    function = lambda y, t: ours.odeint(lambda s, x: x.sin() + s * x, y, t, rtol=1e-9, atol=1e-9)  # noqa: E731
    assert torch.autograd.gradcheck(function, (y0, times), rtol=1e-4, atol=1e-5)


def test_grids_and_times_where_steps_end():
    grid = {"method": "euler", "options": {"grid_constructor": lambda f, y0, t: torch.linspace(0, 1, 11, dtype=F64)}}
    found, wanted = (p.odeint(lambda t, y: y * t, torch.ones(2, dtype=F64), TIMES, **grid) for p in (ours, theirs))
    torch.testing.assert_close(found, wanted)

    seen = []

    def jumps(t, y):
        seen.append(float(t))
        return -0.5 * y if t < 0.5 else y**2

    y0 = torch.tensor([1.0, 2.0], dtype=F64)
    exact = 1.0 / (1.0 / (y0 * torch.tensor(-0.25, dtype=F64).exp()) - 0.5)
    options = {"jump_t": torch.tensor([0.5]), "step_t": torch.tensor([0.3, 2.0], dtype=F64)}
    y = ours.odeint(jumps, y0, TIMES[[0, -1]], rtol=1e-9, atol=1e-9, options=options)
    torch.testing.assert_close(y[-1], exact, rtol=1e-6, atol=0.0)
    assert {0.3, 0.5} <= set(seen)


@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.2})])
def test_events_and_their_gradients(method, options):
    """A ball that falls: ``h + v s - a s^2 / 2 = 0``, found in the fourth window of time, or beyond 64 fixed steps."""
    a, h, v, t0 = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.1, 2.0, 0.5, 0.3))

    def falls(t, y):
        return y[1], -a.expand_as(y[1])

    events = {"event_fn": lambda t, y: torch.stack([y[0].min(), 99.0 - t]), "method": method, "options": options}
    if options is not None:
        events |= {"odeint_interface": ours.odeint_adjoint, "adjoint_params": ()}
    when, (heights, speeds) = ours.odeint_event(falls, (h[None], v[None]), t0, rtol=1e-9, atol=1e-9, **events)
    near = 1e-8 if options is None else 2e-4  # of fixed steps, a point of the chord
    exact = t0 + (v + (v * v + 2 * a * h).sqrt()) / a
    assert heights.shape == (2, 1)
    assert float(heights[-1].detach().abs()) < 1e-8
    torch.testing.assert_close(when, exact, rtol=near, atol=0.0)
    torch.testing.assert_close(speeds[-1, 0], -(v * v + 2 * a * h).sqrt(), rtol=near, atol=0.0)
    for found, wanted in ((when, exact), (speeds[-1, 0], -(v * v + 2 * a * h).sqrt())):
        args = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        for got, right in zip(
            torch.autograd.grad(found, (a, h, v, t0), **args),
            torch.autograd.grad(wanted, (a, h, v, t0), **args),
            strict=True,
        ):
            torch.testing.assert_close(got, right, rtol=10 * near, atol=1e-7)


def test_events_backwards():
    levels = lambda t, y: torch.stack([y - 5.0, y - 3.0])  # noqa: E731
    y0, t0 = torch.tensor(1.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    when, y = ours.odeint_event(lambda t, y: -y, y0, t0, event_fn=levels, reverse_time=True)
    torch.testing.assert_close(when, 1.0 - torch.tensor(3.0, dtype=F64).log())
    torch.testing.assert_close(y, torch.tensor([1.0, 3.0], dtype=F64))


def test_what_is_refused():
    f, y0 = lambda t, y: -y, torch.ones(2)
    cases = [
        ({"method": "dopri8"}, "take 'dopri5' or 'tsit5'"),
        ({"method": "radauIIA5"}, r"Rodas4\(\)"),
        ({"method": "nothing"}, "method must be one of"),
        ({"options": {"norm": max}}, "options of dopri5 are jump_t, step_t, max_num_steps"),
        ({"method": "rk4", "options": {"perturb": True}}, "leave out .?perturb"),
        ({"method": "rk4", "options": {"step_size": -1.0}}, "positive"),
        ({"rtol": torch.ones(2)}, "one number"),
        ({"event_fn": lambda t, y: y[0] - 9}, "two times"),
    ]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            ours.odeint(f, y0, torch.tensor([0.0, 1.0, 2.0]), **given)
    with pytest.raises(ValueError, match="increase or decrease"):
        ours.odeint(f, y0, torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="shapes of y0"):
        ours.odeint(lambda t, y: y[:1], y0, torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="y0"):
        ours.odeint(f, [1.0], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"adjoint_params=\(\)"):
        ours.odeint_adjoint(f, y0, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="step_size"):
        ours.odeint(f, y0, torch.tensor([0.0, 1.0]), method="rk4", event_fn=lambda t, y: y[0] - 0.5)
