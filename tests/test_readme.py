"""The README's first example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_runs_verbatim(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12, "the opening example is meant to be read at a glance"
    scope: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), scope)
    printed = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert isinstance(scope["x"], torch.Tensor)
    # Sliced distances between two true samples of this size are about 0.04; the example's own are to be like them.
    assert len(printed) == 2
    assert all(0 < number < 0.15 for number in printed)


def test_links_lead_somewhere():
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (root / target).exists(), target
