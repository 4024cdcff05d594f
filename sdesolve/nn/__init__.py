"""Networks ``net(x, t)`` for scores, and what they are made of."""

from sdesolve.nn.convnet import ConvNet
from sdesolve.nn.dit import DiT
from sdesolve.nn.ema import EMA
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.labels import Given, LabelledNetwork
from sdesolve.nn.mlp import MLP
from sdesolve.nn.normalizer import Normalizer
from sdesolve.nn.rebuilding import rebuildable
from sdesolve.nn.unet import UNet

__all__ = [
    "EMA", "MLP", "ConvNet", "DiT", "FourierFeatures", "Given", "LabelledNetwork", "Normalizer", "UNet", "rebuildable",
]  # fmt: skip
