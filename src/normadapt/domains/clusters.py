"""How many domains a set of places comes from: spherical clusters of one width, their number by the BIC."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_TRIES, _ROUNDS = 4, 30


def spherical_clusters(places: NDArray[np.float64], most: int = 8, seed: int = 0) -> NDArray[np.int64]:
    """Labels (n,) of the clusters with the largest Bayesian information criterion.

    Clusters are spheres of one width with shares of their own; each instance belongs to the nearest (k-means, begun at
    random several times), so that the criterion is that of a hard assignment.

    Args:
        places: (n, r).
        most: Clusters at most.
        seed: Of the beginnings.

    References:
        Schwarz (1978), Ann. Statist. 6(2), 461-464; Arthur and Vassilvitskii (2007), k-means++.
    """
    n, r = places.shape
    draw = np.random.default_rng(seed)
    best, labels = -math.inf, np.zeros(n, dtype=np.int64)
    for count in range(1, min(most, n) + 1):
        for _ in range(_TRIES if count > 1 else 1):
            centres = _begin(places, count, draw)
            for _ in range(_ROUNDS):
                nearest = _distances(places, centres).argmin(1)
                centres = np.stack(
                    [
                        places[nearest == k].mean(0) if (nearest == k).any() else places[draw.integers(n)]
                        for k in range(count)
                    ]
                )
            distances = _distances(places, centres)
            nearest = distances.argmin(1)
            squares = float(distances[np.arange(n), nearest].sum())
            share = np.bincount(nearest, minlength=count) / n
            variance = max(squares / max((n - count) * r, 1), 1e-12)
            fit = -0.5 * n * r * math.log(variance) - 0.5 * squares / variance + float(np.log(share[nearest]).sum())
            criterion = fit - 0.5 * (count * r + count) * math.log(n)
            if criterion > best:
                best, labels = criterion, nearest
    return labels


def _begin(places: NDArray[np.float64], count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    centres = places[[int(draw.integers(len(places)))]]
    while len(centres) < count:
        squares = _distances(places, centres).min(1)
        total = squares.sum()
        p = squares / total if total > 0 else None
        centres = np.vstack((centres, places[[int(draw.choice(len(places), p=p))]]))
    return centres


def _distances(places: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(((places[:, None] - centres[None]) ** 2).sum(2))
