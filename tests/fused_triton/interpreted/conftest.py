"""Nothing is collected here unless Triton interprets: `test_interpreter.py` starts a process where it does."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
