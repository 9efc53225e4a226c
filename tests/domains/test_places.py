"""Where inputs lie: rehearsed domains apart, the source at 0, natural scatter 1."""

import math

import pytest
import torch

from normadapt.domains.describe import describe
from normadapt.domains.places import PlaceSettings, measure_places
from normadapt.profiles.rehearsals import rehearsals_for

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MOVES = {"gain": (0, 3.0), "offset": (1, -4.0), "blur": (2, 5.0)}


def features(n, seed, move=None):
    """Eight features (n, 8), correlated and of different sizes, of which a change moves one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g, dtype=torch.float64)
    x[:, 3] += 0.8 * x[:, 0]
    if move is not None:
        x[:, MOVES[move][0]] += MOVES[move][1]
    return 3 + x * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 5.0, 1.0, 1.0], dtype=torch.float64)


def measured(labels=None, **settings):
    labels = torch.full((300,), -1) if labels is None else labels
    rehearsed = [features(300, 0, move) for move in MOVES]  # row i is of input i
    return measure_places(features(300, 0), rehearsed, labels, PI, PlaceSettings(**settings))


def test_new_inputs_lie_where_their_domain_does():
    places = measured().places
    unchanged = places.of(features(400, 1))
    torch.testing.assert_close(unchanged.mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=0.25)
    assert float(unchanged.var(0).mean()) < 1.3
    centres = [unchanged.mean(0)] + [places.of(features(400, 2 + k, move)).mean(0) for k, move in enumerate(MOVES)]
    assert float(torch.pdist(torch.stack(centres)).min()) > 2.5
    for known, centre in zip(places.known, centres[1:], strict=True):
        assert float((known - centre).norm()) < 0.15 * float(known.norm())


def test_natural_scatter_is_one_and_directions_do_not_depend_on_units():
    places = measured(ridge=1e-9).places
    pooled = torch.stack(
        [places.of(f).T.cov() for f in (features(300, 0), *(features(300, 0, m) for m in MOVES))]
    ).mean(0)
    torch.testing.assert_close(pooled, torch.eye(8, dtype=torch.float64), rtol=0, atol=0.02)
    scale = torch.logspace(-2, 2, 8, dtype=torch.float64)
    moved = [features(300, 0, move) * scale - 7 for move in MOVES]
    other = measure_places(
        features(300, 0) * scale - 7, moved, torch.full((300,), -1), PI, PlaceSettings(ridge=1e-9)
    ).places
    mine, theirs = places.of(features(50, 3)), other.of(features(50, 3) * scale - 7)
    torch.testing.assert_close(mine[:, :3].abs(), theirs[:, :3].abs(), rtol=1e-4, atol=1e-4)


def test_only_the_leading_directions_are_kept():
    places = measured(directions=3).places
    assert places.discriminants.shape == (8, 3)
    assert places.scatter.tolist() == sorted(places.scatter.tolist(), reverse=True)
    assert float(places.scatter.min()) > 2  # three changes: three directions stand out
    assert float(measured().places.scatter[3]) < 1.1


def test_where_the_classes_lie_by_hand():
    labels = torch.arange(300) % 3
    places = measured(labels).places
    own = places.of(features(300, 0))
    own = own - own.mean(0)
    expected = sum(float(PI[k]) * torch.outer(own[labels == k].mean(0), own[labels == k].mean(0)) for k in range(3))
    torch.testing.assert_close(places.classes, expected)


def test_far_features_count_as_logarithms():
    """A change ten times as large lies farther away, but not ten times as far."""
    places = measured().places
    near, far = features(1, 4), features(1, 4)
    near[0, 0], far[0, 0] = 3 + 10, 3 + 1e6
    distance, farther = (float(places.of(x).norm()) for x in (near, far))
    assert distance < farther < 8 * distance
    assert math.isfinite(farther)


DOMAINS = (lambda x: x, lambda x: 0.3 * x - 1, lambda x: x + 2, lambda x: -1.5 * x, lambda x: 0.2 * x + 1.5)


def first_inputs(count):
    """The first 64 images of a stream of so many domains, measured with the default rehearsals, and whose they are."""
    domain, g = torch.arange(64) % count, torch.Generator().manual_seed(1)
    images = 0.15 * torch.randn(64, 2, 1, 1, generator=g) + torch.randn(64, 2, 10, 10, generator=g)
    x = torch.stack([DOMAINS[k](image) for image, k in zip(images, domain.tolist(), strict=True)])
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    rehearsed = [describe(change(x)) for change in rehearsals_for(4).values()]
    nobody = torch.full((64,), -1), torch.zeros(0)
    found = measure_places(describe(x), rehearsed, *nobody, PlaceSettings(), from_stream=True)
    return found, domain, found.places.of(describe(x))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_streams_first_inputs_of_several_domains_are_told_apart(count):
    found, domain, own = first_inputs(count)
    assert found.several
    assert len(found.groups.unique()) >= 2
    centres = torch.stack([own[domain == k].mean(0) for k in range(count)])
    assert float(torch.pdist(centres).min()) > 2.5
    scatter = torch.stack([own[domain == k].var(0).mean() for k in range(count)])
    assert float(scatter.max()) < 1.5


def test_a_streams_first_inputs_of_one_domain_are_taken_for_that_and_their_scatter_is_widened():
    found, _, own = first_inputs(1)
    assert not found.several
    assert len(found.groups.unique()) == 1
    assert float(own.var(0).mean()) < 1 / 2.5
