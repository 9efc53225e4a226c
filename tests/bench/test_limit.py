from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.fake import data, model
from normadapt.bench.limit import true_statistics
from normadapt.errors import NormadaptError


def _statistics(net: nn.Module) -> list[torch.Tensor]:
    return [b for m in net.modules() if isinstance(m, nn.BatchNorm2d) for b in (m.running_mean, m.running_var)]


def test_every_layer_sees_standardized_input() -> None:
    images, _ = data("faint", 200, 0)
    net = true_statistics(model(), images)
    seen: list[torch.Tensor] = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, _, y: seen.append((y - m.bias[:, None, None]) / m.weight[:, None, None])
            )
    assert not net.training
    net(images)
    assert len(seen) == 2
    for values in seen:
        assert values.mean((0, 2, 3)).abs().max() < 1e-5
        assert (values.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3  # eps


@pytest.mark.parametrize("budget", [20_000, 3_000])
def test_chunks_change_nothing(budget: int) -> None:
    images, _ = data("bright", 200, 0)
    whole, parts = true_statistics(model(), images), true_statistics(model(), images, budget=budget)
    for a, b in zip(_statistics(whole), _statistics(parts), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_model_is_not_changed_and_dropout_is_off() -> None:
    images, _ = data("bright", 100, 0)
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    one, two = true_statistics(net, images), true_statistics(net, images)
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    for a, b in zip(_statistics(one), _statistics(two), strict=True):
        assert torch.equal(a, b)


def test_one_instance_is_not_enough() -> None:
    with pytest.raises(NormadaptError, match="at least two instances"):
        true_statistics(model(), data("bright", 1, 0)[0])
