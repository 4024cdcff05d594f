"""What the Triton kernels compile to, on any machine: limits on sm_90, and the committed table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sdesolve_kernels.report import TABLE, architectures, compare, hold

ROOT = Path(__file__).parents[2]
# Half a minute's worth; `python -m sdesolve_kernels.report --check` holds all of it against the table.
KERNELS = "image (float32|bfloat16)|^(normal|euler_maruyama_step) |:norms (odd|short)"


def compiled(tmp_path_factory, *arguments):
    """Figures from a process of its own: this one may be interpreting, and workers import the main module again."""
    file = tmp_path_factory.mktemp("report") / "figures.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "sdesolve_kernels.report", "--json", str(file), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    return compiled(tmp_path_factory, "--arch", "90", "--only", KERNELS)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    chosen = [str(architecture) for architecture in architectures() if architecture != 90]
    return compiled(tmp_path_factory, "--arch", *chosen, "--only", "^euler_maruyama_step image (float32|bfloat16)")


def all_rows(*tables):
    return [(label, row) for table in tables for rows in table["figures"].values() for label, row in rows.items()]


def test_no_spills_no_local_memory(hopper, others):
    for label, row in all_rows(hopper, others):
        assert row["spills"] == 0, label
        assert row["local"] == 0, label


def test_wide_accesses(hopper, others):
    """128 bits for contiguous rows of whole Philox blocks, in every dtype."""
    contiguous = [(label, row) for label, row in all_rows(hopper, others) if " image " in label or " short " in label]
    for kernel in (
        "normal",
        "euler_maruyama_step",
        "linear_step",
        "perturb",
        "langevin_step:langevin",
        "dsm_loss:denoising",
    ):
        for dtype in ("float32", "bfloat16"):
            assert any(label == f"{kernel} image {dtype}" for label, _ in contiguous)
    for label, row in contiguous:
        op = label.split(" ")[0]
        if row["per_element"] is None:
            continue
        if op not in ("normal", "uniform", "words"):
            assert row["load_bits"] == 128, label
        if "norms" not in op and op not in ("dsm_loss/value:denoising", "dsm_loss/groups:denoising"):  # sums alone
            assert row["store_bits"] == 128, label


@pytest.mark.parametrize(
    ("kernel", "states", "coefficients"),
    [
        ("normal", 1, 0),
        ("euler_maruyama_step", 3, 0),
        ("euler_maruyama_step/diagonal", 4, 0),
        ("linear_step", 3, 0),
        ("linear_step/4-terms", 6, 0),
        ("linear_step/no-noise", 4, 0),
        ("perturb", 2, 2),
        ("langevin_step:langevin", 3, 0),
        ("dsm_loss:denoising", 2, 0),
        ("dsm_loss/data:denoising", 3, 0),
    ],
)
def test_every_state_moves_in_128_bits(hopper, kernel, states, coefficients):
    """As many accesses as the states' bytes need: eight elements a thread, and coefficients of the sample."""
    for dtype, per_state in (("float32", 2), ("bfloat16", 1)):
        row = hopper["figures"]["sm_90"][f"{kernel} image {dtype}"]
        assert row["accesses"] == states * per_state + coefficients


def test_nothing_passes_through_shared_memory(hopper):
    """But the sums of a row, float64 and int64 (a lane holds two accesses), and rows that start inside a block."""
    for label, row in all_rows(hopper):
        op, shape, dtype = label.split(" ")
        elementwise = op.split("/")[0] in ("normal", "uniform", "euler_maruyama_step", "linear_step", "perturb")
        if (elementwise or op.endswith(":langevin")) and shape != "odd" and dtype != "float64":
            assert (row["barriers"], row["shared"]) == (0, 0), label


def test_instructions(hopper):
    rows = hopper["figures"]["sm_90"]
    assert rows["normal image float32"]["per_element"] <= 22
    assert rows["normal image bfloat16"]["per_element"] <= 22
    for shape in ("image", "short"):
        assert rows[f"euler_maruyama_step {shape} float32"]["per_element"] <= 32
    assert rows["euler_maruyama_step/device-index image float32"]["per_element"] <= 32
    # the loop and what surrounds it, for a tensor of 4096 images of 32 x 32: eight tiles a program, 8 elements a thread
    whole = rows["euler_maruyama_step image float32"]
    assert whole["per_element"] + whole["once"] / 64 <= 32


def test_no_worse_than_the_committed_table(hopper, others):
    committed = json.loads(TABLE.read_text())
    for version, figures in committed.items():
        assert figures.keys() >= {"sm_80", "sm_90"}, version
        for rows in figures.values():
            assert rows.keys() == committed["3.7.1"]["sm_90"].keys(), version
    chosen = {label for label in committed["3.7.1"]["sm_90"] if re.search(KERNELS, label)}
    assert hopper["figures"]["sm_90"].keys() == chosen
    for table in (hopper, others):
        assert hold(table["figures"], table["triton"], committed) == []


def test_the_pinned_triton_is_in_the_table():
    pinned = re.search(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned[1] in json.loads(TABLE.read_text())


def test_comparison_sees_what_got_worse():
    row = {"registers": 40, "spills": 0, "local": 0, "shared": 0, "barriers": 0, "load_bits": 128, "store_bits": 128,
           "accesses": 6, "per_element": 26.0, "once": 100}  # fmt: skip
    for change in ({"per_element": 29.0}, {"spills": 4}, {"local": 8}, {"store_bits": 64}, {"barriers": 1}):
        assert len(compare({"k": {**row, **change}}, {"k": row})) == 1, change
    assert compare({"k": {**row, "per_element": 28.0}, "new": row}, {"k": row}) == []


def test_other_versions_of_triton_are_held_by_instructions_alone():
    row = {"registers": 40, "spills": 0, "local": 0, "shared": 0, "barriers": 0, "load_bits": 128, "store_bits": 128,
           "accesses": 6, "per_element": 20.0, "once": 100}  # fmt: skip
    table = {v: {"sm_90": {"k": {**row, "per_element": n}}} for v, n in (("3.2.0", 40.0), ("3.9.0", 20.0))}
    for change, version, complaints in (
        ({"per_element": 24.0, "registers": 80}, "3.10.0", 0),  # after 3.9, not between 3.1 and 3.2
        ({"per_element": 26.0}, "3.10.0", 1),
        ({"per_element": 26.0}, "3.7.1", 0),
        ({"per_element": 51.0}, "3.7.1", 1),
        ({"per_element": 51.0}, "3.0.0", 1),
        ({"per_element": 20.0, "registers": 80}, "3.9.0", 1),
    ):
        found = {"sm_90": {"k": {**row, **change}, "new": row}}
        assert len(hold(found, version, table)) == complaints, (change, version)
