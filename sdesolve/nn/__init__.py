"""Building blocks for score networks: time embeddings, a residual MLP, an average of weights."""

from sdesolve.nn.ema import EMA as EMA
from sdesolve.nn.embeddings import FourierFeatures as FourierFeatures
from sdesolve.nn.mlp import MLP as MLP
