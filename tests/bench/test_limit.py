from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.fake import data, model
from normadapt.bench.ceiling import Known
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


def test_the_ceiling_pools_what_each_domain_has_shown_so_far() -> None:
    """Batches of two domains in turn and mixed, against sums by hand, layer by layer."""
    net = model()
    known = Known(net)
    (bright, _), (faint, _) = data("bright", 24, 0), data("faint", 24, 0)
    batches = [
        (bright[:8], [0] * 8), (faint[:8], [1] * 8), (torch.cat((bright[8:12], faint[8:12])), [0] * 4 + [1] * 4),
        (bright[12:13], [0]),
    ]  # fmt: skip
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def by_hand(x: torch.Tensor, domain: int) -> torch.Tensor:
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                values = seen.setdefault((layers.index(module), domain), [])
                values.append(x)
                every = torch.cat(values).transpose(0, 1).flatten(1)
                mean, variance = every.mean(1), every.var(1, unbiased=False)
                scale = module.weight / (variance + module.eps).sqrt()
                x = (x - mean[:, None, None]) * scale[:, None, None] + module.bias[:, None, None]
            else:
                x = module(x)
        return x

    with torch.no_grad():
        for inputs, domains in batches:
            which = torch.tensor(domains)
            known.tell(which)
            output = known(inputs)
            for d in set(domains):
                expected = by_hand(inputs[which == d], d)
                torch.testing.assert_close(output[which == d], expected, rtol=1e-3, atol=1e-4)
