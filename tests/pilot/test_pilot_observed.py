"""Who looks on at a pilot sees how both models agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()


def batch(n: int = 8) -> Tensor:
    return torch.randn(n, 1, 8, 8)


def test_a_pilot_shows_how_both_models_agree() -> None:
    pilot, seen = Pilot(model(), plan=Plan(guards=(Disagreement(), NonFinite()))), []
    with pilot.observe(lambda stream, compared: seen.append((stream, compared))):
        pilot(batch(), stream="left")
    pilot(batch())
    [(stream, compared)] = seen
    assert stream == "left"
    assert compared.items == 8
    assert 0 <= compared.agreeing <= 8
    assert compared.time == pytest.approx(pilot.now(), abs=60)
