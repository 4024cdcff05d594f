"""The launchers up to the launch itself, without a device: Triton binds, specialises and compiles what they pass.

Ahead-of-time compilation goes around this part, the interpreter too: a parameter name that Triton reserves, or an
option that it does not know, shows here first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Device:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Device())

from sdesolve_kernels._triton import arguments, launch
from sdesolve_kernels._triton.launch_denoising import dsm_loss_parts
from sdesolve_kernels._triton.launch_langevin import langevin_step

x, index = torch.ones(64, 16), torch.tensor(1)
where = dict(seed=2**64 - 1, stream=1, first_path=0, step=1)
with arguments.recording() as launches:
    launch.euler_maruyama_step(x, x, 0.0, torch.tensor(0.1), **where)
    launch.euler_maruyama_step(x, x, x, 0.1, **where | dict(step=2**40, seed=index))
    launch.linear_step(x, [x], torch.ones(3, 3), index, **where)
    launch.perturb(x, x[:, 0], 1.0, **where)
    launch.fill("normal", x, seed=1, stream=0)
    langevin_step(x, x, mode="batch", size=0.1, alpha=1.0, **where)
    dsm_loss_parts(x, None, 0.0, 1.0, 1.0, grad=True, mean=True, **where)
    dsm_loss_parts(torch.ones(2000, 4), None, 0.0, 1.0, 1.0, grad=True, mean=True, **where)
    langevin_step(torch.ones(2000, 4), torch.ones(2000, 4), mode="batch", size=0.1, alpha=1.0, **where)
for item in launches:
    options = {"num_warps": item.num_warps, "enable_fp_fusion": True}
    compiled = item.kernel.warmup(**item.arguments, **options, grid=item.grid)
    ptx = compiled.asm["ptx"]
    name = item.kernel.fn.__name__
    assert compiled.metadata.enable_fp_fusion and compiled.metadata.num_warps == item.num_warps
    if name in ("euler_maruyama_kernel", "linear_kernel", "perturb_kernel", "langevin_kernel", "denoising_kernel"):
        assert "st.global.v4" in ptx and "ld.global.v4" in ptx, name
    assert 0 < item.grid[0] < 2**31 and max(item.grid[1:]) < 2**16
    print(name)
"""


def test_what_the_launchers_pass_is_what_triton_takes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(set(run.stdout.split())) == 11  # every kernel


def test_launches_that_are_kept_are_those_of_triton():
    """What is passed to a compiled kernel past Triton's handling of arguments, under a driver that launches nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    script = [str(Path(__file__).parent / "host" / "operations.py")]
    if environment.get("HYPOTHESIS_PROFILE") == "thorough":
        script.append("all")
    run = subprocess.run([sys.executable, *script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert re.search(r"\d+ calls, \d+ of \d+ anew", run.stdout)
