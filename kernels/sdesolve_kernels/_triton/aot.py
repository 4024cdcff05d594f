"""Ahead-of-time compilation of recorded launches, and what the machine code says about them.

Works on a machine without a GPU: the compiler needs a target, not a device, and Triton's wheel carries the
disassemblers. Compiled with the signature, constants and alignment that the launcher would have had.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .arguments import Launch

__all__ = ["TRITON_VERSION", "Figures", "disassemble", "measure", "source"]

TRITON_VERSION: str = triton.__version__
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
_BITS = {"": 32, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Figures(NamedTuple):
    """What one kernel's machine code says. Instructions are SASS instructions that a thread issues, uniform ones too.

    Counting rule: the hot loop is the largest backward branch, or the whole kernel if it has none. ``per_element`` is
    its instructions, branches to slow paths included whether taken or not, over the elements that one thread handles
    in it: a tile's elements over the threads, times the factor by which the compiler unrolled the loop, which the
    bytes of its global accesses tell. ``once`` counts everything else: what a program pays before and after its loop.
    Padding (``NOP`` and the branch to itself that ends a function) does not count. Kernels that handle no states but a
    number a sample have no ``per_element``.

    A generated trajectory's hot loop is its innermost one, over groups of steps (loops of a quarter of its size or
    less, in the slow paths of functions, are part of it); its elements are a thread's paths times a group's steps.
    """

    registers: int
    spills: int  # bytes of spill loads and stores
    local: int  # bytes of stack and local memory a thread
    shared: int  # bytes of shared memory a program
    barriers: int
    load_bits: int  # widest global load
    store_bits: int  # widest global store
    accesses: int  # global loads and stores in the hot loop, tables of constants left out
    per_element: float | None
    once: int


def source(launch: Launch) -> ASTSource:
    """The compiler's input for a recorded launch; pointers count as aligned to 16 bytes, as fresh tensors are."""
    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if not parameter.do_not_specialize:
                aligned.append(index)
        else:
            signature[parameter.name] = "i64"
    if tuple(int(part) for part in TRITON_VERSION.split(".")[:2]) < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        return ASTSource(launch.kernel, signature, constants, attributes)
    names = launch.kernel.arg_names
    ordered = {name: signature.get(name, "constexpr") for name in names}
    hints = {(index,): [["tt.divisibility", 16]] for index in aligned}
    return ASTSource(launch.kernel, ordered, constants, hints)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(launch: Launch, capability: int) -> tuple[str, str]:
    """SASS and resource usage of a launch's kernel, compiled for compute capability ``capability`` (90 is 9.0)."""
    compiled: Any = triton.compile(
        source(launch),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "enable_fp_fusion": launch.fp_fusion},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return _tool("nvdisasm", "-c", str(cubin)), _tool("cuobjdump", "-res-usage", str(cubin))


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _parse(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes without padding, and the loops among them as index ranges."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(opcodes)
        found = _INSTRUCTION.search(line)
        if not found or found.group(1) == "NOP":
            continue
        target = _TARGET.search(found.group(2))
        if found.group(1).startswith("BRA") and target and target.group(1) in labels:
            start = labels[target.group(1)]
            if start == len(opcodes):  # the branch to itself after the end
                continue
            loops.append((start, len(opcodes) + 1))
        opcodes.append(found.group(1))
    return opcodes, loops


def _width(opcode: str) -> int:
    return next((_BITS[part] for part in opcode.split(".")[1:] if part in _BITS), 32)


def _is_large_part(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    inside = outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer
    return inside and 4 * (inner[1] - inner[0]) > outer[1] - outer[0]


def measure(launch: Launch, capability: int, itemsize: int) -> Figures:
    """Compile a launch for one architecture and count. ``itemsize``: bytes of the states' elements."""
    sass, usage = disassemble(launch, capability)
    opcodes, loops = _parse(sass)
    if launch.path_steps:
        loops = [loop for loop in loops if not any(_is_large_part(inner, loop) for inner in loops)]
    start, stop = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(opcodes)))
    moved: dict[str, int] = collections.Counter()
    accesses = 0
    for opcode in opcodes[start:stop]:
        if not opcode.endswith("CONSTANT"):  # tables of float64 polynomials
            moved[opcode.split(".")[0]] += _width(opcode) // 8
            accesses += opcode.startswith(("LDG", "STG"))
    tile = launch.arguments.get("BLOCK", 0) * launch.arguments.get("VEC", 0) / (32 * launch.num_warps)
    unrolled = max(1, round((moved["STG"] or moved["LDG"]) / (tile * itemsize))) if tile and loops else 1
    elements = launch.path_steps or tile * unrolled
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Figures(
        registers=used["REG"],
        spills=4 * sum(o.startswith(("STL", "LDL")) for o in opcodes),
        local=used["STACK"] + used["LOCAL"],
        shared=used["SHARED"],
        barriers=sum(o.startswith("BAR") for o in opcodes),
        load_bits=max((_width(o) for o in opcodes if o.startswith("LDG")), default=0),
        store_bits=max((_width(o) for o in opcodes if o.startswith("STG")), default=0),
        accesses=accesses,
        per_element=round((stop - start) / elements, 2) if elements else None,
        once=len(opcodes) - (stop - start),
    )
