"""Models, checkpoints, noise and operators of other packages, by stand-ins that follow their interfaces."""

import importlib
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import sdesolve as sds
from sdesolve.adapters import (
    DeepinvOperator,
    DiffusersNet,
    EDMNet,
    NoiseSampler,
    ScoreSDENet,
    load_weights,
    read_weights,
)

# Models of diffusers.


class Conditional(nn.Module):
    """The interface of a UNet2DConditionModel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(
        self, sample, timestep, encoder_hidden_states, class_labels=None, attention_mask=None, return_dict=True
    ):
        shift = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return types.SimpleNamespace(sample=self.weight * sample + shift + timestep[:, None, None, None] / 1000)


def test_a_conditional_model_takes_its_conditions_by_name():
    model, x, t = Conditional(), torch.randn(3, 2, 4, 4), torch.tensor(0.25)
    score, texts = sds.NetworkScore(DiffusersNet(model), sds.VP()), torch.randn(3, 5, 6)
    expected = model(x, torch.full((3,), 249.0), texts).sample
    torch.testing.assert_close(score.given(encoder_hidden_states=texts).noise(x, t), expected)
    with pytest.raises(TypeError, match="takes no 'text': after x and t it takes label, encoder_hidden_states, attent"):
        score.given(text=texts)
    with pytest.raises(TypeError, match=r"a Conditional needs encoder_hidden_states: give score\.given"):
        score(x, t)
    drawn = sds.sample(
        score.process, score, (3, 2, 4, 4), steps=2, seed=0, given={"encoder_hidden_states": texts}, backend="eager"
    )
    assert bool(drawn.isfinite().all())
    with pytest.raises(ValueError, match="encoder_hidden_states has 3 rows and there are 4 samples"):
        sds.sample(score.process, score, (4, 2, 4, 4), steps=2, seed=0, given={"encoder_hidden_states": texts})


def test_time_from_noise_to_data():
    class Straight(nn.Module):  # x_s = s x_0 + (1 - s) z: the velocity x_0 - z of data at the point c
        def forward(self, hidden_states, timestep):
            s = timestep[:, None, None, None]
            return types.SimpleNamespace(sample=(2.0 - hidden_states) / (1 - s))

    net = DiffusersNet(Straight(), timestep=lambda t: t, towards_data=True)
    process = sds.Rectified()
    score = sds.NetworkScore(net, process, "flow")
    x = torch.randn(4, 1, 2, 2)
    torch.testing.assert_close(score.data(x, torch.tensor(0.3)), torch.full_like(x, 2.0))
    made = sds.sample(process, score, (4, 1, 2, 2), solver=sds.DDIM(), steps=5, seed=0, backend="eager")
    torch.testing.assert_close(made, torch.full_like(made, 2.0))


def test_models_of_diffusers_themselves():
    diffusers = importlib.import_module("diffusers")
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    for p in dit.parameters():
        nn.init.normal_(p, std=0.1)
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor(0.5), torch.tensor([3, 7])
    score = sds.NetworkScore(DiffusersNet(dit, classes=10, learned_variance=True), sds.VP())
    k = torch.full((2,), 499.0)
    expected = dit(x, timestep=k, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(score.given(labels).noise(x, t), expected)
    null = dit(x, timestep=k, class_labels=torch.tensor([10, 10])).sample[:, :4]
    torch.testing.assert_close(score.noise(x, t), null)
    with pytest.raises(ValueError, match="classes=11 and the null class need 12 embeddings, and this model has 11"):
        DiffusersNet(dit, classes=11)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4,
    ).eval()  # fmt: skip
    texts, x = torch.randn(2, 3, 6), torch.randn(2, 4, 8, 8)
    score = sds.NetworkScore(DiffusersNet(unet), sds.VP())
    with torch.no_grad():
        made = score.given(encoder_hidden_states=texts).noise(x, t)
        torch.testing.assert_close(made, unet(x, k, encoder_hidden_states=texts).sample)


# Checkpoints.


class Block(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.inner = nn.Linear(size, size)
        self.register_buffer("seen", torch.arange(float(size)))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x, sigma, class_labels=None):
        # The denoiser of data with mean 0 and variance 1, and a shift by the labels.
        D = x / (1 + sigma[:, None] ** 2)
        return D if class_labels is None else D + class_labels.sum(1, keepdim=True)


class Persistent(Block):
    """As EDM's classes: rebuilt from source code and a state that the file holds."""

    def __reduce__(self):
        meta = sys.modules["dnnlib.util"].EasyDict(
            type="class", version=6, module_src="raise SystemExit('code of a file was run')",
            class_name="Persistent", state=self.__dict__,
        )  # fmt: skip
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def edm_pickle(path, content_of, monkeypatch):
    """A pickle that names classes and functions which are not there when it is read."""

    class EasyDict(dict):
        pass

    def _reconstruct_persistent_obj(meta):
        raise SystemExit("a function that a file names was called")

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    with monkeypatch.context() as patch:
        held_by = {
            "dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}, "torch_utils": {},
            "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        }  # fmt: skip
        for name, held in held_by.items():
            module = types.ModuleType(name)
            module.__dict__.update(held)
            patch.setitem(sys.modules, name, module)
        path.write_bytes(pickle.dumps(content_of()))


def test_a_pickle_of_edm_gives_its_weights_and_runs_nothing(tmp_path, monkeypatch):
    path, net = tmp_path / "network-snapshot.pkl", Persistent()
    nn.init.normal_(net.inner.weight)
    edm_pickle(path, lambda: {"ema": net, "loss": object(), "dataset_kwargs": {"resolution": 3}}, monkeypatch)
    weights = read_weights(path, "ema")
    assert set(weights) == set(net.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    fresh = Block()
    load_weights(fresh, path, "ema")
    assert torch.equal(fresh.inner.weight, net.inner.weight)
    with pytest.raises(ValueError, match=r"is for another network: seen is .*; inner\.weight .* another part"):
        load_weights(Block(4), path, "ema")
    with pytest.raises(ValueError, match="has no part 'net'; it has dataset_kwargs, ema, loss"):
        read_weights(path, "net")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path, protocol):
    path, net = tmp_path / "weights.pkl", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net.unsaved = Block()
    content = {
        "ema": net,
        "half": torch.ones(3, 2, dtype=torch.float16).T,
        "more": {"list": [torch.arange(3)], "set": {1}},
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    weights = read_weights(path, "ema")
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    assert torch.equal(read_weights(path)["half"], content["half"])
    assert torch.equal(read_weights(path, "more.list")["0"], torch.arange(3))


def test_a_tensor_beyond_its_numbers_is_refused(tmp_path):
    class Beyond:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (torch.ones(2)._typed_storage(), 0, (1000,), (1,), False, {})

    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": Beyond()}))
    with pytest.raises(ValueError, match=r"weights\.pkl could not be read as weights alone"):
        read_weights(path)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin"])
def test_harmful_files_do_nothing(tmp_path, write, suffix):
    path, made = tmp_path / f"weights{suffix}", tmp_path / "made"
    write({"ema": Harm(made)}, path)
    with pytest.raises(ValueError, match=r"could not be read as weights alone|holds no tensors"):
        read_weights(path)
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04", b"abc", b"\x80\x02\x8c\x00."])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pkl"):
        read_weights(path)


def test_a_checkpoint_of_score_sde(tmp_path):
    net, path = Block(), tmp_path / "checkpoint_1.pth"
    trained = nn.DataParallel(net).state_dict()
    averages = [torch.full_like(p, 7.0 + i) for i, p in enumerate(net.parameters())]
    optimizer = torch.optim.Adam(net.parameters()).state_dict()
    content = {"optimizer": optimizer, "model": trained, "step": 5,
               "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": averages}}  # fmt: skip
    torch.save(content, path)
    fresh = Block()
    load_weights(fresh, path, "model")
    assert torch.equal(fresh.inner.weight, net.inner.weight)
    load_weights(fresh, path, "ema")
    assert bool((fresh.inner.weight == 7.0).all())
    assert bool((fresh.inner.bias == 8.0).all())
    assert torch.equal(fresh.seen, net.seen)
    with pytest.raises(ValueError, match="averages of 2 parameters, and the network has 4"):
        load_weights(nn.Sequential(Block(), Block()), path, "ema")


def test_networks_of_edm_and_score_sde_are_scores():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = sds.Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    for process, more in ((sds.EDM(), {}),
                          (sds.VP(), {"level": lambda t: (sds.VP().sigma(t) / sds.VP().alpha(t)),
                                      "scale": sds.VP().alpha})):  # fmt: skip
        score = sds.NetworkScore(EDMNet(Block().double(), **more), process, "data")
        torch.testing.assert_close(score(x, torch.tensor(0.7)), data.score(process)(x, torch.tensor(0.7)))
    labelled = sds.NetworkScore(EDMNet(Block().double(), classes=5), sds.EDM(), "data")
    D = labelled.data(x, torch.tensor(0.7))
    torch.testing.assert_close(labelled.given(2).data(x, torch.tensor(0.7)), D + 1)
    torch.testing.assert_close(labelled.given(5).data(x, torch.tensor(0.7)), D)
    with pytest.raises(ValueError, match="takes no label; give EDMNet classes=n"):
        EDMNet(Block())(x, torch.ones(4), torch.ones(4).long())

    class Theirs(nn.Module):  # unit normal data, as score_sde has it: noise and score
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x, labels):
            if self.kind == "ve":
                return -x / (1 + labels[:, None] ** 2)
            return x * sds.VP().sigma(labels / 999)[:, None]

    for kind, process, predicts in (("vp", sds.VP(), "noise"), ("ve", sds.VE(), "score")):
        score = sds.NetworkScore(ScoreSDENet(Theirs(kind), kind), process, predicts)
        torch.testing.assert_close(score(x, torch.tensor(0.4)), data.score(process)(x, torch.tensor(0.4)))
    with pytest.raises(ValueError, match="kind must be 'vp', 'subvp' or 've', got 'sde'"):
        ScoreSDENet(Theirs("vp"), "sde")


# k-diffusion.


def ancestral(denoise, x, sigmas, noise_sampler):
    """Ancestral steps as k-diffusion makes them."""
    for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        up = (b**2 * (a**2 - b**2) / a**2) ** 0.5
        down = (b**2 - up**2) ** 0.5
        D = denoise(x, a)
        x = x + (x - D) / a * (down - a)
        if b > 0:
            x = x + noise_sampler(torch.tensor(a), torch.tensor(b)) * up
    return x


def test_samplers_of_k_diffusion_take_our_path():
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.5, 0.0])
    data = sds.Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    process = sds.EDM()
    x = 10 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = ancestral(lambda x, s: x / (1 + s**2), x, sigmas, NoiseSampler(x, sigmas, seed=3))
    score = data.score(process)
    ours = sds.sample(process, score, x0=x, grid=sigmas, solver=sds.Ancestral(), seed=3, backend="eager")
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)


def test_noise_between_levels_is_of_one_path():
    x, sigmas = torch.zeros(5, 2, 2), torch.tensor([8.0, 4.0, 1.0, 0.0])
    noise = NoiseSampler(x, sigmas, seed=1)
    whole = noise(8.0, 4.0)
    parts = noise(8.0, 7.0) * 1.0 + noise(7.0, 4.0) * 3**0.5
    torch.testing.assert_close(whole * 2.0, parts, rtol=1e-5, atol=1e-5)
    both = noise(8.0, 1.0) * 7**0.5
    torch.testing.assert_close(both, whole * 2.0 + noise(4.0, 1.0) * 3**0.5, rtol=1e-5, atol=1e-5)
    assert torch.equal(NoiseSampler(x[:2], sigmas, seed=1)(8.0, 7.0), noise(8.0, 7.0)[:2])
    assert torch.equal(NoiseSampler(x[:1], sigmas, seed=1, first_path=3)(8.0, 4.0)[0], whole[3])
    rows = NoiseSampler(x[:3], sigmas, seed=[1, 9, 1])
    assert torch.equal(rows(8.0, 4.0)[0], whole[0])
    assert torch.equal(rows(8.0, 7.0)[2], noise(8.0, 7.0)[0])
    assert not torch.equal(rows(8.0, 7.0)[1], noise(8.0, 7.0)[1])
    many = NoiseSampler(torch.zeros(40_000), sigmas, seed=0)(6.0, 5.0)
    assert abs(float(many.var()) - 1) < 4 * (2 / 40_000) ** 0.5
    assert NoiseSampler(x.bfloat16(), sigmas, seed=1)(8.0, 4.0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="between two levels of 0 to 8, got 9 and 4"):
        noise(9.0, 4.0)
    with pytest.raises(ValueError, match="decrease"):
        NoiseSampler(x, sigmas.flip(0), seed=1)
    with pytest.raises(ValueError, match="for 2 rows, and the batch has 5"):
        NoiseSampler(x, sigmas, seed=[1, 2])


# deepinv.


class Physics:
    def __init__(self, matrix, adjoint=None):
        self.matrix, self.back = matrix, matrix if adjoint is None else adjoint

    def A(self, x, **params):
        return (x.flatten(1) @ self.matrix.T).reshape(len(x), -1)

    def A_adjoint(self, y, **params):
        return (y @ self.back).reshape(len(y), 1, 2, 2)


def test_a_physics_of_deepinv_is_an_operator():
    A = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, -1.0, 2.0], [1.0, 1.5, -1.0, 2.0]]).double()  # of rank 2
    operator = DeepinvOperator(Physics(A), (1, 2, 2), dtype=torch.float64)
    ours = sds.operators.Matrix(A, (1, 2, 2))
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = ours(x)
    torch.testing.assert_close(operator(x), y)
    torch.testing.assert_close(operator.pseudo_inverse(y), ours.pseudo_inverse(y))
    c, s = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    torch.testing.assert_close(operator.solve_gram(y, c, s), ours.solve_gram(y, c, s))
    with pytest.raises(TypeError, match="lacks A_adjoint"):
        DeepinvOperator(types.SimpleNamespace(A=lambda x: x), (2,))
    with pytest.raises(ValueError, match=r"Physics\.A_adjoint is not the adjoint of its A"):
        DeepinvOperator(Physics(A, 2 * A), (1, 2, 2), dtype=torch.float64)
    square = Physics(A)
    square.A = lambda x: Physics(A).A(x) ** 2
    with pytest.raises(ValueError, match=r"Physics\.A is not linear"):
        DeepinvOperator(square, (1, 2, 2), dtype=torch.float64)
