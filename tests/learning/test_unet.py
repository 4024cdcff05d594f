import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdesolve.diffusions import VP
from sdesolve.nn import MLP, FourierFeatures, Given, UNet
from sdesolve.nn.labels import LabelEmbedding
from sdesolve.nn.unet import _Attention, _Block
from sdesolve.scores.network import NetworkScore


def filled(net, seed=0):
    """The network with no layer at zero, so that everything in it can be seen from outside."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(std=0.2, generator=generator)
    return net.double()


def small(shape=(2, 5, 7), **options):
    return UNet(shape, **{"channels": 4, "multipliers": (1, 2), "blocks": 1} | options)


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), colours=st.integers(0, 3), batch=st.integers(0, 3),
    levels=st.integers(1, 3), channels=st.integers(2, 7),
)  # fmt: skip
def test_images_of_any_size_and_number_of_colours_start_at_zero(height, width, colours, batch, levels, channels):
    shape = (colours, height, width) if colours else (height, width)
    net = UNet(shape, channels=channels, multipliers=[1, 2, 3][:levels], blocks=1, head=3)
    x = torch.randn(batch, *shape)
    for t in (torch.tensor(0.5), torch.full((batch,), 0.5)):
        assert torch.equal(net(x, t), torch.zeros_like(x))


def test_every_parameter_acts_and_samples_stay_apart():
    torch.manual_seed(0)
    net = filled(small(classes=3, attention=(5,)))
    x, t, label = torch.randn(4, 2, 5, 7).double(), torch.rand(4).double(), torch.tensor([0, 1, 2, 3])
    whole = net(x, t, label)
    torch.testing.assert_close(net(x[1:3], t[1:3], label[1:3]), whole[1:3])
    for change in ((x + 0.1, t, label), (x, t + 0.1, label), (x, t, (label + 1) % 4)):
        assert (net(*change) - whole).abs().amin() > 1e-9
    whole.square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in net.parameters())


def test_without_attention_a_place_sees_its_neighbourhood_and_with_it_everything():
    # One level, one block down, two up, two in the middle: 12 convolutions of 3x3 see 12 places away, not 24.
    x, t = torch.randn(1, 1, 30, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0.5]).double()

    def reach(**options):
        net = filled(UNet((1, 30), channels=4, multipliers=(1,), blocks=1, **options))
        net.middle[0].attention, net.outlet[0] = torch.nn.Identity(), torch.nn.Identity()
        for layer in [*net.down, *net.middle, *net.up]:  # statistics of the whole image would carry everything too
            layer.first[0], layer.norm = torch.nn.Identity(), torch.nn.Identity()
        moved = x.clone()
        moved[..., 0] += 0.5
        with torch.no_grad():
            return (net(moved, t) - net(x, t)).abs().flatten()

    local, attended = reach(attention=()), reach(attention=(1,))
    assert float(local[13:].max()) == 0.0
    assert float(local[0]) > 0
    assert float(attended[13:].min()) > 0


def test_attention_is_its_formula():
    torch.manual_seed(1)
    layer = filled(_Attention(6, head=3))
    h = torch.randn(2, 6, 2, 3).double()
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).split(6, dim=1)
    heads = []
    for c in (slice(0, 3), slice(3, 6)):
        weight = torch.einsum("bci,bcj->bij", q[:, c], k[:, c]).div(math.sqrt(3)).softmax(-1)
        heads.append(torch.einsum("bij,bcj->bci", weight, v[:, c]))
    expected = h + layer.out(torch.cat(heads, dim=1).reshape(h.shape))
    torch.testing.assert_close(layer(h), expected)


def test_a_block_is_its_formula():
    block = filled(_Block(8, 4, embedding=5, dropout=0.0, head=None))
    h, e = torch.randn(3, 8, 4, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    silu, conv = torch.nn.functional.silu, torch.nn.functional.conv2d

    def normalised(x, norm, groups):
        cells = x.reshape(3, groups, -1)
        std, mean = torch.std_mean(cells, dim=2, correction=0, keepdim=True)
        unit = ((cells - mean) / (std**2 + norm.eps).sqrt()).reshape(x.shape)
        return unit * norm.weight[:, None, None] + norm.bias[:, None, None]

    inner = conv(silu(normalised(h, block.first[0], 2)), block.first[2].weight, block.first[2].bias, padding=1)
    a, b = (e @ block.modulation.weight.T + block.modulation.bias)[:, :, None, None].split(4, dim=1)
    outer = block.second[2]
    outer = conv(silu(normalised(inner, block.norm, 1) * (1 + a) + b), outer.weight, outer.bias, padding=1)
    expected = torch.einsum("oi,nihw->nohw", block.skip.weight[:, :, 0, 0], h) + block.skip.bias[:, None, None] + outer
    torch.testing.assert_close(block(h, e), expected)


def test_attention_takes_the_heights_of_the_levels():
    def attending(shape=(9, 9), **options):
        net = small(shape, multipliers=(1, 1, 1), **options)
        return [isinstance(layer.attention, _Attention) for layer in net.down if hasattr(layer, "attention")]

    assert attending() == [False, False, True]
    assert attending(attention=()) == [False, False, False]
    assert attending(attention=(9, 5)) == [True, True, False]
    assert attending(shape=(1, 1, 12)) == [False, False, True]  # all levels of a sequence have the height 1
    assert attending(shape=(1, 1, 12), attention=(6,)) == [False, True, False]
    assert attending(shape=(1, 2, 12), attention=((1, 6), (1, 3))) == [False, True, True]
    with pytest.raises(ValueError, match=r"several levels have the height 1; name them by \(height, width\), some of"):
        attending(shape=(1, 2, 12), attention=(1,))
    with pytest.raises(ValueError, match="several levels"):
        attending(shape=(1, 1, 12), attention=(1,))
    with pytest.raises(ValueError, match=r"attention=\(8,\) names a height that no level has; they are \[9, 5, 3\]"):
        attending(attention=(8,))


def test_a_unet_learns_which_pixels_a_class_has():
    # Two images, one per class, and no noise to speak of: what is learned is the class.
    torch.manual_seed(0)
    net = small((3, 5), classes=2, dropout=0.1)
    images = torch.randn(2, 3, 5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    label = torch.tensor([0, 1]).repeat(8)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(torch.randn(16, 3, 5), torch.rand(16), label) - images[label]).square().mean()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        error = (net(torch.randn(16, 3, 5), torch.rand(16), label) - images[label]).square().mean()
    assert float(error) < 0.1 * float((images[0] - images[1]).square().mean()) / 2


# Classes


@pytest.mark.parametrize("make", [lambda: MLP((2, 3), width=8, depth=1, classes=3), lambda: small((2, 3), classes=3)])
def test_no_label_is_the_null_class_and_classes_differ(make):
    net = filled(make())
    x, t = torch.randn(4, 2, 3).double(), torch.rand(4).double()
    outputs = [net(x, t, torch.full((4,), k)) for k in range(4)]
    assert torch.equal(net(x, t), outputs[3])
    assert all((outputs[i] - outputs[j]).abs().amin() > 1e-9 for i in range(4) for j in range(i))
    mixed = net(x, t, torch.tensor([2, 0, 3, 1]))
    for row, k in enumerate([2, 0, 3, 1]):
        torch.testing.assert_close(mixed[row], outputs[k][row])
    if isinstance(net, MLP):  # a time for all and a label for each
        torch.testing.assert_close(net(x, t[0], torch.full((4,), 1)), net(x, t[0].expand(4), torch.full((4,), 1)))


def test_a_score_given_labels_shares_its_network():
    score = NetworkScore(filled(MLP(2, width=8, depth=1, classes=3)), VP(), "edm", sigma_data=0.7)
    x, t = torch.randn(4, 2).double(), torch.tensor(0.4).double()
    label = torch.tensor([2, 0, 3, 1])
    each, one = score.given(label), score.given(2)
    c = (x, t, score._coefficients(x, t))
    expected = score.net(*score._parameterization.inputs(x, t.expand(4), c[2]), label)
    assert torch.equal(each.output(x, t), expected)
    torch.testing.assert_close(one(x, t)[0], each(x, t)[0])
    assert torch.equal(score.given(3)(x, t), score(x, t))
    assert (each.predicts, each.sigma_data, each.process) == ("edm", 0.7, score.process)
    next(score.net.parameters()).data.add_(1.0)
    assert not torch.equal(each.output(x, t), expected)
    assert each.given is not None
    assert "net.label" not in each.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UNet((4,)), ValueError, r"shape must be \(height, width\) or"),
        (lambda: UNet((1, 2, 3, 4)), ValueError, r"shape must be \(height, width\) or"),
        (lambda: UNet((4, 0)), ValueError, "each entry of shape must be at least 1"),
        (lambda: UNet((4, 4), channels=1), ValueError, "channels must be at least 2"),
        (lambda: UNet((4, 4), multipliers=()), ValueError, "an entry for each level"),
        (lambda: UNet((4, 4), multipliers=(1, 0.5)), TypeError, "each entry of multipliers must be an integer"),
        (lambda: UNet((4, 4), blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: UNet((4, 4), dropout=1.0), ValueError, r"share in \[0, 1\)"),
        (lambda: UNet((4, 4), classes=-1), ValueError, "classes must be at least 0"),
        (lambda: small()(torch.ones(2, 5, 7), torch.tensor(0.5)), ValueError, r"takes states of shape \(2, 5, 7\)"),
        (lambda: LabelEmbedding(0, 2)(torch.ones(2), torch.tensor([0])), ValueError, "built without classes"),
        (lambda: Given(torch.nn.Linear(2, 2), 0), TypeError, "a LabelledNetwork; got Linear"),
        (lambda: Given(MLP(2), 0), ValueError, "built without classes"),
        (lambda: Given(MLP(2, classes=3), 4), ValueError, r"in 0 ... 2, or 3 for no class; got 4"),
        (lambda: Given(MLP(2, classes=3), torch.tensor([0, -1])), ValueError, "got -1"),
        (lambda: Given(MLP(2, classes=3), 1.0), TypeError, r"labels must be integers, got torch.float32"),
        (lambda: Given(MLP(2, classes=3), torch.zeros(2, 2).long()), ValueError, r"got shape \(2, 2\)"),
        (lambda: Given(MLP(2, classes=3), torch.zeros(3).long())(torch.ones(4, 2), torch.tensor(0.5)),
         ValueError, "there are 3 labels and 4 samples"),
        (lambda: NetworkScore(lambda x, t: x, VP()).given(0), TypeError, "this one is a function"),
        (lambda: FourierFeatures.sinusoidal(4, 0), ValueError, "steps must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sinusoidal_features_are_the_position_code():
    phi, k, m = FourierFeatures.sinusoidal(8, 1000), torch.tensor(37.0), torch.arange(8)
    phase = k * 10_000.0 ** (-m.flip(0) / 7)  # from slow to quick
    expected = math.sqrt(2) * torch.cat([phase.cos(), phase.sin()])
    torch.testing.assert_close(phi(k / 1000), expected, atol=2e-5, rtol=0)
