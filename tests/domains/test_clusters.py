"""How many domains a set of places comes from."""

import numpy as np
import pytest

from normadapt.domains.clusters import spherical_clusters


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_as_many_as_there_are_and_each_in_one(count):
    draw = np.random.default_rng(count)
    truth = np.arange(120) % count
    places = 12 * np.eye(6)[truth] + draw.standard_normal((120, 6))
    labels = spherical_clusters(places)
    pairs = set(zip(truth.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == count


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_and_equal_places_are_one(n):
    assert set(spherical_clusters(np.ones((n, 3))).tolist()) == {0}


def test_the_order_of_the_inputs_only_renames():
    places = np.random.default_rng(0).standard_normal((60, 4))
    places[30:, 0] += 15
    order = np.random.default_rng(1).permutation(60)
    one, other = spherical_clusters(places)[order], spherical_clusters(places[order])
    assert len(set(zip(one.tolist(), other.tolist(), strict=True))) == 2
