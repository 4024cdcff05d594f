"""Networks ``net(x, t)`` for scores, and what they are made of."""

from sdesolve.nn.convnet import ConvNet as ConvNet
from sdesolve.nn.ema import EMA as EMA
from sdesolve.nn.embeddings import FourierFeatures as FourierFeatures
from sdesolve.nn.labels import Given as Given
from sdesolve.nn.labels import LabelledNetwork as LabelledNetwork
from sdesolve.nn.mlp import MLP as MLP
from sdesolve.nn.normalizer import Normalizer as Normalizer
from sdesolve.nn.unet import UNet as UNet
