"""Constants that are used in several dtypes and on several devices, copied once for each."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

_HOST_DTYPES = (torch.float32, torch.float64)


@final
class Copies:
    """A constant and copies of it in the dtypes and on the devices of the tensors that it meets.

    Complex constants are copied to the complex dtype of the same precision, integer ones keep theirs. Without copies
    every use would convert the constant again, and a transfer from the host cannot be captured in a CUDA graph. Copies
    for the host are made at once: one made while a function is being traced would belong to that trace.
    """

    def __init__(self, constant: Tensor) -> None:
        self._constant = constant
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for dtype in _HOST_DTYPES:
            self._copies[dtype, torch.device("cpu")] = self._copy(dtype, torch.device("cpu"))

    def like(self, x: Tensor) -> Tensor:
        """The constant in the precision and on the device of ``x``."""
        key = (x.dtype, x.device)
        found = self._copies.get(key)
        if found is not None:
            return found
        made = self._copy(*key)
        if type(made) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(made):
            self._copies[key] = made
        return made

    def _copy(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        c = self._constant
        if c.is_complex():
            dtype = dtype.to_complex()
        elif not c.is_floating_point():
            dtype = c.dtype
        # A copy made in inference mode could not take part in a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            return c.to(device, dtype)
