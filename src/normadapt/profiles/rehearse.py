"""Showing a model its inputs, as they are and changed: the visitors that look on, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normadapt.domains.clusters import spherical_clusters
from normadapt.domains.describe import describe, first_moments
from normadapt.domains.places import PlaceSettings, measure_places
from normadapt.layers.hooks import SiteHook
from normadapt.layers.moments import InstanceMoments, gather_evidence, instance_moments
from normadapt.layers.reference import Reference
from normadapt.layers.sites import Fingerprint
from normadapt.profiles.rehearsals import Rehearsal
from normadapt.profiles.site_prior import ProfileSettings, Scatter, measure_scatter, site_prior
from normadapt.profiles.source_profile import SiteProfile, SourceProfile

_CLUSTERS = 10  # of features, at most, where the output gives no classes
_FEATURE_DIRECTIONS = 8  # principal directions in which they are looked for


class Looking:
    """Reads every site's instance moments during a pass, under the statistics that the layers have."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None
        self.moments: dict[int, list[Tensor]] = {}
        self.order: list[int] = []

    def step(self, hook: SiteHook, x: Tensor) -> None:
        """Remember the moments of a site; a site that is called again adds to its own."""
        if hook.index not in self.moments:
            self.order.append(hook.index)
        evidence, _ = gather_evidence(x, self.bad)
        values = torch.full((2, x.shape[0], x.shape[1]), float("nan"), dtype=torch.float64, device=x.device)
        if evidence is not None:
            if evidence.kept is None:
                values = evidence.instances.values
            else:
                values[:, evidence.kept] = evidence.instances.values
                self.bad = ~evidence.kept
        self.moments.setdefault(hook.index, []).append(values)

    def first(self, rows: int) -> Tensor | None:
        """Moments (2, rows, C) at the first call of the first site, by which places are found."""
        return grouped(self.moments[self.order[0]][0], rows) if self.order else None

    def of(self, index: int, rows: int) -> Tensor | None:
        """Moments (2, rows, C) of a site, pooled over its calls and over rows that belong to one instance."""
        calls = self.moments.get(index)
        return None if not calls else pooled([grouped(values, rows) for values in calls])


def grouped(values: Tensor, rows: int) -> Tensor:
    """Moments (2, rows, C) of instances from those of (2, k rows, C) parts of them, such as views or tokens.

    Raises:
        ValueError: If the number of parts is no multiple of the instances.
    """
    parts = values.shape[1]
    if parts == rows:
        return values
    if rows == 0 or parts % rows:
        raise ValueError(f"a site was given {parts} rows for {rows} instances")
    split = values.unflatten(1, (rows, parts // rows))
    mean = split[0].mean(1)
    return torch.stack((mean, split[1].mean(1) + split[0].var(1, correction=0)))


def pooled(calls: Sequence[Tensor]) -> Tensor:
    """Moments (2, n, C) over several calls of a layer in one pass, each as heavy."""
    if len(calls) == 1:
        return calls[0]
    every = torch.stack(tuple(calls))
    mean = every[:, 0].mean(0)
    return torch.stack((mean, every[:, 1].mean(0) + every[:, 0].var(0, correction=0)))


class OwnMoments:
    """Normalizes every site by the moments of all that it has been shown so far: the self-consistent shift of a domain.

    Args:
        references: Where shifts are measured from, by site.
        place_site: Index of the site that tells domains apart, or None while it is not known.
    """

    def __init__(self, references: Sequence[Reference], place_site: int | None) -> None:
        self.references = references
        self.place_site = place_site
        self.first: list[Tensor] = []
        self._begun = False
        self._sums: dict[int, tuple[float, Tensor]] = {}

    def ended(self, rows: int) -> None:
        """A chunk of this many instances has passed: the next call of the first site is of other instances."""
        if self._begun:
            self.first[-1] = grouped(self.first[-1], rows)
        self._begun = False

    def step(self, hook: SiteHook, x: Tensor) -> None:
        """Add a site's input to its sums, and use what they say."""
        values = instance_moments(x).values.nan_to_num(0.0, 0.0, 0.0)
        if hook.index == self.place_site and not self._begun:  # a later call of it does not tell domains apart
            self.first.append(values)
            self._begun = True
        sums = torch.stack((values[0].sum(0), (values[1] + values[0].square()).sum(0)))
        count, before = self._sums.get(hook.index, (0.0, torch.zeros_like(sums)))
        self._sums[hook.index] = count + x.shape[0], before + sums
        hook.install(self.references[hook.index].buffers(self.shift(hook.index), hook.source))

    def shift(self, index: int) -> Tensor:
        """Shift (2C,) of a site so far."""
        count, sums = self._sums[index]
        mean, second = sums / count
        return self.references[index].shift_of(mean, second - mean.square())

    def __contains__(self, index: object) -> bool:
        return index in self._sums


@dataclass
class Inputs:
    """Inputs in the chunks in which they are shown, and what is known of their channels.

    Args:
        items: Arguments and keywords of each chunk.
        lengths: Instances in each.
        mean, deviation: Of each channel (c,), over all of them; (0,) where there is not one input tensor.
    """

    items: list[tuple[tuple[Any, ...], Mapping[str, Any]]]
    lengths: list[int]
    mean: Tensor
    deviation: Tensor

    @property
    def described(self) -> bool:
        """Whether the inputs are one tensor that can be described and changed."""
        return self.mean.numel() > 0


def standardized(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Inputs (n, c, ...) in the source's own units, a channel each; features (n, c) in common ones."""
    shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
    return (x - mean.to(x).view(shape)) / deviation.to(x).view(shape)


def changed_item(
    item: tuple[tuple[Any, ...], Mapping[str, Any]], change: Rehearsal, inputs: Inputs
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a model with its input changed."""
    args, kwargs = item

    def change_one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not inputs.described:
            return change(value)
        shape = (1, -1, *(1 for _ in range(value.dim() - 2)))
        moved = change(standardized(value, inputs.mean, inputs.deviation))
        if not isinstance(moved, Tensor) or moved.shape != value.shape:
            got = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise ValueError(f"a rehearsal must return a tensor of the same shape {tuple(value.shape)}; got {got}")
        return moved * inputs.deviation.to(value).view(shape) + inputs.mean.to(value).view(shape)

    return tuple(map(change_one, args)), {key: change_one(value) for key, value in kwargs.items()}


def input_moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (c,) of each channel of inputs (n, c, ...); of features (n, c) each over the instances."""
    sums = squares = torch.zeros(0)
    count = 0
    for x in tensors:
        flat = x.detach().double().transpose(0, 1).flatten(1)
        total = torch.stack((flat.sum(1), flat.square().sum(1)))
        sums, squares = (total[0], total[1]) if count == 0 else (sums + total[0], squares + total[1])
        count += flat.shape[1]
    mean = sums / count
    return mean, (squares / count - mean.square()).clamp_min(1e-12).sqrt()


@dataclass
class Shown:
    """What the source's inputs looked like to the model, unchanged.

    Args:
        moments: (2, n, C) of every site that was reached; None where not.
        order: Indices of the sites in the order in which they were reached.
        calls: How often each site was called in one pass.
        labels: Predicted classes (n,), -1 where unknown.
        probabilities: (n, K) of these; None where the output gives none.
    """

    moments: list[Tensor | None]
    order: list[int]
    calls: Mapping[int, int]
    labels: Tensor
    probabilities: Tensor | None


@dataclass
class Rehearsed:
    """What one change did.

    Args:
        shifts: Shift (2C,) of every site; None where it was not reached.
        features: Of its instances (m, p), for places.
        look: Mean description (p',); (0,) where inputs are not described.
    """

    shifts: list[Tensor | None]
    features: Tensor
    look: Tensor


def features_of(
    items: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    first: Tensor,
    reference: Reference,
    inputs: Inputs,
    tensor_of: Callable[[Any], Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Features (n, p) by which places are found, and the mean description (p',) of the inputs."""
    moments = first_moments(InstanceMoments(first), reference.mean, reference.variance).cpu()
    if not inputs.described:
        return moments, torch.zeros(0, dtype=torch.float64)
    rows = []
    for item in items:
        x = tensor_of(item)
        if x is not None:
            rows.append(describe(standardized(x, inputs.mean, inputs.deviation)).cpu())
    described = torch.cat(rows).nan_to_num(0.0, 0.0, 0.0)
    return torch.cat((described, moments), 1), described.mean(0)


def feature_clusters(shown: Shown, references: Sequence[Reference]) -> tuple[Tensor, float, Tensor]:
    """Clusters of the last site's instance means: centres (K, C), their width a channel, and labels (n,)."""
    values = shown.moments[shown.order[-1]]
    if values is None:
        return torch.zeros(0, 0, dtype=torch.float64), 0.0, shown.labels
    reference = references[shown.order[-1]]
    y = ((values[0] - reference.mean) / reference.variance.sqrt()).double().cpu()
    centred = y - y.mean(0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    labels = torch.from_numpy(spherical_clusters((centred @ right[:_FEATURE_DIRECTIONS].T).numpy(), _CLUSTERS))
    count = int(labels.max()) + 1
    centres = torch.stack([y[labels == k].mean(0) for k in range(count) if bool((labels == k).any())])
    labels = torch.cdist(y, centres).argmin(1)
    width = float((y - centres[labels]).square().mean().sqrt())
    return centres, max(width, 1e-6), labels


def assemble(
    hooks: Sequence[SiteHook],
    identity: Fingerprint,
    shown: Shown,
    scatters: Sequence[Scatter | None],
    base: Rehearsed,
    met: Mapping[str, Rehearsed],
    own_features: Tensor,
    inputs: Inputs,
    clusters: tuple[Tensor, float],
    excluded: int,
    settings: tuple[ProfileSettings, PlaceSettings],
    *,
    from_stream: bool,
) -> tuple[SourceProfile, bool]:
    """The profile, and whether a stream's first inputs were found to be of several domains."""
    profile_settings, place_settings = settings
    if shown.probabilities is not None and not from_stream:
        frequencies = shown.probabilities.double().mean(0).cpu()
    elif shown.probabilities is not None:
        frequencies = torch.full((shown.probabilities.shape[1],), 1 / shown.probabilities.shape[1], dtype=torch.float64)
    elif clusters[0].shape[0] > 1:
        frequencies = torch.bincount(shown.labels, minlength=clusters[0].shape[0]).double()
        frequencies /= frequencies.sum()
    else:
        frequencies = torch.zeros(0, dtype=torch.float64)
    changed = [one.features for one in met.values()]
    labels = shown.labels[: len(own_features)].cpu()
    found = measure_places(own_features, changed, labels, frequencies, place_settings, from_stream=from_stream)
    sites: dict[str, SiteProfile] = {}
    unexplained = []
    for hook, scatter in zip(hooks, scatters, strict=True):
        if scatter is None:
            continue
        index = hook.index
        rows = []
        for one in met.values():
            shift, unchanged = one.shifts[index], base.shifts[index]
            if shift is not None and unchanged is not None:
                rows.append(shift - unchanged)
        shifts = torch.stack(rows) if rows else scatter.mean.new_zeros(0, 2 * scatter.mean.numel())
        between, within, squares = _spread_parts(scatter, hook.source.channel_weight)
        sites[hook.source.name] = SiteProfile(
            count=shown.labels.numel(),
            mean=scatter.mean,
            variance=scatter.variance,
            reference=scatter.reference,
            prior=site_prior(scatter, shifts, profile_settings),
            between=between,
            within=within,
            squares=squares,
            calls=shown.calls.get(index, 1),
        )
        unexplained.append(scatter.unexplained)
    looks = [base.look, *(one.look for one in met.values())]
    profile = SourceProfile(
        model_name=identity.model_name,
        fingerprint=identity.digest,
        count=shown.labels.numel(),
        class_frequencies=frequencies,
        sites=sites,
        places=found.places,
        place_site=hooks[shown.order[0]].source.name,
        input_mean=inputs.mean.cpu(),
        input_deviation=inputs.deviation.cpu(),
        rehearsals=tuple(met),
        looks=torch.stack(looks) if inputs.described else torch.zeros(0, 0, dtype=torch.float64),
        clusters=clusters[0],
        cluster_width=clusters[1],
        cluster_site=hooks[shown.order[-1]].source.name if clusters[0].shape[0] > 1 else "",
        unlikeness=(sum(unexplained) / len(unexplained)) ** 0.5,
        excluded=excluded,
    )
    return profile, found.several


def measure_all(
    hooks: Sequence[SiteHook],
    shown: Shown,
    classes: int,
    settings: ProfileSettings,
    *,
    from_stream: bool,
    groups: Tensor | None = None,
) -> list[Scatter | None]:
    """Scatter at every site that was reached; within the domains (n,) of the inputs where `groups` tells them."""
    found: list[Scatter | None] = []
    for hook in hooks:
        values = shown.moments[hook.index]
        labels = shown.labels
        found.append(
            None
            if values is None
            else measure_scatter(
                values, labels.to(values.device), classes, hook.source, settings, from_stream=from_stream, groups=groups
            )
        )
    return found


def _spread_parts(scatter: Scatter, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Between and within (2, C), and the traces (2, 3) of BB, BW and WW under channel weights, for scalar rules."""
    channels = weight.numel()
    root = weight.sqrt().unsqueeze(1)
    rows = []
    for part in (slice(0, channels), slice(channels, 2 * channels)):
        b, w, own = scatter.between[part] * root, scatter.within[part] * root, scatter.extra[part] * weight
        bb = _overlap(b, b) + 2 * (own * b.square().sum(1)).sum() + own.square().sum()
        rows.append(torch.stack((bb, _overlap(b, w) + (own * w.square().sum(1)).sum(), _overlap(w, w))))
    between = (scatter.between.square().sum(1) + scatter.extra).view(2, channels)
    return between, scatter.within.square().sum(1).view(2, channels), torch.stack(rows)


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """tr(A B) of the covariances A, B whose factors (C, m) these are, by way of the smaller matrix."""
    if one.shape[1] * other.shape[1] <= one.shape[0] ** 2:
        return (one.T @ other).square().sum()
    return ((one @ one.T) * (other @ other.T)).sum()
