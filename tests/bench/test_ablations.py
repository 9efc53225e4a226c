from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import normadapt as na
from models import NET, calibrate
from normadapt.bench.ablations import ABLATED
from normadapt.bench.methods import ABLATIONS, METHODS
from normadapt.policies import Policy
from normadapt.layers.predictions import Predictions

POLICIES = dict(ABLATED)
BOTH = pytest.mark.parametrize("profiled", [False, True], ids=["learned", "profile"])


def images(n: int, seed: int, offset: float = 0.0) -> Tensor:
    """Source images, whose instances differ in level and contrast, and a shift of their level."""
    return NET.source(n, seed=seed) + offset


def two_domains(n: int) -> Tensor:
    """Two domains, apart in level and contrast: without a profile only contrasts tell a mixture early."""
    sign = torch.randint(2, (n, 1, 1, 1), generator=torch.Generator().manual_seed(4)) * 2.0 - 1
    return images(n, 5) * 2.2**sign + sign


@cache
def model() -> tuple[nn.Module, na.SourceProfile]:
    net = NET.model().requires_grad_(False)
    calibrate(net, lambda: net(images(4000, 77)))
    return net, na.profile_source(net, [images(1000, 78)])


def always_the_rarest(output: Tensor) -> Tensor:
    frequencies = model()[1].class_frequencies
    assert frequencies is not None
    return one_hot(frequencies.argmin().expand(len(output)), 4).float()


def all_in_turn(output: Tensor) -> Tensor:
    return one_hot(torch.arange(len(output)) % 4, 4).float()


def run(
    policy: Policy | None, batches: Sequence[Tensor], profiled: bool, predictions: Predictions | None = None
) -> tuple[na.AdaptedModel, list[str], Tensor]:
    """The adapted model, the statuses of its sites after every batch, and all outputs."""
    net, profile = model()
    adapted, statuses, outputs = na.adapt(net, profile if profiled else None, policy, predictions=predictions), [], []
    for batch in batches:
        outputs.append(adapted(batch))
        statuses += [site.status for site in adapted.report().sites]
    return adapted, statuses, torch.cat(outputs)


def weight(adapted: na.AdaptedModel) -> float:
    value = adapted.report().sites[0].mean_weight
    assert value is not None
    return value


def test_names_and_rows() -> None:
    names = [name for name, _ in ABLATED]
    assert len(set(names)) == len(names) == len({repr(policy) for _, policy in ABLATED}) == 10
    assert set(ABLATIONS) == {name + end for name in names for end in ("", " + profile")}
    assert not set(ABLATIONS) & set(METHODS)
    for name, method in ABLATIONS.items():
        assert (method.name, method.role, method.uses_profile) == (name, "ablation", name.endswith(" + profile"))
        assert method.make.policy is POLICIES[name.removesuffix(" + profile")]  # type: ignore[attr-defined]
    assert len({method.setting for method in ABLATIONS.values()} | {METHODS["Track"].setting}) == 21


@pytest.mark.parametrize(
    "name",
    ABLATIONS,
)
def test_every_ablation_adapts_and_answers(name: str) -> None:
    (net, profile), method = model(), ABLATIONS[name]
    answer = method.make(net, profile if method.uses_profile else None)
    for n in (1, 4, 32):
        for i in range(4):
            output = answer(images(n, 50 + i, 3.0 * (i > 1)))
            assert output.shape == (n, 4)
            assert bool(output.isfinite().all())
    assert not torch.allclose(output, net(images(32, 53, 3.0)))


@pytest.mark.parametrize("profiled", [False, True])
def test_without_the_jump_test_the_window_outlives_a_jump(profiled: bool) -> None:
    batches = [*images(160, 1).split(16), *images(48, 2, 1.5 if profiled else 3.0).split(16)]
    ours, statuses, _ = run(None, batches, profiled)
    assert "new window" in statuses
    theirs, statuses, _ = run(POLICIES["Track, no jump test"], batches, profiled)
    assert "new window" not in statuses
    both = [m.state_dict()["1.running_mean"] - model()[0][1].running_mean for m in (ours, theirs)]
    assert float(both[1].norm()) < 0.5 * float(both[0].norm())


@BOTH
def test_without_a_window_there_is_only_the_last_batch(profiled: bool) -> None:
    batches = images(160, 1, 0.8).split(8)
    for name, count in ((None, 160), ("Track, no window", 8)):
        state = run(POLICIES[name] if name else None, batches, profiled)[0].snapshot()
        assert float(state["stream|0|site|1|state|count#"]) == count


@BOTH
def test_without_the_significance_test_chance_is_followed(profiled: bool) -> None:
    kept = []
    for policy in (None, POLICIES["Track, no significance test"]):
        statuses = [
            s
            for x in ((0.0, 0.15, 0.2) if profiled else (0.0, 0.25, 0.35))
            for s in run(policy, images(160, 1, x).split(8), profiled)[1]
        ]
        kept.append(sum(status.startswith("source") for status in statuses) / len(statuses))
    assert kept[0] > 0.8
    assert kept[1] < (0.5 if profiled else kept[0])  # what is learned is wide: it has little to add to it


def test_without_the_predicted_classes_a_balanced_stream_is_known_less_well() -> None:
    batches = images(120, 1, 0.8).split(8)
    ours, _, outputs = run(None, batches, True)
    theirs, _, others = run(POLICIES["Track, no predicted classes"], batches, True)
    assert weight(theirs) < weight(ours) - 0.03
    assert not torch.equal(outputs, others)


def test_without_a_second_reading_a_first_batch_of_all_classes_counts_less() -> None:
    batches = [images(64, 1, 0.8)]
    ours, theirs = (
        run(policy, batches, True, all_in_turn)[0] for policy in (None, POLICIES["Track, no second reading"])
    )
    assert weight(theirs) < weight(ours) - 0.03


@BOTH
def test_without_the_measured_correlation_nothing_frees_a_model_that_predicts_one_class(profiled: bool) -> None:
    batches = images(120, 1, 0.5).split(8)
    ours = run(None, batches, profiled, always_the_rarest)[0]
    theirs = run(POLICIES["Track, no measured correlation"], batches, profiled, always_the_rarest)[0]
    assert weight(theirs) == 0 < (0.7 if profiled else 0.3) < weight(ours)


@BOTH
@pytest.mark.parametrize("n", [1, 4])
def test_without_instances_of_their_own_two_domains_share_statistics(profiled: bool, n: int) -> None:
    batches = two_domains(64 if profiled else 160).split(n)
    _, statuses, outputs = run(None, batches, profiled)
    assert any("per instance" in status for status in statuses)
    adapted, shared, others = run(POLICIES["Track, no instances of their own"], batches, profiled)
    assert not any("per instance" in status for status in shared)
    assert not torch.equal(outputs, others)
    assert any(status == "tracking" for status in shared) or weight(adapted) == 0
