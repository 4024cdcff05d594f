"""torch's global generators, seeded for a while and put back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(*labels: object, device: torch.device | None = None) -> Iterator[None]:
    """Seeds torch's global generators of the host and of ``device`` by ``labels``, and puts them back afterwards.

    What a network draws in training, for dropout say, then depends on the step and not on what was drawn before.
    """
    digest = hashlib.blake2b("/".join(map(str, labels)).encode(), digest_size=7).digest()
    seed = int.from_bytes(digest, "little")
    gpu = device if device is not None and device.type == "cuda" else None
    host_state = torch.get_rng_state()
    gpu_state = None if gpu is None else torch.cuda.get_rng_state(gpu)
    try:
        torch.default_generator.manual_seed(seed)
        if gpu is not None:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(host_state)
        if gpu is not None and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, gpu)
