"""Offline: passes over unlabelled target data until the statistics agree with the activations they produce."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normadapt.adapted._adapt import adapt
from normadapt.errors import NormadaptError
from normadapt.layers.batches import batch_length, check_loader, iterates_once, run_model, split_length
from normadapt.layers.hooks import SiteHook, hooked_copy, plain_copy
from normadapt.layers.moments import Evidence, gather_evidence
from normadapt.layers.policy import Source, standardize, unstandardize
from normadapt.profiles.source_profile import SourceProfile
from normadapt.types import LocationScale

_LOG = logging.getLogger("normadapt")


@dataclass(frozen=True)
class RecalibrationProgress:
    """Where a recalibration stands.

    Args:
        pass_index: The pass under way, from 1.
        batches: Batches done in it.
        instances: Instances done in it.
        last_change: What the pass before changed most, in units of a layer's output; None during the first.
    """

    pass_index: int
    batches: int
    instances: int
    last_change: float | None


@dataclass(frozen=True)
class Recalibration:
    """How a recalibration went; the recalibrated module has it as its attribute `recalibration`.

    Args:
        passes: Passes over the data.
        last_change: What the last pass changed most: over the sites, the root mean square over channels of the change
            of location and half-log-variance times gamma.
        converged: Whether that is within the tolerance.
        count: Instances in a pass.
        excluded: Instances left out because some layer saw NaN or Inf.
        tracked: Whether the data could be read only once, so that a stream was followed instead.
    """

    passes: int
    last_change: float
    converged: bool
    count: int
    excluded: int
    tracked: bool


_PRIOR_VARIANCE, _PRIOR_WORTH = 0.1, 4.0  # scatter of instances in source units before any is known, in instances


def _shrunk(variance: LocationScale, degrees: float) -> LocationScale:
    weight = degrees / (degrees + _PRIOR_WORTH)
    return variance * weight + _PRIOR_VARIANCE * (1 - weight)


class _Tally:
    """Sums over the instances of one pass at one site, in output units about the source; splits do not matter."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: Tensor | None = None

    def add(self, evidence: Evidence, source: Source) -> None:
        u, r = standardize(evidence.instances.values, source.units).unbind()
        r = r + u * u
        sums = torch.stack([t.sum(0) for t in (u, r, u * u, r * r, u * r)])
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += evidence.count

    def optimum(self, source: Source) -> LocationScale | None:
        """Where the statistics should be (2, C), as a difference from the source; None without data."""
        if self._sums is None:
            return None
        n = self.count
        u, r, uu, rr, ur = self._sums / n
        var_u = (uu - u * u).clamp_min(0)
        # Influence of one instance on the variance about the mean: psi = r - 2 u_bar u (THEORY section 2).
        psi = (rr - r * r - 4 * u * (ur - u * r) + 4 * u * u * var_u).clamp_min(0)
        width = (r - u * u).clamp_min(1e-12)
        measured = torch.stack((var_u, psi / (4 * width * width))) * (n / max(n - 1, 1))
        total = _shrunk(measured, float(n - 1)) if source.spread is None else source.spread.total
        shift = torch.stack((u, (width + total[0] / n).log() / 2))
        noise = (total / n).clamp_min(1e-12)
        weight = source.channel_weight
        excess = ((shift.square() - noise) @ weight / weight.sum()).clamp_min(0).unsqueeze(1)
        return excess / (excess + noise) * shift


class _Pass:
    """One pass over the data: a tally for every site."""

    def __init__(self, sites: int) -> None:
        self.tallies = [_Tally() for _ in range(sites)]
        self.count = self.excluded = 0
        self.bad: Tensor | None = None

    def step(self, hook: SiteHook, x: Tensor) -> None:
        tally = self.tallies[hook.index]
        evidence, excluded = gather_evidence(x, self.bad)
        if evidence is not None:
            if evidence.kept is not None:
                self.bad = ~evidence.kept
            tally.add(evidence, hook.source)
        elif excluded:
            self.bad = torch.ones(len(x), dtype=torch.bool, device=x.device)


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    profile: SourceProfile | None = None,
    *,
    tolerance: float = 1e-5,
    max_passes: int = 100,
    progress: Callable[[RecalibrationProgress], None] | None = None,
) -> nn.Module:
    r"""Statistics for target data, offline: an ordinary module with the MSE-optimal mixture at every layer.

    A deep layer's moments depend on the statistics in use before it. So a pass runs with fixed statistics, sums the
    moments of all instances, and then sets

    $$ m_s + \lambda (m - m_s), \qquad \lambda_c = \frac{A}{A + R_c}, \quad R_c = \tau_c^2 / N $$

    (half-log-variances likewise, A pooled over the site); passes repeat until no site moves. With L layers one after
    the other that takes at most L + 1 passes, and the result does not depend on how the data are split.

    Args:
        model: As for `adapt`; it is not changed.
        loader: Unlabelled target data, items as for `profile_source`. A loader that can be iterated only once gets one
            pass that follows it as a stream, and a warning.
        profile: Of this model, for the sampling variances; without it the target data's own are used.
        tolerance: Largest change of a site, in units of its output, at which passes end.
        max_passes: Passes after which it ends anyway, with a warning.
        progress: Called after every batch.

    Returns:
        An ordinary module in eval mode that shares the model's parameters; `module.recalibration` says how it went.

    Raises:
        UnsupportedLayerError, ProfileMismatchError: As `adapt`.
        NormadaptError: If the loader yields no finite instance.
        ValueError: If `tolerance` is negative or `max_passes` below 1.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        >>> module = recalibrate(model, [torch.randn(32, 1, 8, 8) + 1 for _ in range(4)])
        >>> module.recalibration.passes, module.recalibration.converged
        (2, True)

    References:
        The weight: Kimura (2025), arXiv 2505.16257; pooled over channels: Xie, Kou and Brown (2012), JASA 107(500).
    """
    check_loader(loader, "recalibrate()")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance!r}")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1; got {max_passes!r}")
    if iterates_once(loader):
        return _tracked(model, loader, profile, progress)
    copy, hooks = hooked_copy(model, profile, verb="recalibrate()")
    in_use = [torch.zeros_like(torch.stack((h.source.mean, h.source.mean))) for h in hooks]
    change, passes = float("inf"), 0
    while passes < max_passes and change > tolerance:
        passes += 1
        outcome = _run_pass(copy, hooks, loader, _teller(progress, passes, None if passes == 1 else change))
        count, excluded = outcome.count, outcome.excluded
        if count == 0:
            again = "the second time it was iterated" if passes > 1 else f"{excluded} were left out as non-finite"
            raise NormadaptError(f"recalibrate() needs finite target instances; the loader gave none ({again})")
        change = 0.0
        for hook, tally, before in zip(hooks, outcome.tallies, list(in_use), strict=True):
            optimum = tally.optimum(hook.source)
            if optimum is not None:
                change = max(change, _size(optimum - before, hook.source))
                in_use[hook.index] = optimum
                hook.install(_as_buffers(optimum, hook))
        _LOG.info("recalibrate: pass %d, %d instances, largest change %.3g", passes, count, change)
    if change > tolerance:
        warnings.warn(
            f"recalibrate() stopped after {passes} passes with a change of {change:.3g}, above the tolerance of "
            f"{tolerance:.3g}; does the loader give the same data every time?",
            stacklevel=2,
        )
    return _finished(plain_copy(copy), Recalibration(passes, change, change <= tolerance, count, excluded, False))


def _run_pass(
    model: nn.Module, hooks: list[SiteHook], loader: Iterable[Any], tell: Callable[[int, int], None]
) -> _Pass:
    visitor = _Pass(len(hooks))
    for hook in hooks:
        hook.current = visitor
    batches = instances = 0
    try:
        with torch.no_grad():
            for item in loader:
                visitor.bad = None
                run_model(model, item)
                finite, lost = split_length(item, visitor.bad)
                visitor.count += finite
                visitor.excluded += lost
                batches, instances = batches + 1, instances + finite + lost
                tell(batches, instances)
    finally:
        for hook in hooks:
            hook.current = None
    return visitor


def _teller(
    progress: Callable[[RecalibrationProgress], None] | None, pass_index: int, last_change: float | None
) -> Callable[[int, int], None]:
    def tell(batches: int, instances: int) -> None:
        if progress is not None:
            progress(RecalibrationProgress(pass_index, batches, instances, last_change))

    return tell


def _size(move: LocationScale, source: Source) -> float:
    return math.sqrt(float(((move * move) @ source.channel_weight).sum()) / source.mean.numel())


def _as_buffers(difference: LocationScale, hook: SiteHook) -> tuple[Tensor, Tensor]:
    like = hook.source.original[0]
    largest = torch.finfo(like.dtype).max
    mean, variance = unstandardize(difference[0], difference[1], hook.source)
    return mean.clamp(-largest, largest).to(like), variance.clamp(max=largest).to(like)


def _tracked(
    model: nn.Module,
    loader: Iterable[Any],
    profile: SourceProfile | None,
    progress: Callable[[RecalibrationProgress], None] | None,
) -> nn.Module:
    """One pass over data that can be read only once: follow them as a stream, keep where it ended."""
    warnings.warn(
        f"recalibrate() was given a {type(loader).__name__}, which can be iterated only once: it follows the data in "
        "one pass as a stream, so the result depends on their order and batches; pass a list or a DataLoader for the "
        "optimum",
        stacklevel=3,
    )
    adapted = adapt(model, profile)
    tell = _teller(progress, 1, None)
    batches = instances = 0
    with torch.no_grad():
        for item in loader:
            run_model(adapted, item)
            batches, instances = batches + 1, instances + batch_length(item)
            tell(batches, instances)
    sites = adapted.report().sites
    count, excluded = max(site.count for site in sites), max(site.excluded for site in sites)
    if count == 0:
        raise NormadaptError(f"recalibrate() needs finite target instances; the loader gave none ({excluded} left out)")
    return _finished(adapted.freeze(), Recalibration(1, float("nan"), False, count, excluded, True))


def _finished(module: nn.Module, outcome: Recalibration) -> nn.Module:
    setattr(module, "recalibration", outcome)  # noqa: B010 (a plain attribute, not a submodule)
    return module
