import pytest
import torch

from sdesolve.diffusions import VP
from sdesolve.nn import MLP
from sdesolve.scores.network import NetworkScore


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share out: on a busy machine two threads wait for each other 20 times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_score():
    """Small scores on 2-d states that begin with the same weights each time."""

    def make(predicts="edm", *, width=16, depth=1, dropout=0.0, process=None, dim=2, seed=0):
        torch.manual_seed(seed)
        net = MLP(dim, width=width, depth=depth, dropout=dropout)
        return NetworkScore(net, VP() if process is None else process, predicts)

    return make


@pytest.fixture
def data():
    """A correlated Gaussian sample, (300, 2)."""
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    return z @ torch.tensor([[1.5, 0.8], [0.0, 0.4]]) + torch.tensor([1.0, -0.5])
