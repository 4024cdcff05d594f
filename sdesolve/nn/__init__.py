"""Networks ``net(x, t)`` for scores, and what they are made of."""

from sdesolve.nn.convnet import ConvNet as ConvNet
from sdesolve.nn.ema import EMA as EMA
from sdesolve.nn.embeddings import FourierFeatures as FourierFeatures
from sdesolve.nn.mlp import MLP as MLP
