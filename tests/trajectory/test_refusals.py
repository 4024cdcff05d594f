"""Refusals that are kept cost no search in each call, change no result, and end when the network becomes another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sdesolve as sds
from sdesolve.integrate import fused, refusals

_PROCESS = sds.VP()


class _Switched(nn.Module):
    """Fuses once it no longer pools."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = True
        self.settings = {"deep": {"pools": False}}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.pools or self.settings["deep"]["pools"]:
            x = torch.nn.functional.avg_pool1d(x[:, None], 1)[:, 0]
        return x * 0.5


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_refusals", {})


def _drawn(net: object, **options: object) -> sds.Solution:
    score = sds.NetworkScore(net, _PROCESS)  # type: ignore[arg-type]
    found: sds.Solution = sds.sample(
        _PROCESS, score, (3, 2), solver=sds.DDIM(), steps=4, seed=0, full=True, **options
    )  # fmt: skip
    return found


def test_what_cannot_fuse_is_searched_in_few_calls(monkeypatch: pytest.MonkeyPatch, interpreted: object) -> None:
    searches: list[object] = []
    original = fused.look_into

    def counted(*roots: object, most_weights: int | None = None) -> object:
        searches.append(roots)
        return original(*roots, most_weights=most_weights)

    net = _Switched()
    first = _drawn(net)
    monkeypatch.setattr(fused, "look_into", counted)
    later = [_drawn(net) for _ in range(60)]
    assert 1 <= len(searches) <= 8
    assert {sol.stats.reason for sol in later} == {first.stats.reason}
    assert "avg_pool1d" in first.stats.reason
    assert all(torch.equal(sol.x1, first.x1) for sol in later)
    with pytest.raises(ValueError, match="avg_pool1d"):
        _drawn(net, backend="fused")


def test_a_change_at_a_glance_fuses_in_the_next_call(interpreted: object) -> None:
    net = _Switched()
    for _ in range(9):
        assert _drawn(net).stats.execution != "fused"
    net.pools = False
    assert _drawn(net).stats.execution == "fused"


def test_a_change_deep_within_fuses_after_some_calls(interpreted: object) -> None:
    net = _Switched()
    net.pools, net.settings["deep"]["pools"] = False, True
    for _ in range(40):
        assert _drawn(net).stats.execution != "fused"
    net.settings["deep"]["pools"] = False
    seen = [_drawn(net) for _ in range(refusals._LONGEST + 1)]
    assert seen[-1].stats.execution == "fused"
    eager = _drawn(net, backend="eager")
    for sol in seen:
        torch.testing.assert_close(sol.x1, eager.x1, rtol=1e-5, atol=1e-6)


def test_functions_are_known_by_what_their_code_names(interpreted: object) -> None:
    pool = torch.nn.functional.avg_pool1d

    def net(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * pool(x[:, None], 1)[:, 0]

    for _ in range(9):
        assert _drawn(net).stats.execution != "fused"
    pool = lambda x, _: 2.0 * x  # noqa: E731
    assert _drawn(net).stats.execution == "fused"


def test_another_network_in_its_place_is_asked_for_itself(interpreted: object) -> None:
    for pools in (True, False) * 3:
        net = _Switched()
        net.pools = pools
        assert (_drawn(net).stats.execution == "fused") is not pools
        del net
