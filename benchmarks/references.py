"""Reference moments for the gates of `ensembles`: ``python -m benchmarks.references`` (minutes) writes the table.

The plain torch loop in float64 with torch's own normals: neither our kernels nor our noise have a part in it.
"""

from __future__ import annotations

import json

import torch

from benchmarks.ensembles import REFERENCED, REFERENCES, plain_loop, statistics_of
from benchmarks.models import MODELS

__all__ = ["main"]

_PATHS, _REPEATS = 6720, 40


def main() -> None:
    """Writes the table."""
    device, table = torch.device("cpu"), {}
    torch.manual_seed(20261123)
    for name, steps in REFERENCED:
        model, found = MODELS[name], []
        params = None if model.params is None else model.params(_PATHS, device).double()
        for repeat in range(_REPEATS):
            generator = torch.Generator().manual_seed(repeat)
            x0 = model.start(_PATHS, device).double()
            if name == "mixture":  # its start is random too
                x0 = torch.randn(x0.shape, dtype=x0.dtype, generator=generator)
            found.append(statistics_of(plain_loop(model, x0, params, steps, lambda f: f)()))
        by_repeat = torch.stack([s.mean(0) for s in found])
        # A sweep is the same every time: what varies between repeats is all that a contender may vary by.
        deviation = torch.cat(found).std(0) if params is None else by_repeat.std(0) * _PATHS**0.5
        table[f"{name}, {steps} steps"] = {
            "value": by_repeat.mean(0).tolist(), "deviation": deviation.tolist(), "paths": _PATHS * _REPEATS,
        }  # fmt: skip
        print(name, table[f"{name}, {steps} steps"], flush=True)
    REFERENCES.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
