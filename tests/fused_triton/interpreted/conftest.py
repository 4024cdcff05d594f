"""Nothing is collected here unless Triton interprets: `test_interpreter.py` starts a process where it does."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def quicker():
    """Leave out what the interpreter does again in each operation, two fifths of its time; values are the same."""
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    slow, patched, known = interpreter._get_np_dtype, {}, {}

    def launched(self, *args, **kwargs):
        patched.clear()
        launch(self, *args, **kwargs)

    def once_a_launch(function):
        # Each call of a function by a kernel asks for this, and finds what its module sees of the language replaced.
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch(function)
        return patched[module]

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = slow(dtype)
        return known[name]

    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr(interpreter.GridExecutor, "__call__", launched)
        replaced.setattr(interpreter, "_patch_lang", once_a_launch)
        replaced.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        # Sums of integers are made again in 64 bits, to be compared by an assertion that only debugging turns on.
        unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
        replaced.setattr(interpreter.interpreter_builder, "options", unchecked)
        yield
