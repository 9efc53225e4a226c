from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import normadapt as na
from models import NET, calibrate
from normadapt.bench.ablations import ABLATED, uncorrelated
from normadapt.bench.methods import ABLATIONS, METHODS
from normadapt.layers.policy import Policy
from normadapt.weights.matrix import SitePrior

POLICIES = dict(ABLATED)


def images(n: int, seed: int, offset: float = 0.0) -> Tensor:
    """Source images, whose instances differ in level and contrast, and a shift of their level."""
    return NET.source(n, seed=seed) + offset


@cache
def model() -> tuple[nn.Module, na.SourceProfile]:
    net = NET.model().requires_grad_(False)
    calibrate(net, lambda: net(images(4000, 77)))
    return net, na.profile_source(net, list(images(1000, 78).split(100)))


def run(policy: Policy | None, batches: list[Tensor]) -> tuple[na.AdaptedModel, Tensor]:
    """The adapted model and all outputs."""
    net, profile = model()
    adapted = na.adapt(net, profile, policy)
    return adapted, torch.cat([adapted(batch) for batch in batches])


def domains(adapted: na.AdaptedModel) -> int:
    return len(adapted.domains)


def test_names_and_rows() -> None:
    names = [name for name, _ in ABLATED]
    assert len(set(names)) == len(names) == len({repr(policy) for _, policy in ABLATED})
    assert set(ABLATIONS) == {name + end for name in names for end in ("", " + profile")}
    assert not set(ABLATIONS) & set(METHODS)
    for name, method in ABLATIONS.items():
        assert (method.name, method.role, method.uses_profile) == (name, "ablation", name.endswith(" + profile"))
    assert len({method.setting for method in ABLATIONS.values()} | {METHODS["Domains"].setting}) == 2 * len(names) + 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_adapts_and_differs_from_ours(name: str) -> None:
    (net, profile), method = model(), ABLATIONS[name]
    batches = [images(n, 50 + i, 3.0 * (i > 1)) for n in (1, 16) for i in range(5)]
    answer = method.make(net, profile if method.uses_profile else None)
    outputs = torch.cat([answer(batch) for batch in batches])
    assert outputs.shape == (85, 4)
    assert bool(outputs.isfinite().all())
    if method.uses_profile:
        assert not torch.allclose(outputs, net(torch.cat(batches)))


def test_the_settings_reach_the_rule() -> None:
    batches = list(torch.cat((images(64, 1), images(64, 2, 1.0))).split(8))
    _, ours = run(None, batches)
    for name in ("no rehearsed shifts", "no residual", "no predicted classes", "no tempering", "no skewness"):
        assert not torch.equal(run(POLICIES[f"Domains, {name}"], batches)[1], ours), name


def test_without_domains_there_is_one() -> None:
    batches = [images(16, i, 4.0 * (i % 2)) for i in range(8)]
    ours, outputs = run(None, batches)
    theirs, others = run(POLICIES["Domains, no domains"], batches)
    assert domains(ours) > 1 == domains(theirs)
    assert not torch.equal(outputs, others)


def test_without_founding_a_single_stranger_has_no_domain() -> None:
    batches = [images(16, 1), *(0.1 * images(4, 2)).split(1)]
    assert domains(run(None, batches)[0]) == 2
    assert domains(run(POLICIES["Domains, no founding"], batches)[0]) == 1


def dense(prior: SitePrior, inner: Tensor, rest: Tensor) -> Tensor:
    """A covariance (2C, 2C) as its directions and the variances beyond them have it."""
    beside = torch.eye(len(prior.unit), dtype=torch.float64) - prior.basis @ prior.basis.T
    return prior.basis @ inner @ prior.basis.T + (beside * rest) @ beside


def test_without_skewness_only_the_blocks_between_locations_and_scales_are_lost() -> None:
    prior = next(iter(model()[1].sites.values())).prior
    bare = uncorrelated(prior)
    half = len(prior.unit) // 2
    zero = torch.zeros_like(prior.freedom)
    pairs = [
        (prior.shifts, zero, bare.shifts, zero),
        (prior.within, prior.within_rest, bare.within, bare.within_rest),
        (prior.between, prior.between_rest, bare.between, bare.between_rest),
    ]
    for inner, rest, new_inner, new_rest in pairs:
        before, after = dense(prior, inner, rest), dense(bare, new_inner, new_rest)
        assert float(before[:half, half:].abs().max()) > 1e-3
        assert float(after[:half, half:].abs().max()) < 1e-9
        for part in (slice(0, half), slice(half, 2 * half)):
            torch.testing.assert_close(after[part, part], before[part, part], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bare.basis.T @ bare.basis, torch.eye(bare.basis.shape[1], dtype=torch.float64))
    torch.testing.assert_close(bare.classes @ bare.basis.T, prior.classes @ prior.basis.T)
    assert float(bare.freedom.sum()) == pytest.approx(2 * half - bare.basis.shape[1], abs=1e-6)
