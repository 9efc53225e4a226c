"""The default policy for streams: one window of evidence per site since the stream last changed.

The weight is the pooled empirical-Bayes weight of that window against the source. What the window cannot know, because
its classes are not the source's classes, is in its variance; a jump empties the window; instances that lie farther
apart than the source's get statistics of their own (docs/METHOD.md; it began as the rule of THEORY section 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from normadapt.doubts import Doubts
from normadapt.policies.base import (
    Diagnostics,
    Policy,
    Source,
    State,
    Statistics,
    are_below,
    pair,
    project,
    standardize,
    unstandardize,
)
from normadapt.policies.belief import Belief, believe
from normadapt.policies.correlation import Correlation
from normadapt.policies.mixed import Found, Scatter, Window, found_before, split_instances
from normadapt.policies.recent import REACH, Recent
from normadapt.policies.robust import check_location, with_huber_location
from normadapt.policies.spread_learner import Limits, width_of
from normadapt.policies.track_state import TrackState
from normadapt.policies.ways import FOLLOWED, OWN, OWN_WEIGHT, PROFILED_WAYS, SOURCE, TOGETHER, WAYS, choose_way
from normadapt.shapes import LocationScale, PerChannel, PerClass, PerInstance
from normadapt.spread import Pair, Spread
from normadapt.statistics import Composition, Evidence

_REFRESH = 0.1  # the weights are computed again when so much of the window is new: they hardly move before
# Without a profile the scatter is a guess; it errs on the wide side and keeps weights small by itself, so a shift
# counts much sooner.
_GUESSED_SIGNIFICANCE = 0.25
# What the correlation of neighbours weighs in the number of draws of a class, where predicted classes say more. Less
# while it is mostly its prior and there is no profile: then all else errs on the wide side, too.
_FELT_WEIGHS, _PRIOR_WEIGHS = 0.5, 0.125
_NEW_WINDOW = "new window"
_SURER = "source: surer"  # status where the model answers better with the source's statistics
_KEPT = 48  # instances of earlier batches whose projections are kept


@dataclass(frozen=True)
class Track(Policy):
    """Follow a stream: pool evidence while nothing changes, start again when it jumps, keep the source in doubt.

    One setting serves every batch size and stream. With a source profile the sampling variances and the gates are
    those of the source; without one they are learned from the stream.

    Args:
        memory: Instances after which older ones have faded from the window.
        jump_probability: The window is emptied when a batch is less probable than this under "nothing new".
        significance: The source's statistics are kept while the window's shift is more probable than this by chance;
            without a profile, than its fourth root.
        mixed_probability: Instances are normalized one by one when the window's scatter is less probable than this.
        location: "mean", or "huber": a robust location of each batch's instance means, for streams with outliers.
        max_weight: The most that any statistic of the test data weighs, an instance's own too; 0 keeps the source. For
            a trial that begins cautiously (`normadapt.pilot`).
        compares: Whether some batches (each of the first 16, later one in 64) are passed through the model in other
            ways, too, and the stream kept to the one whose answers are best, see `choose_way`; with a profile without
            instances' own statistics. Not where the output gives no class probabilities.

    Raises:
        ValueError: If a probability is not in (0, 1), the memory is below 1 or the weight not in [0, 1].

    References:
        The rule is this project's own; its weight is that of Xie, Kou and Brown (2012), JASA 107(500), 1465-1479.
    """

    memory: float = 1000.0
    jump_probability: float = 5e-7
    significance: float = 0.01
    mixed_probability: float = 1e-3
    location: str = "mean"
    max_weight: float = 1.0
    compares: bool = True

    def __post_init__(self) -> None:
        if not self.memory >= 1:
            raise ValueError(f"memory must be at least 1 instance; got {self.memory!r}")
        for name in ("jump_probability", "significance", "mixed_probability"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")
        check_location(self.location)
        if not 0 <= self.max_weight <= 1:
            raise ValueError(f"max_weight must lie in [0, 1]; got {self.max_weight!r}")

    def ways(self, *, profiled: bool) -> Mapping[str, str]:
        """Those of `choose_way`; each instance's own only where no profile knows what is natural."""
        return {} if not self.compares else PROFILED_WAYS if profiled else WAYS

    def choose(self, doubts: Doubts) -> str:
        """The way that the model's answers speak for, see `choose_way`."""
        return choose_way(doubts)

    def remembers(self, way: str) -> str:
        """While the source's statistics are in use, the window that is followed when the ways are compared."""
        return FOLLOWED if way == SOURCE else way

    def reads_again(self, n: int) -> str:
        """The window is weighed again by the classes of the batch it begins with, where so many tell of them."""
        return FOLLOWED if n >= REACH else ""

    def init(self, source: Source) -> State:
        """An empty window and the source's statistics in use."""
        return TrackState.empty(source)

    def step(self, state: TrackState, evidence: Evidence, source: Source) -> tuple[TrackState, Statistics]:
        """One batch: test for a jump, pool, weigh, and split the instances if they are of several domains."""
        if evidence.way == SOURCE and evidence.upstream is not None:
            # What is before this site is not adapted, so its input is not what it is to adapt to.
            return state, Statistics(source.mean, source.variance, carry=evidence.upstream, status=_SURER)
        n = evidence.count
        if self.location == "huber":
            evidence = with_huber_location(evidence)
        spread = source.spread if state.spread is None else state.spread.spread
        if spread is None:
            raise ValueError(f"Track's state of {source.name!r} was made with a source profile, and there is none")
        weight, units = source.channel_weight, source.aligned or source.units

        batch = standardize(evidence.both, units)
        location, ratio = batch.unbind()
        moments = batch.clone()  # about the source
        moments[1].addcmul_(location, location)
        correlation, jumped = state.correlation, False
        recent, before = state.recent.update(moments, evidence.composition, n), found_before(evidence)
        if state.count > 0:
            here = batch.clone()
            here[1].add_(spread.location, alpha=1 / n).log_().mul_(0.5)
            jumped = self._jumped(state, here, evidence, spread, source)
            if not jumped and n < REACH:  # too few to tell by themselves
                # Where a window before this one begins anew, its own evidence is of inputs that are no more; not if it
                # is as young as a batch: then changes come and go, as strange instances do.
                jumped = (before.jumped and state.count >= REACH) or (
                    recent.is_due and self._moved(state, recent, evidence, spread, source)
                )
            if jumped:
                recent = recent.begun(moments, n)
                correlation = correlation.interrupted()
            else:
                one = spread.instance[0][0] if state.spread is None else state.spread.one
                distance = location - state.moments[0]
                correlation = correlation.update(distance, n, state.count, one, weight, self.memory)
        composition, told = evidence.composition, evidence.told
        classes, imbalance = state.classes, 0.0
        if jumped:
            classes = classes[:0]
        elif composition is not None:
            classes, imbalance = composition.pooled(classes, state.count)
        if told is not None and told.last is not None and (jumped or state.count == 0):
            composition, classes = told, told.last
        learned = None
        if state.spread is not None:
            learned = state.spread.learn(
                evidence,
                state,
                ratio,
                source,
                self.memory,
                jumped=jumped,
                stretches=correlation.stretches,
                apart=before.apart,
            )
            spread = learned.spread

        kept = 0.0 if jumped else min(state.count, max(self.memory - n, 0.0))
        window = Window(kept, kept / state.count if kept else 0.0, state.moments[0])
        count = kept + n
        share = n / count
        if kept > 0:
            moments = torch.lerp(state.moments, moments, share)
        after = state._replace(
            count=count,
            moments=moments,
            classes=classes,
            spread=learned,
            pending=state.pending + n,
            correlation=correlation,
            recent=recent,
        )
        mean = variance = diagnostics = None
        if jumped or evidence.turned or after.pending >= _REFRESH * count:
            is_prior = learned is not None and not correlation.is_measured
            felt_weighs = _PRIOR_WEIGHS if is_prior else _FELT_WEIGHS
            between = self._between_classes(composition, classes, imbalance, correlation, window, n, felt_weighs)
            after, mean, variance, diagnostics = self._weigh(after, evidence, spread, between, jumped, source)
        apart, limits = before.apart, None
        if learned is not None:
            apart = min(apart, learned.apart(source))
            limits = learned.limits(apart)
        scatter, own = self._split(state.scatter, window, evidence, after.use, spread, source, limits)
        if evidence.way in (TOGETHER, SOURCE):
            own = None
        if evidence.way == SOURCE and diagnostics is not None:
            mean, variance = source.mean, source.variance
            diagnostics = diagnostics._replace(status=_NEW_WINDOW if jumped else _SURER)
        # The sites behind this one need not find it out themselves.
        carry = Found(scatter.mixed or before.mixed, apart, after.odds, jumped)
        return after._replace(scatter=scatter), Statistics(mean, variance, own, diagnostics, carry, jumped, carry.mixed)

    def _jumped(
        self, state: TrackState, here: LocationScale, evidence: Evidence, spread: Spread, source: Source
    ) -> bool:
        """Whether a batch at `here` (2, C) is too far from where the stream is to belong to the window."""
        n, composition = evidence.count, evidence.composition
        effective = float(n) if composition is None else composition.effective_count(n)
        return self._is_far(state, here, 1 / effective, 1 / n, spread, source)

    def _moved(self, state: TrackState, recent: Recent, evidence: Evidence, spread: Spread, source: Source) -> bool:
        """Whether the last instances together are too far from where the stream is, though no batch alone was."""
        here = _shift_of(recent.moments, recent.variance, spread)
        between = recent.share_between(evidence.composition, state.correlation.length)
        return self._is_far(state, here, between, recent.variance, spread, source)

    def _is_far(
        self, state: TrackState, here: LocationScale, between: float, within: float, spread: Spread, source: Source
    ) -> bool:
        squared = pair((here - state.place).square_() @ source.channel_weight)
        location, scale = (p + a * within for p, a in zip(state.uncertainty, state.scatter.excess, strict=True))
        cumulants = spread.cumulants(between, within, (location, scale), source.sum_weight)
        return any(are_below(squared, cumulants, self.jump_probability))

    def _between_classes(
        self,
        composition: Composition | None,
        classes: PerClass,
        imbalance: float,
        correlation: Correlation,
        window: Window,
        n: int,
        felt_weighs: float,
    ) -> float:
        """Inverse number of independent draws of a class that the window is worth, f_B.

        What the correlation says, or less where the predicted classes are more balanced than that: then the geometric
        mean of both, weighted by `felt_weighs`. Neither is to be trusted alone. A model that sees garbage predicts one
        class for everything, and one that follows a run of one class spreads its predictions; the correlation of a
        short stream is a guess.
        """
        felt = min(1.0, correlation.length / (window.count + n))
        if composition is None or classes.numel() == 0:
            return felt
        said = self._said(composition, imbalance, window, n)
        return math.pow(felt, felt_weighs) * math.pow(said, 1 - felt_weighs) if said < felt else felt

    def _said(self, composition: Composition, imbalance: float, window: Window, n: int) -> float:
        """f_B as the predicted classes have it."""
        count = window.count + n
        new = (n / count) ** 2 / composition.effective_count(n)
        return min(1.0, max(1 / count, imbalance * (window.count / count) ** 2 + new))

    def _weigh(
        self, state: TrackState, evidence: Evidence, spread: Spread, between: float, jumped: bool, source: Source
    ) -> tuple[TrackState, PerChannel, PerChannel, Diagnostics]:
        """The statistics for a window: its shift, shrunk towards the source by what the window cannot know."""
        weight, sum_weight, units = source.channel_weight, source.sum_weight, source.aligned or source.units
        shift = _shift_of(state.moments, 1 / state.count, spread)
        between += units.uncertainty
        within = 1 / state.count + units.uncertainty
        cumulants = spread.cumulants(between, within, (0.0, 0.0), sum_weight)
        squared = pair((shift * shift) @ weight)
        excess = (max(squared[0] - cumulants[0][0], 0.0), max(squared[1] - cumulants[1][0], 0.0))
        bar = self.significance ** (1.0 if state.spread is None else _GUESSED_SIGNIFICANCE)
        significant = are_below(squared, cumulants, bar)
        belief = self._believe(squared, cumulants, source, found_before(evidence).odds)
        prior = [a if yes else 0.0 for a, yes in zip(belief.shift, significant, strict=True)]
        weights: LocationScale | Pair = (0.0, 0.0)
        noise = None
        if prior[0] == prior[1] == 0.0:
            place, uncertainty = torch.zeros_like(shift), (0.0, 0.0)
            if jumped or any(state.uncertainty):
                # After a jump the stream is not where it was, and a shift may be there though it is not significant: as
                # far as the window shows one and noise may hide one. Otherwise the next batch would be a jump from 0,
                # start a window as young as this one, and so on for ever.
                hidden = pair(spread.sampling_variance(between, within) @ source.share)
                shown = squared[0] / sum_weight[0], squared[1] / sum_weight[0]
                uncertainty = min(hidden[0], shown[0]), min(hidden[1], shown[1])
            use = place
            m_use, v_use = source.mean, source.variance
        else:
            noise = spread.sampling_variance(between, within)
            spare = noise.new_tensor(((prior[0],), (prior[1],)))
            weights = spare / (spare + noise)
            place = use = weights * shift
            uncertainty = pair((noise * weights) @ source.share)
            if self.max_weight < 1:
                weights = weights.clamp_max(self.max_weight)
                use = weights * shift
            m_use, v_use = unstandardize(use[0], use[1], source, units)

        status = _NEW_WINDOW if jumped else "tracking" if any(prior) else "source"
        expected = cumulants[0][0]
        worth = min(spread.instance[0][0] / expected, state.count) if expected > 0 else state.count
        seen = project(evidence, shift, squared, weight, units)
        if not jumped:
            seen = torch.cat((state.projections[:, -_KEPT:], seen), 1)
        diagnostics = Diagnostics(worth, excess, squared, cumulants, weights, status, noise, seen)
        after = state._replace(
            use=use, place=place, uncertainty=uncertainty, pending=0.0, projections=seen, odds=belief.odds
        )
        return after, m_use, v_use, diagnostics

    def _believe(self, squared: Pair, cumulants: tuple[Pair, Pair], source: Source, odds: float) -> Belief:
        return believe(squared, cumulants, source.sum_weight[0], odds)

    def _split(
        self,
        scatter: Scatter,
        window: Window,
        evidence: Evidence,
        use: LocationScale,
        spread: Spread,
        source: Source,
        limits: Limits | None,
    ) -> tuple[Scatter, tuple[PerInstance, PerInstance] | None]:
        probability, most = self.mixed_probability, self.max_weight
        least = OWN_WEIGHT if evidence.way == OWN else 0.0
        return split_instances(scatter, window, evidence, use, spread, source, probability, most, limits, least)


def _shift_of(moments: LocationScale, variance: float, spread: Spread) -> LocationScale:
    """Location and half-log-variance (2, C) of moments about the source whose mean has `variance` times an instance's.

    The second moment about that mean misses what the mean itself scatters: it is added back.
    """
    mean, second = moments.unbind()
    width = width_of(mean, second).add_(spread.location, alpha=variance)
    return torch.stack((mean, width.log_().mul_(0.5)))
