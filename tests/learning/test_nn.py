import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdesolve.nn import EMA, MLP, FourierFeatures


def test_fourier_features_are_cosines_and_sines_of_the_phases():
    phi = FourierFeatures(torch.tensor([1.0, 10.0]))
    t = torch.tensor(0.3)
    expected = math.sqrt(2) * torch.tensor([math.cos(0.3), math.cos(3.0), math.sin(0.3), math.sin(3.0)])
    torch.testing.assert_close(phi(t), expected)
    assert phi.size == 4


@pytest.mark.parametrize("phi", [FourierFeatures.log_spaced(8, 0.5, 64.0), FourierFeatures.gaussian(8, 2.0)])
def test_fourier_features_of_a_time_do_not_depend_on_its_shape(phi):
    t = torch.rand(5)
    assert phi(t).shape == (5, 16)
    assert all(torch.equal(phi(t)[k], phi(t[k])) for k in range(5))
    assert phi(t.double()).dtype == torch.float64
    assert set(phi.state_dict()) == {"frequencies"}
    assert not list(phi.parameters())


def test_log_spaced_frequencies_have_equal_ratios_and_exact_ends():
    w = FourierFeatures.log_spaced(5, 0.5, 8.0).frequencies
    torch.testing.assert_close(w, torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]))


def test_gaussian_frequencies_repeat_with_their_generator():
    draws = [FourierFeatures.gaussian(64, 3.0, torch.Generator().manual_seed(1)).frequencies for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FourierFeatures(torch.ones(2, 2)), "finite vector"),
        (lambda: FourierFeatures(torch.ones(0)), "at least one entry"),
        (lambda: FourierFeatures.log_spaced(4, 2.0, 1.0), "0 < low < high"),
        (lambda: FourierFeatures.log_spaced(1, 1.0, 2.0), "count must be at least 2"),
        (lambda: FourierFeatures.gaussian(4, 0.0), "scale must be positive"),
        (lambda: MLP(0), "each entry of shape must be at least 1, got 0"),
        (lambda: MLP(2, width=0), "width must be at least 1"),
        (lambda: MLP(2, dropout=1.0), r"dropout is a share in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), batch=st.integers(0, 5))
def test_mlp_takes_states_of_any_shape_and_starts_at_zero(shape, batch):
    net = MLP(shape, width=8, depth=2)
    x = torch.randn(batch, *shape)
    for t in (torch.tensor(0.5), torch.full((batch,), 0.5)):
        assert torch.equal(net(x, t), torch.zeros_like(x))


def test_mlp_sees_state_and_time_and_treats_samples_apart():
    torch.manual_seed(0)
    net = MLP((2, 3), width=16, depth=2).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t = torch.randn(5, 2, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    whole = net(x, t)
    torch.testing.assert_close(net(x[1:3], t[1:3]), whole[1:3])
    assert (net(x + 1, t) - whole).abs().amin() > 1e-6
    assert (net(x, t + 0.1) - whole).abs().amin() > 1e-6


def test_the_last_layer_of_an_mlp_is_modulated_by_time():
    torch.manual_seed(0)
    net, x = MLP(2, width=8, depth=0), torch.randn(5, 2)  # without blocks nothing else sees the time
    torch.nn.init.normal_(net.outlet[-1].weight)
    assert (net(x, torch.tensor(0.3)) - net(x, torch.tensor(0.4))).abs().amin() > 1e-6
    with torch.no_grad():
        net.modulation.weight.zero_()
        net.modulation.bias.copy_(torch.tensor([-1.0] * 8 + [0.0] * 8))  # factor 0, shift 0
    torch.testing.assert_close(net(x, torch.tensor(0.3)), net.outlet[-1].bias.expand(5, 2))


def test_mlp_initialisation_follows_the_global_seed():
    def make():
        torch.manual_seed(7)
        return MLP(3, width=8).state_dict()

    first, second = make(), make()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mlp_names_the_shape_it_wants():
    with pytest.raises(ValueError, match=r"shape \(batch, 8, 8\); got x of shape \(4, 64\)"):
        MLP((8, 8))(torch.ones(4, 64), torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"each entry of shape must be an integer, got 2\.0"):
        MLP(2.0)


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))


def test_ema_is_its_recursion_with_a_warm_decay():
    module = Counter()
    ema = EMA(module, 0.3)
    expected = torch.zeros(3, dtype=torch.float64)
    for n in range(20):
        with torch.no_grad():
            module.w += torch.randn(3)
            module.calls += 1
        ema.update()
        d = min(0.3, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * module.w.detach()
        torch.testing.assert_close(ema.state_dict()["w"], expected)
    assert int(ema.state_dict()["calls"]) == 20
    assert ema.updates == 20


def test_ema_without_averaging_is_the_module():
    module = Counter()
    ema = EMA(module, 0.0)
    module.w.data.normal_()
    ema.update()
    assert torch.equal(ema.state_dict()["w"], module.w)


def test_swap_lends_the_average_and_gives_the_weights_back_even_after_an_error():
    module = Counter()
    ema = EMA(module, 0.9)
    module.w.data.fill_(1.0)

    def fail():
        with ema.swap():
            assert torch.equal(module.w, torch.zeros_like(module.w))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(module.w, torch.ones_like(module.w))
    other = Counter()
    other.w.data.fill_(5.0)
    ema.copy_to(other)
    assert torch.equal(other.w, torch.zeros_like(other.w))


def test_ema_continues_from_its_state():
    module, twin = Counter(), Counter()
    ema = EMA(module, 0.99)
    for _ in range(4):
        module.w.data.normal_()
        ema.update()
    resumed = EMA(twin, 0.99)
    resumed.load_state_dict(ema.state_dict(), ema.updates)
    twin.load_state_dict(module.state_dict())
    for each in (ema, resumed):
        each.update()
    assert torch.equal(ema.state_dict()["w"], resumed.state_dict()["w"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_ema_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        EMA(Counter(), decay)


def test_ema_refuses_the_state_of_another_module():
    with pytest.raises(ValueError, match="belongs to another module"):
        EMA(Counter()).load_state_dict({"v": torch.zeros(3)}, 1)
