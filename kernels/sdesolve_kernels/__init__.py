"""Kernels of sdesolve: ops on tensors, each with a plain torch reference and hand-written implementations."""

from .dispatch import use_backend as use_backend
from .ops import normal as normal
from .ops import uniform as uniform
from .ops import words as words
from .streams import Stream as Stream
