"""Measuring a source profile: one pass over source inputs, hooks that only read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normadapt.asymptotics.cumulants import Moments
from normadapt.batches import check_loader, check_model, run_model, split_length
from normadapt.errors import NormadaptError
from normadapt.predictions import Predictions, class_probabilities
from normadapt.profile import SiteProfile, SourceProfile
from normadapt.sites import Site, find_sites, fingerprint, layer_input, shared_copy
from normadapt.statistics import InstanceMoments, gather_evidence

_LEAST_DEGREES = 8  # within-class degrees of freedom below which the split between classes is not measured


class _SiteTally:
    """Sums over source instances at one site, by predicted class; linear in the instances, so splits do not matter."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.count = 0
        self._labelled = True
        mean, variance = site.buffers()
        self._reference = None if mean is None or variance is None else (mean.double(), variance.double() + site.eps)
        # Without running statistics there is no point of reference before the end: the instances wait for it.
        self._waiting: list[tuple[InstanceMoments, Tensor | None]] = []
        self._classes: dict[int, tuple[int, Tensor]] = {}
        self._squares = torch.zeros(0)
        self._moments: Moments | None = None
        self._variance = torch.zeros(0)

    def add(self, moments: InstanceMoments, labels: Tensor | None) -> None:
        if self._reference is None:
            self._waiting.append((moments, labels))
            self.count += moments.mean.shape[0]
        else:
            self._add(moments, labels, *self._reference)

    def _add(self, moments: InstanceMoments, labels: Tensor | None, mean: Tensor, variance: Tensor) -> None:
        n, channels = moments.mean.shape
        if self._squares.numel() == 0:
            self._squares = torch.zeros(2, channels, channels, dtype=torch.float64, device=moments.mean.device)
            self._variance = torch.zeros(channels, dtype=torch.float64, device=moments.mean.device)
        deviation = moments.mean - mean
        location = deviation / variance.sqrt()
        scale = ((moments.variance + deviation * deviation) / variance - 1) / 2
        values = torch.stack((location, scale))  # (2, n, C)
        self._squares += values.transpose(1, 2) @ values
        self._variance += moments.variance.sum(0)
        sample = Moments.from_sample(moments.mean)
        self._moments = sample if self._moments is None else self._moments.merge(sample)
        self.count += n
        self._labelled = self._labelled and labels is not None
        keys = torch.zeros(n, dtype=torch.int64) if labels is None else labels.cpu()
        for key in keys.unique().tolist():
            chosen = values[:, (keys == key).to(values.device)]
            number, total = self._classes.get(key, (0, 0))
            self._classes[key] = (number + chosen.shape[1], total + chosen.sum(1))

    def _settle_reference(self) -> None:
        every = torch.cat([moments.values for moments, _ in self._waiting], 1)
        mean = every[0].mean(0)
        variance = every[1].mean(0) + every[0].var(0)
        self._reference = mean, variance + self.site.eps
        self.count = 0
        for moments, labels in self._waiting:
            self._add(moments, labels, *self._reference)
        self._waiting.clear()

    def finish(self) -> SiteProfile:
        if self._waiting:
            self._settle_reference()
        if self._reference is None or self._moments is None:
            raise NormadaptError(f"profile_source(): the layer {self.site.name!r} was never reached")
        moments, n = self._moments, self.count
        variance = self._variance / n + moments.m2 / (n - 1)  # unbiased: E of the within part misses Var(mean)
        # Half-log-variances are measured about the profile's own variance, the sums about the reference.
        rescale = torch.stack((torch.ones_like(variance), self._reference[1] / (variance + self.site.eps)))
        numbers = torch.tensor([number for number, _ in self._classes.values()], dtype=torch.float64)
        numbers = numbers.to(variance.device)
        sums = torch.stack([total for _, total in self._classes.values()]) * rescale  # (K, 2, C)
        total = self._squares * rescale.unsqueeze(2) * rescale.unsqueeze(1)
        parts = [_split(total[i], sums[:, i], numbers, self.site.channel_weight(), self._labelled) for i in (0, 1)]
        between, within, squares = (torch.stack(values) for values in zip(*parts, strict=True))
        third = moments.k_statistics().k3.nan_to_num(0.0)
        return SiteProfile(n, moments.mean, variance, between, within, squares, third)


def _split(
    squares: Tensor, sums: Tensor, numbers: Tensor, weight: Tensor, labelled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Between- and within-class variances (C,) and the traces tr(BB), tr(BW), tr(WW) (3,), bias removed.

    Args:
        squares: Sum of outer products (C, C) of the instances' values.
        sums: Sums (K, C) of the values by class.
        numbers: Instances by class (K,).
        weight: Channel weights (C,), for the traces.
        labelled: Whether the classes are known; if not, or if they leave too few degrees of freedom, half of the
            variance is taken as between classes.
    """
    n = float(numbers.sum())
    classes = float(numbers.numel())
    root = weight.sqrt()
    outer = root.unsqueeze(1) * root
    grand = sums.sum(0) / n
    scatter = squares - n * grand.unsqueeze(1) * grand
    degrees = n - classes
    if not labelled or degrees < max(_LEAST_DEGREES, n / 4):
        half = (scatter.diagonal() / (n - 1)).clamp_min(0) / 2
        square = _trace_of_square(outer * scatter / (n - 1), n - 1) / 4
        return half, half, square.expand(3)
    means = (sums / numbers.unsqueeze(1) - grand) * (numbers / n).sqrt().unsqueeze(1)  # (K, C): B = means' means
    within = (scatter - n * means.T @ means) / degrees
    noise = (classes - 1) / n  # what class means of a finite sample scatter by themselves, in units of W
    variance = within.diagonal().clamp_min(0)
    between = ((means * means).sum(0) - noise * variance).clamp_min(0)
    weighted, weighted_within = means * root, outer * within
    ww = _trace_of_square(weighted_within, degrees)
    raw_cross = ((weighted @ weighted_within) * weighted).sum()
    raw_bb = (weighted @ weighted.T).square().sum()
    bb = (raw_bb - 2 * noise * raw_cross + noise * noise * ww).clamp_min(0)
    bw = (raw_cross - noise * ww).clamp_min(0)
    return between, variance, torch.stack((bb, bw, ww))


def _trace_of_square(covariance: Tensor, degrees: float) -> Tensor:
    """Unbiased tr(S^2) from a sample covariance of Gaussian vectors (Srivastava 2005), at least tr(S)^2/C."""
    trace = covariance.diagonal().sum()
    raw = covariance.square().sum()
    floor = trace * trace / covariance.shape[0]
    if degrees <= 1:
        return torch.maximum(raw, floor)
    unbiased = degrees**2 / ((degrees - 1) * (degrees + 2)) * (raw - trace * trace / degrees)
    return torch.maximum(unbiased, floor)


class _Collector:
    """Holds the moments that the sites show during one forward pass, until the output tells the classes."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None
        self.seen: list[tuple[_SiteTally, InstanceMoments, Tensor | None]] = []

    def hook(self, tally: _SiteTally) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def collect(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            evidence, kept, _ = gather_evidence(layer_input(args, kwargs).detach(), bad=self.bad)
            if kept is not None:
                self.bad = ~kept
            if evidence is not None:
                self.seen.append((tally, evidence.instances, kept))

        return collect

    def hand_over(self, labels: Tensor | None) -> None:
        """Give each tally its moments (n, C) with the predicted classes (n,) of the instances."""
        for tally, moments, kept in self.seen:
            own = _labels_for(labels, moments.mean.shape[0] if kept is None else kept.shape[0])
            tally.add(moments, own if own is None or kept is None else own[kept])
        self.seen.clear()
        self.bad = None


def _labels_for(labels: Tensor | None, rows: int) -> Tensor | None:
    """Classes of a site's rows; several rows per answer (patches, time steps) each have the answer's class."""
    if labels is None or labels.numel() == rows:
        return labels
    each, rest = divmod(rows, max(labels.numel(), 1))
    return labels.repeat_interleave(each) if rest == 0 and each > 0 else None


def profile_source(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    predictions: Predictions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SourceProfile:
    """Measure a model's normalization layers on source data: one pass, no labels, the model is not changed.

    A few hundred instances suffice. Classes, for the split of the variance into between and within them, are the
    model's own predictions.

    Args:
        model: A module with normalization layers, in any mode; a copy in eval mode is run.
        loader: Yields tensors, tuples or lists whose first element is the input, or dicts of keywords.
        predictions: Maps an output to class probabilities (n, K). Default: the softmax of a 2-d tensor output;
            for any other output the split is taken as half and half.
        progress: Called after each batch with the number of batches and of instances so far.

    Returns:
        The profile, to be handed to `adapt` or saved.

    Raises:
        UnsupportedLayerError: If the model has no normalization layer.
        NormadaptError: If the loader yields fewer than two finite instances.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        >>> profile = profile_source(model, [torch.randn(32, 1, 8, 8) for _ in range(4)])
        >>> profile.count, list(profile.sites)
        (128, ['1'])

    References:
        The instance as the sampling unit and the split by predicted class are this project's own.
    """
    check_model(model, "profile_source()")
    check_loader(loader, "profile_source()")
    sites = find_sites(model, with_profile=True, verb="profile_source()")
    copy = shared_copy(model)
    modules = dict(copy.named_modules())
    tallies = [_SiteTally(site._replace(module=modules[site.name])) for site in sites]
    collector = _Collector()
    for tally in tallies:
        tally.site.module.register_forward_pre_hook(collector.hook(tally), with_kwargs=True)
    class_counts = torch.zeros(0, dtype=torch.float64)
    batches = instances = excluded = 0
    with torch.no_grad():
        for item in loader:
            probabilities = class_probabilities(run_model(copy, item), predictions)
            finite, lost = split_length(item, collector.bad)
            labels = None
            if probabilities is not None:
                labels = probabilities.argmax(1)
                valid = probabilities.isfinite().all(1)
                if collector.bad is not None and collector.bad.shape == valid.shape:
                    valid &= ~collector.bad
                counts = torch.bincount(labels[valid], minlength=probabilities.shape[1])
                class_counts = counts.double() + (class_counts if class_counts.numel() else 0)
            collector.hand_over(labels)
            batches, instances, excluded = batches + 1, instances + finite, excluded + lost
            if progress is not None:
                progress(batches, instances)
    profiles = {tally.site.name: tally.finish() for tally in tallies if tally.count >= 2}
    if not profiles:
        raise NormadaptError(
            f"profile_source() needs at least two finite source instances; the loader gave {instances} "
            f"in {batches} batches"
        )
    identity = fingerprint(model)
    return SourceProfile(
        model_name=identity.model_name,
        fingerprint=identity.digest,
        count=instances,
        class_frequencies=class_counts / class_counts.sum() if float(class_counts.sum()) > 0 else None,
        sites=profiles,
        excluded=excluded,
    )
