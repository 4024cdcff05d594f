"""Networks of sequences, images and volumes, with conditions and masks: what a mask leaves out cannot be told."""

import math

import pytest
import torch

import sdesolve as sds

VP = sds.VP()


def filled(net, seed=0):
    """The network in float64 with no layer at zero, so that everything in it can be seen from outside."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(std=0.2, generator=generator)
    return net.double().eval()


def unet(shape, dims, **options):
    return sds.nn.UNet(shape, dims=dims, **{"channels": 4, "multipliers": (1, 2), "blocks": 1} | options)


def dit(shape, dims, **options):
    return sds.nn.DiT(shape, dims=dims, **{"width": 24, "depth": 2, "heads": 2, "patch": 1} | options)


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


T, HALF = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), torch.tensor(0.5)
CONTEXT, CONTEXT_MASK = draws(3, 4, 5, seed=1), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize(("shape", "dims"), [((6,), 1), ((2, 6), 1), ((2, 4, 6), 2), ((2, 4, 6), 3), ((3, 2, 4, 2), 3)])
def test_states_of_one_to_three_sides_start_at_zero_and_every_parameter_acts(make, shape, dims):
    options = {"classes": 2, "values": 3} | ({} if make is unet else {"context": 5, "patch": 2 if dims > 1 else 3})
    net = make(shape, dims, **options)
    for batch in (0, 2):
        x = torch.randn(batch, *shape)
        assert torch.equal(net(x, torch.tensor(0.5)), torch.zeros_like(x))
    net = filled(net)
    given = {"label": torch.tensor([0, 1, 2]), "values": draws(3, 3, seed=2)}
    given["values"][0, 1] = math.nan
    given |= {} if make is unet else {"context": CONTEXT, "context_mask": CONTEXT_MASK}
    x = draws(3, *shape)
    whole = net(x, T, **given)
    torch.testing.assert_close(net(x[1:], T[1:], **{k: v[1:] for k, v in given.items()}), whole[1:])
    for change in ({"label": torch.tensor([1, 0, 0])}, {"values": given["values"].nan_to_num() + 1}):
        assert float((net(x, T, **given | change) - whole).detach().flatten(1).abs().amax(1).min()) > 1e-9
    whole.square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in net.parameters())


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize("length", [3, 4, 5])
def test_what_a_sample_gets_does_not_depend_on_its_padding(make, length):
    """A padded sequence is the sequence alone, whatever the padding holds, nan included; and an empty one is zero."""
    long, alone = make((2, 7), 1), make((2, length), 1)
    filled(long)
    filled(alone).load_state_dict(long.state_dict())
    x = draws(3, 2, 7)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, :length], mask[1] = True, True
    value = long(x, T, mask=mask).detach()
    torch.testing.assert_close(value[0, :, :length], alone(x[:1, :, :length], T[:1])[0])
    torch.testing.assert_close(value[1], long(x[1:2], T[1:2])[0])
    assert float(value[0, :, length:].abs().max()) == 0
    assert float(value[2].abs().max()) == 0
    x[0, :, length:] = math.nan
    assert torch.equal(long(x, T, mask=mask).detach(), value)
    value = long(x.requires_grad_(), T, mask=mask)
    (gradient,) = torch.autograd.grad(value.square().sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, :, length:].abs().max()) == 0


def test_a_context_is_its_known_tokens():
    net = filled(dit((2, 6), 1, context=5))
    x = draws(3, 2, 6)
    value = net(x, T, context=CONTEXT, context_mask=CONTEXT_MASK).detach()
    torch.testing.assert_close(value[:1], net(x[:1], T[:1], context=CONTEXT[:1, :2]))
    torch.testing.assert_close(value[2:], net(x[2:], T[2:]))
    unknown = torch.where(CONTEXT_MASK[..., None], CONTEXT, math.nan)
    torch.testing.assert_close(net(x, T, context=unknown), value)
    other = net(x, T, context=CONTEXT.roll(1, 0), context_mask=CONTEXT_MASK).detach()
    assert float((other - value)[:2].abs().max()) > 1e-6
    one = net(x, T, context=CONTEXT[:1, :2])
    torch.testing.assert_close(one, net(x, T, context=CONTEXT[:1, :2].expand(len(x), -1, -1)))
    mixed = net(x, T, context=CONTEXT[:, [2, 0, 3, 1]], context_mask=CONTEXT_MASK[:, [2, 0, 3, 1]])
    torch.testing.assert_close(mixed, value)  # no order


def test_patches_are_cut_and_joined_where_they_were():
    net = sds.nn.DiT((3, 4, 6), patch=(2, 3), width=24, heads=2)
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = net._cut(x)
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 3], x[1, :, 2:, 3:].reshape(-1))
    assert torch.equal(net._joined(patches), x)


def test_a_transformer_block_is_its_formula():
    block = filled(sds.nn.DiT((4,), dims=1, patch=1, width=8, heads=2, depth=1)).blocks[0]
    h, e = draws(2, 4, 8), draws(2, 8, seed=3)
    a1, b1, g1, a2, b2, g2 = (e @ block.modulation.weight.T + block.modulation.bias)[:, None].split(8, 2)

    def norm(h):
        std, mean = torch.std_mean(h, 2, correction=0, keepdim=True)
        return (h - mean) / (std**2 + 1e-5).sqrt()

    q, k, v = block.qkv(norm(h) * (1 + a1) + b1).split(8, 2)
    heads = []
    for c in (slice(0, 4), slice(4, 8)):
        heads.append(torch.softmax(q[..., c] @ k[..., c].mT / 2.0, -1) @ v[..., c])
    expected = h + g1 * block.out(torch.cat(heads, 2))
    expected = expected + g2 * block.mlp(norm(expected) * (1 + a2) + b2)
    torch.testing.assert_close(block(h, e, None), expected)


@pytest.mark.parametrize("kind", ["dit", "unet", pytest.param("volume", marks=pytest.mark.thorough)])
def test_networks_learn_a_condition_of_data_of_different_lengths(kind, tmp_path):
    """Sequences of 3 to 8 numbers about a level that the condition says: training, a checkpoint, sampling, guidance."""
    torch.manual_seed(0)
    level = torch.rand(512, 1) * 2 - 1
    mask = torch.arange(8) < torch.randint(3, 9, (512, 1))
    x = torch.where(mask, level + 0.1 * torch.randn(512, 8), 5.0)
    shape = (2, 2, 2) if kind == "volume" else (8,)
    told = {"mask": mask.reshape(-1, *shape)}
    if kind == "dit":
        net = sds.nn.DiT(shape, dims=1, patch=2, width=32, heads=2, depth=2, context=1)
        told |= {"context": torch.stack([level, torch.zeros_like(level)], 1), "context_mask": mask[:, 2:4]}
    else:
        net = unet(shape, len(shape), values=1, channels=8)
        told |= {"values": level}
    score = sds.NetworkScore(net, VP, "edm", sigma_data=0.6)
    sds.train(
        score, told | {"x": x.reshape(-1, *shape)}, loss=sds.DenoisingScoreMatching("simple", "stratified"), steps=30,
        batch_size=64, lr=2e-2, warmup=0, decay="cosine", condition_dropout=0.2, progress=False, seed=0,
    )  # fmt: skip
    assert "mask" not in score.always_given
    sds.save(score, tmp_path / "score")
    score = sds.load_score(tmp_path / "score")
    t = torch.tensor(0.6)
    x_t = VP.alpha(t).float() * x + VP.sigma(t).float() * torch.randn(x.shape)

    @torch.no_grad()
    def error(**given):
        return float((score.given(**given).data(x_t.reshape(-1, *shape), t).reshape(-1, 8) - x)[mask].square().mean())

    # Levels have the variance 1/3, numbers about them .01.
    assert error(**told) < 0.1
    assert 0.2 < error(mask=told["mask"]) < 0.5
    assert error(**{name: -v if v.is_floating_point() else v for name, v in told.items()}) > 0.6
    few = {name: value[:4] for name, value in told.items()}
    bound, rest = score.given(mask=few.pop("mask")), few
    options = {"solver": sds.DPMSolverPP(2), "steps": 3, "seed": 1}
    drawn = [
        sds.sample(VP, sds.ClassifierFreeGuidance(bound, scale=2.0, one_call=one, **rest), (4, *shape), **options)
        for one in (False, True)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: unet((4, 4, 4, 4), 2), ValueError, r"with dims=2 shape must be \(height, width\) or \(colours, he"),
        (lambda: unet((4, 4, 4), 1), ValueError, r"with dims=1 shape must be \(length,\) or \(colours, length\)"),
        (lambda: dit((4, 4), 3), ValueError, r"with dims=3 shape must be \(depth, height, width\) or \(colours"),
        (lambda: dit(4, 1), TypeError, "shape must be the sizes of one state"),
        (lambda: unet((4,), 4), ValueError, "dims must be 1, 2 or 3"),
        (lambda: unet((8,), 1, attention=(3,)), ValueError, r"names a length that no level has; they are \[8, 4\]"),
        (lambda: unet((8, 4, 4), 3, attention=(3,)), ValueError, r"names a depth that no level has; they are \[8, 4\]"),
        (lambda: dit((6,), 1, patch=4), ValueError, r"patch must divide the sides \(6,\)"),
        (lambda: dit((6, 6), 2, patch=(2, 2, 2)), ValueError, "patch must divide the sides"),
        (lambda: dit((6,), 1, width=30, heads=4), ValueError, "even multiple of heads=4"),
        (lambda: dit((6,), 1, patch=0), ValueError, "patch must be at least 1"),
        (lambda: dit((6,), 1)(torch.ones(2, 7), HALF), ValueError, r"this DiT takes states of shape \(6,\)"),
        (lambda: dit((6,), 1)(torch.ones(2, 6), HALF, mask=torch.ones(2, 6)), TypeError, "of torch.bool, got torch.fl"),
        (lambda: unet((6,), 1)(torch.ones(2, 6), HALF, mask=torch.ones(2, 5) > 0), ValueError, r"one of \(2, 6\)"),
        (lambda: dit((6,), 1)(torch.ones(2, 6), HALF, context=CONTEXT), ValueError, "without a context"),
        (lambda: dit((6,), 1, context=4)(torch.ones(3, 6), HALF, context=CONTEXT.float()), ValueError,
         r"\(batch, tokens, 4\)"),
        (lambda: dit((6,), 1, context=5)(torch.ones(2, 6), HALF, context=CONTEXT.float()), ValueError,
         "context has 3 rows and there are 2 samples"),
        (
            lambda: dit((6,), 1, context=5)(torch.ones(3, 6), HALF, context=CONTEXT.float(),
                                            context_mask=CONTEXT_MASK[:, 1:]),
            ValueError, r"context_mask must be one of \(3, 4\)",
        ),
        (lambda: dit((6,), 1, context=5)(torch.ones(3, 6), HALF, context_mask=CONTEXT_MASK), ValueError,
         "needs a context"),
        (lambda: sds.nn.MLP(2)(torch.ones(2, 2), HALF, values=torch.ones(2, 1)), ValueError, "without values"),
        (lambda: sds.nn.MLP(2, values=2)(torch.ones(2, 2), HALF, values=torch.ones(2, 1)), ValueError,
         r"values \(batch, 2\), got shape \(2, 1\)"),
        (lambda: sds.NetworkScore(sds.nn.MLP(2), VP).given(values=0.5), TypeError, "takes no 'values'"),
        (lambda: sds.NetworkScore(dit((6,), 1), VP).given(context=CONTEXT), TypeError, "takes no 'context'"),
        (lambda: sds.nn.MLP(2, values=-1), ValueError, "values must be at least 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
