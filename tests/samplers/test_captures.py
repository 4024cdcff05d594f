"""Captured samplers, with torch's CUDA graphs played by stand-ins: on which device and stream, under which modes."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from sdesolve_kernels import use_backend

import sdesolve as sds
from sdesolve.integrate import cuda_graph
from sdesolve.integrate.cuda_graph import CapturedSampler, settings_of

CPU = torch.device("cpu")


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@pytest.fixture
def captures(monkeypatch):
    """What is captured: the stream of each capture, and the devices that it is within."""
    seen = types.SimpleNamespace(streams=[], within=[], replayed_within=[], device=[])

    @contextlib.contextmanager
    def device(where):
        seen.device.append(where)
        yield
        seen.device.pop()

    @contextlib.contextmanager
    def graph(graph, stream=None):
        seen.streams.append(stream)
        seen.within.append(list(seen.device))
        yield

    class Graph:
        def replay(self):
            seen.replayed_within.append(list(seen.device))

    fake = {
        "device": device, "graph": graph, "CUDAGraph": Graph, "Stream": Stream,
        "current_stream": lambda where=None: Stream(where), "stream": lambda s: contextlib.nullcontext(),
    }  # fmt: skip
    monkeypatch.setattr(cuda_graph.torch, "cuda", types.SimpleNamespace(**fake))
    return seen


class Sampler:
    def __call__(self, seed, first_path):
        return seed + first_path.to(torch.float64)


def test_a_capture_is_made_on_a_stream_of_its_device_and_replayed_there(captures):
    sampler = CapturedSampler(Sampler(), CPU)
    assert [stream.device for stream in captures.streams] == [CPU]
    assert captures.within == [[CPU]]
    sampler(3)
    assert captures.replayed_within == [[CPU]]


def test_a_capture_in_inference_mode_is_of_use_outside(captures):
    with torch.inference_mode():
        sampler = CapturedSampler(Sampler(), CPU)
        sampler(1)
    sampler(2**64 - 1, first_path=5)
    assert (int(sampler._seed), int(sampler._first_path)) == (-1, 5)
    assert not sampler._result.is_inference()


def test_what_a_capture_holds_is_part_of_its_key():
    @contextlib.contextmanager
    def precision(name):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        yield
        torch.set_float32_matmul_precision(before)

    @contextlib.contextmanager
    def deterministic():
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    keys = [settings_of(CPU)]
    for context in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
        use_backend("reference"),
        precision("medium"),
        deterministic(),
    ):
        with context:
            keys.append(settings_of(CPU))
    assert len(set(keys)) == len(keys)
    assert settings_of(CPU) == keys[0]


def test_settings_reach_the_key(monkeypatch):
    keys = []

    def captured(key, build, device):
        keys.append(key)
        return lambda seed, first_path: torch.zeros(2, 2)

    monkeypatch.setattr(sds.sampling, "captured", captured)
    process = sds.VP()
    score = sds.GaussianScore(process, torch.zeros(2), torch.ones(2)) if hasattr(sds, "GaussianScore") else None
    score = score or (lambda x, t: -x)

    def draw():
        sds.sample(process, score, (2, 2), steps=3, seed=0, cuda_graph=True)

    draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draw()
    draw()
    assert keys[0] == keys[2] != keys[1]
