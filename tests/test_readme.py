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
    # Chance in the modes' shares moves a mass of sqrt(2) / (2 sqrt(4096)) = 0.011 (one sd) over the 4.1 between them:
    # at 4 sd a distance of sqrt(0.044) * 4.1 * 0.71 (the projection's root mean square) = 0.6, for true samples too.
    assert len(printed) == 3
    assert all(0 < number < 0.6 for number in printed)


def test_links_lead_somewhere():
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (root / target).exists(), target
