"""Runs of generated kernels in pieces: the same bits however they are cut, and nothing written after an interrupt."""

from __future__ import annotations

import dataclasses
import gc
import random
import signal
import time
import weakref

import pytest
import torch
from sdesolve_kernels.threads import Job, split
from sdesolve_kernels.trajectory import Launch, Signature, compile_trajectory, numba_launch, trace

STEPS, PATHS, WIDTH = 96, 1000, 3
TIMES = torch.linspace(0.0, 1.0, STEPS + 1, dtype=torch.float64)
ROWS = torch.linspace(0.5, 1.0, 2 * STEPS, dtype=torch.float64).reshape(STEPS, 2)


def momentum(inputs):
    """A step that remembers: the state after it, and what the next step is given besides."""
    x, v = inputs.states
    (z,) = inputs.noises
    a, b = inputs.row
    v = a * v - torch.sin(x) * inputs.dt
    return x + b * v + 0.1 * inputs.t0 * z, v


def forgetful(inputs):
    (x,) = inputs.states
    (z,) = inputs.noises
    a, b = inputs.row
    return (x - a * torch.sin(x) * inputs.dt + 0.1 * b * z * inputs.scale,)


@pytest.fixture(scope="module")
def trajectories():
    """By name and kind of increments, compiled once."""
    made = {}

    def make(name, kind="normal", width=WIDTH):
        if (name, kind, width) not in made:
            states = ((width,),) * (2 if name == "momentum" else 1)
            signature = Signature(torch.float32, torch.device("cpu"), states, ((width,),), 2, PATHS)
            step = momentum if name == "momentum" else forgetful
            made[name, kind, width] = compile_trajectory(trace(step, signature, None), [kind])
        return made[name, kind, width]

    return make


def launch(width=WIDTH, **options):
    x0 = torch.linspace(-1.0, 1.0, PATHS * width).reshape(PATHS, width)
    options = {"saves": (0, 1, 17, 40, 95, 96), "moments": False, **options}
    return Launch(x0, TIMES, ROWS, [(2**63 + 5, 0, 2**32 - 500, 7)], captured=(), **options)


def assert_same(a, b):
    assert torch.equal(a.x1, b.x1)
    for name in ("states", "memory"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    if a.moments is not None:
        assert torch.equal(a.moments.mean, b.moments.mean)
        assert torch.equal(a.moments.variance, b.moments.variance)


@pytest.fixture
def in_pieces(monkeypatch):
    """Cuts runs anywhere: every piece is of a random size."""
    numbers = random.Random(0)
    monkeypatch.setattr(numba_launch, "_AT_ONCE", 0.0)
    monkeypatch.setattr(numba_launch, "_GRAIN", 1.0)
    monkeypatch.setattr(numba_launch, "_STRETCH", 37)
    monkeypatch.setattr(numba_launch._Run, "_within_budget", lambda self, factor, most: numbers.randint(1, most))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


CASES = [("forgetful", "normal", 3), ("forgetful", "normal", 1), ("forgetful", "two-point", 3),
         ("forgetful", "three-point", 1), ("momentum", "normal", 3)]  # fmt: skip


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(("name", "kind", "width"), CASES)
def test_how_a_run_is_cut_changes_no_bit(name, kind, width, moments, trajectories, threads, request):
    trajectory = trajectories(name, kind, width)
    whole = trajectory.run(launch(width, moments=moments))
    request.getfixturevalue("in_pieces")
    done = []
    for _ in range(3):
        done.clear()
        assert_same(trajectory.run(launch(width, moments=moments, progress=done.append)), whole)
        assert sum(done) == PATHS * STEPS
        assert len(done) > 1


@pytest.mark.parametrize(("name", "kind", "width"), CASES)
@pytest.mark.parametrize("k", [1, 40, 41, 95])
def test_a_run_begins_at_any_step_with_what_was_remembered(name, kind, width, k, trajectories):
    """As a gradient or a resumed run does: from the state at step k, and all that the solver knew then."""
    trajectory = trajectories(name, kind, width)
    whole = trajectory.run(launch(width))
    first = trajectory.run(launch(width, last_step=k, saves=(0, k)))
    assert (first.memory is None) == (name == "forgetful")
    rest = dataclasses.replace(launch(width, saves=(k, 96)), x0=first.x1, first_step=k, memory=first.memory)
    rest = trajectory.run(rest)
    assert torch.equal(rest.x1, whole.x1)
    assert torch.equal(rest.states[0], first.x1.reshape(PATHS, -1))
    assert torch.equal(rest.states[1], whole.states[-1])


def buffers(error):
    """What the run that an exception left was writing to."""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, numba_launch._Run):
            return owner
        frame = frame.tb_next
    raise AssertionError("no run among the frames")


def interrupted(trajectory, stop, **options):
    done = []

    def progress(amount):
        done.append(amount)
        stop(amount)

    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught:
        trajectory.run(launch(progress=progress, **options))
    assert sum(done) < PATHS * STEPS
    return buffers(caught.value)


def assert_nothing_is_written(run):
    written = [t for t in (run.carried, run.x1, run.states) if t is not None]
    for t in written:
        t.fill_(1e30)
    time.sleep(0.1)
    assert all(bool((t == 1e30).all()) for t in written)
    assert run.job.stopped or torch.get_num_threads() == 1


def by_signal(amount):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def by_error(amount):
    raise RuntimeError("no more")


@pytest.mark.parametrize("stop", [by_signal, by_error])
def test_an_interrupted_run_writes_nothing_afterwards(stop, trajectories, threads, monkeypatch):
    """Many small pieces, of which one has been done: if threads went on, they would for seconds."""
    monkeypatch.setattr(numba_launch, "_AT_ONCE", 0.0)
    monkeypatch.setattr(numba_launch, "_GRAIN", 1.0)
    monkeypatch.setattr(numba_launch._Run, "_within_budget", lambda self, factor, most: 1)
    trajectory = trajectories("momentum")
    whole = trajectory.run(launch())
    run = interrupted(trajectory, stop)
    assert_nothing_is_written(run)
    assert_same(trajectory.run(launch()), whole)  # the next run knows nothing of it


def test_memory_is_owned_by_the_threads_that_write_it():
    """Even a caller that is interrupted while it waits leaves them their memory."""
    held = torch.zeros(4)
    gone = weakref.ref(held)

    def work(start, stop, held=held):
        if start == 0:
            raise KeyboardInterrupt
        time.sleep(0.05)
        held[start] = 1.0

    del held
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(KeyboardInterrupt):
            split(work, 4, 1)
    finally:
        torch.set_num_threads(before)
    del work
    gc.collect()
    assert gone() is None  # nobody works on it any more


def test_the_first_error_stops_all_threads():
    begun = []

    def work(start, stop):
        begun.append(start)
        time.sleep(0.005)
        raise ValueError(f"piece {start}")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="piece"):
            split(work, 1000, 1)
    finally:
        torch.set_num_threads(before)
    assert len(begun) <= 3


def test_progress_is_told_to_the_callers_thread():
    told = []
    job = Job(told.append)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        split(lambda start, stop: job.advance(stop - start), 1000, 1, job)
    finally:
        torch.set_num_threads(before)
    assert sum(told) == 1000
