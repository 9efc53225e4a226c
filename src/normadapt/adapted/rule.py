"""The default policy: recognize the domain of each instance, and weigh the evidence of that domain at every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normadapt.adapted.trees import Each, EachValue, map_tensors
from normadapt.adapted.window_report import Told
from normadapt.domains import class_draws
from normadapt.domains.bank import Bank, BankSettings, Domain, assign, empty_bank, merge_order
from normadapt.domains.change import Change
from normadapt.domains.class_draws import ClassDraws, Draws, draws_of
from normadapt.domains.describe import describe, first_moments, only_input
from normadapt.domains.places import Places
from normadapt.layers.moments import Evidence, InstanceMoments
from normadapt.layers.policy import Answer, Policy, Source, State, Statistics
from normadapt.layers.reference import Reference
from normadapt.profiles.rehearse import grouped, standardized
from normadapt.profiles.source_profile import SiteProfile, SourceProfile
from normadapt.weights.matrix import Reading, SitePrior, WeightSettings, weigh
from normadapt.weights.window import Window, sums_of

_YOUNG = 64.0  # instances: a window below counts the present batch before the batch is answered
_LOOKED_AT = (
    256.0  # instances: of those in an older domain this many in every e-fold are looked at behind the first site
)
_GROWTH = 1.1  # a window is weighed again when it has grown by a tenth
_LOUD = 1e4  # an instance with a mean square this many times the source variance at the first site is absurd
_STILL = 1e-6  # variance, in source units, below which an input is one grey
_NATURAL = 3.0  # natural deviations of the source's contrast beyond which one grey is absurd


class Memory(NamedTuple):
    """What a stream remembers.

    Args:
        bank: The domains.
        draws: What the answers say of the classes.
        learned: What takes the place of a source profile, from the stream's own first inputs; None with a profile.
    """

    bank: Bank
    draws: Draws
    learned: SourceProfile | None = None

    @classmethod
    def begun(cls, profile: SourceProfile, *, has_source: bool) -> Memory:
        """A stream that has seen nothing."""
        places = profile.places
        bank = empty_bank(places.scatter.numel(), places.centre.numel(), has_source=has_source)
        return cls(bank, class_draws.FIRST, None if has_source else profile)

    def moved(self, device: torch.device) -> Memory:
        """The same with its windows on a device; all else stays on the CPU."""
        domains = tuple(
            domain._replace(windows=map_tensors(domain.windows, lambda tensor: tensor.to(device)))
            for domain in self.bank.domains
        )
        return self._replace(bank=self.bank._replace(domains=domains))

    def relearned(self, profile: SourceProfile) -> Memory:
        """The same with another `learned`: evidence stays, and domains lie where its places have them."""
        places, bank = profile.places, self.bank
        if self.learned is not None and places is self.learned.places:
            return self._replace(learned=profile)
        fresh = Memory.begun(profile, has_source=False).bank
        domains = []
        for domain in bank.domains:
            # Of what was not looked at so far, a domain is taken to have as much as the first inputs.
            look = torch.cat((domain.look, places.centre[domain.look.numel() :] * domain.count))
            if domain.count > 0:
                place = places.of((look[: places.centre.numel()] / domain.count).unsqueeze(0))[0]
            else:
                place = fresh.recent.new_zeros(places.scatter.numel())
            domains.append(domain._replace(place=place, pull=place * domain.count, weight=domain.count, look=look))
        bank = bank._replace(domains=tuple(domains), recent=fresh.recent, stay=0, last=fresh.last)
        return Memory(bank, self.draws, profile)


_NONE = torch.zeros(0, dtype=torch.float64)
_WINDOW = Window(0.0, _NONE, 0.0, _NONE, _NONE, _NONE, _NONE, (_NONE, _NONE))
_ANSWERS = ClassDraws(0.0, _NONE, 0.0, 0.0, 0.0, _NONE)
_DOMAIN = Domain(0, "", 0.0, 0.0, 0.0, _NONE, _NONE, 0.0, _NONE, 0.0, _ANSWERS, Each((_WINDOW,)))
_PRIOR = SitePrior(*[_NONE] * len(SitePrior._fields))
_SITE = SiteProfile(0, _NONE, _NONE, Reference(_NONE, _NONE), _PRIOR, _NONE, _NONE, _NONE)
_LEARNED = SourceProfile("", "", 0, _NONE, EachValue({"": _SITE}), Places(*[_NONE] * len(Places._fields)))
_MEMORY = Memory(Bank(Each((_DOMAIN,)), 0, 0, 0.0, 0.0, 0.0, _NONE, 0, _NONE, True), Draws(0.0, 0.0), _LEARNED)


class Group(NamedTuple):
    """The instances of one domain in a batch.

    Args:
        number: The domain's.
        rows: Which instances; None for all.
        admitted: Which of them are evidence; None for all, a tensor of none for none.
        count: Number of those.
    """

    number: int
    rows: Tensor | None
    admitted: Tensor | None
    count: int  # type: ignore[assignment]  # hides tuple.count


@dataclass
class Batch:
    """One batch on its way through the sites; nothing of the stream's memory is changed.

    Args:
        profile: What is known of the source.
        memory: The stream's, with this batch's instances assigned.
        groups: The batch's domains.
        count: Finite instances.
        looks: Whether the sites behind the first are looked at.
        windows: Those that were changed, by domain and site.
        readings: What is known of each domain's classes.
        added: Sums that repeated calls of a site have brought, by domain and site.
        due: Windows that are to be weighed after the answer.
        features: Class probabilities from clusters of features, where the output gives none.
    """

    profile: SourceProfile
    memory: Memory
    groups: list[Group]
    count: int
    looks: bool
    windows: dict[tuple[int, int], Window] = field(default_factory=dict)
    readings: dict[int, Reading] = field(default_factory=dict)
    added: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    due: list[tuple[int, int]] = field(default_factory=list)
    features: Tensor | None = None

    def window(self, number: int, source: Source) -> Window:
        """The window of a domain at a site."""
        key = number, source.site_index
        if key in self.windows:
            return self.windows[key]
        windows = self.memory.bank.domain(number).windows
        return windows[source.site_index] if windows else Window.empty(source)


@dataclass(frozen=True)
class Domains(Policy):
    """Recognize which domain each instance is of, and normalize it by the statistics that its evidence supports.

    With a source profile the source is domain 0, and the other domains are found as they come. One setting serves every
    batch size and every stream.

    Args:
        bank: How instances are assigned to domains.
        weights: How evidence is weighed.
        max_weight: The most that any statistic of the test data weighs; 0 keeps the source. For a trial that begins
            cautiously (`normadapt.pilot`).

    Raises:
        ValueError: If the weight does not lie in [0, 1].

    References:
        This project's own (docs/THEORY.md, section 8); its scalar case: Kimura (2025), arXiv 2505.16257.
    """

    bank: BankSettings = field(default_factory=BankSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    max_weight: float = 1.0

    memory: ClassVar[Any] = _MEMORY

    def __post_init__(self) -> None:
        if not 0 <= self.max_weight <= 1:
            raise ValueError(f"max_weight must lie in [0, 1]; got {self.max_weight!r}")

    def __repr__(self) -> str:
        usual = {"bank": BankSettings(), "weights": WeightSettings(), "max_weight": 1.0}
        changed = [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return f"Domains({', '.join(changed)})"

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """At the first site recognize the batch's domains; at each, add to their windows and weigh these."""
        batch: Batch | None = evidence.upstream
        first = batch is None
        if batch is None:
            if source.profile is None and evidence.memory is None:
                return state, Statistics(ready=source.original, status="starting")
            batch = self._recognize(evidence, source)
        site = on_device(batch.profile, source.mean.device).get(source.name)
        if site is None:
            return state, Statistics(carry=batch)
        values = self._instances(evidence, batch)
        if values is None:
            return state, Statistics(carry=batch, status="skipped: rows are not the batch's")
        if batch.profile.clusters.numel() and source.name == batch.profile.cluster_site:
            batch.features = self._clusters(values, batch, source)
        used = [self._window(group, values, evidence.call, batch, site, source) for group in batch.groups]
        statistics = self._statistics(used, batch, source, evidence.count)
        behind = None if batch.looks or not first else partial(self._settled, batch)
        return state, statistics._replace(carry=batch, behind=behind)

    # -- recognize -----------------------------------------------------------------------------------------------

    def _recognize(self, evidence: Evidence, source: Source) -> Batch:
        memory: Memory = evidence.memory or Memory.begun(source.profile, has_source=True)
        profile: SourceProfile = memory.learned or source.profile
        places = profile.places
        rows = _instances_in(evidence)
        if rows is None:  # some rows of an instance are gone: what is left is no evidence
            group = Group(memory.bank.now, None, torch.zeros(0, dtype=torch.long), 0)
            return Batch(profile, memory, [group], 0, True)
        evidence = evidence._replace(count=rows, instances=InstanceMoments(grouped(evidence.instances.values, rows)))
        if source.name != profile.place_site or not places.scatter.numel():  # nothing tells domains apart
            bank, now = memory.bank, memory.bank.domain(memory.bank.now)
            seen, look = bank.seen + evidence.count, now.look
            if source.name == profile.place_site:
                total = self._features(evidence, source, profile)[0].sum(0)
                look = look + total if look.shape == total.shape else total * (1 + now.count / evidence.count)
            now = now._replace(count=now.count + evidence.count, last=seen, look=look)
            bank = bank.with_domain(now)._replace(seen=seen)
            batch = Batch(
                profile,
                memory._replace(bank=bank),
                [Group(now.number, None, None, evidence.count)],
                evidence.count,
                True,
            )
            batch.readings[now.number] = self._reading(now, memory.draws, profile)
            return batch
        features, sensible = self._features(evidence, source, profile)
        y = places.of(features).numpy()
        found = assign(memory.bank, places, change_of(profile), self.bank, y, features.numpy(), sensible)
        groups, bank = [], found.bank
        looks = False
        for number in merge_order(found.numbers):
            mine = found.numbers == number
            admitted = mine & found.admitted
            count = int(admitted.sum())
            domain = bank.domain(number)
            credit = domain.credit + count * min(1.0, _LOOKED_AT / max(domain.count, 1.0))
            if credit >= count > 0:
                looks, credit = True, credit - count
            looks = looks or not domain.windows
            bank = bank.with_domain(domain._replace(credit=credit))
            groups.append(Group(number, _rows(mine), _rows(admitted), count))
        batch = Batch(profile, memory._replace(bank=bank), groups, evidence.count, looks)
        for group in groups:
            batch.readings[group.number] = self._reading(bank.domain(group.number), batch.memory.draws, profile)
        return batch

    def _features(
        self, evidence: Evidence, source: Source, profile: SourceProfile
    ) -> tuple[Tensor, np.ndarray[Any, Any]]:
        """Features (n, p) and which instances are not absurd (n,), on the CPU."""
        reference = profile.sites[source.name].reference
        device = source.mean.device
        moments = first_moments(evidence.instances, reference.mean.to(device), reference.variance.to(device)).cpu()
        channels = source.mean.numel()
        loud = moments[:, channels : 2 * channels].amax(1) > 0.5 * np.log(_LOUD)
        x = only_input(evidence.arguments) if profile.input_mean.numel() else None
        if x is None:
            return moments, ~loud.numpy()
        if evidence.kept is not None and len(evidence.kept) == len(x):
            x = x[evidence.kept]
        described = describe(standardized(x.detach(), profile.input_mean, profile.input_deviation)).cpu()
        contrast = described[:, 1]
        places = profile.places
        still = (contrast < 0.5 * np.log(1e-5 + _STILL)) & (x.dim() > 2)
        if places.centre.numel():
            still &= (contrast - places.centre[1]).abs() > _NATURAL * places.deviation[1]
        return torch.cat((described, moments), 1), ~(loud | still).numpy()

    def _reading(self, domain: Domain, draws: Draws, profile: SourceProfile) -> Reading:
        """What the answers say of a domain's classes; its window's size is not yet known."""
        answers: ClassDraws | None = domain.answers
        if answers is None or answers.total.numel() != profile.class_frequencies.numel():
            return Reading(0.0)
        return Reading(0.0, answers.mean - profile.class_frequencies)

    # -- weigh ---------------------------------------------------------------------------------------------------

    def _instances(self, evidence: Evidence, batch: Batch) -> Tensor | None:
        """Moments (2, n, C) of the batch's instances; None where the rows are not theirs."""
        try:
            return grouped(evidence.instances.values, batch.count)
        except ValueError:
            return None

    def _clusters(self, values: Tensor, batch: Batch, source: Source) -> Tensor:
        """In place of class probabilities (n, K): how near each instance's features are to the profile's clusters.

        Features are the instance means (n, C) as the layer normalizes them, in units of the reference.
        """
        profile = batch.profile
        reference = on_device(profile, source.mean.device)[source.name].reference
        mean = torch.empty_like(values[0])
        deviation = torch.empty_like(values[0])
        for group in batch.groups:
            rows = slice(None) if group.rows is None else group.rows.to(mean.device)
            used = batch.window(group.number, source).ready
            mean[rows], deviation[rows] = used[0].double(), (used[1].double() + source.eps).sqrt()
        of_source = (source.variance + source.eps).sqrt()
        normalized = (values[0] - mean) / deviation * of_source + source.mean
        y = (normalized - reference.mean) / reference.variance.sqrt()
        distance = torch.cdist(y, profile.clusters.to(y)).square()
        return torch.softmax(-0.5 * distance / profile.cluster_width**2, 1)

    def _window(
        self, group: Group, values: Tensor, call: int, batch: Batch, site: SiteProfile, source: Source
    ) -> Window:
        """The window of a group's domain with its instances; weighed where that is due and cannot wait."""
        key = group.number, source.site_index
        window = batch.window(group.number, source)
        if group.count:
            sums = sums_of(values if group.admitted is None else values[:, group.admitted.to(values.device)], source)
            if call == 0:
                window = window.plus(group.count, sums)
                batch.added[key] = sums
            else:  # a layer that is called again is one site: the mean over its calls counts
                before = batch.added[key]
                both = torch.lerp(before, sums, 1 / (call + 1))
                window = window.plus(0.0, both - before)
                batch.added[key] = both
            if call == 0 and window.count >= _GROWTH * window.weighed:
                if window.count <= _YOUNG and site.calls == 1:
                    window = self._weighed(window, batch, group.number, site, source)
                else:
                    batch.due.append(key)
            batch.windows[key] = window
        return window

    def _settled(self, batch: Batch, source: Source, rows: int) -> Statistics:
        """What a site behind the first normalizes with when it is not looked at."""
        if source.name not in batch.profile.sites or rows % batch.count:
            return Statistics(carry=batch)
        return self._statistics([batch.window(group.number, source) for group in batch.groups], batch, source, rows)

    def _weighed(self, window: Window, batch: Batch, number: int, site: SiteProfile, source: Source) -> Window:
        reading, draws = batch.readings[number], batch.memory.draws
        squares = 0.0
        if reading.classes is not None and site.prior.class_counts.numel():
            p = (reading.classes + batch.profile.class_frequencies).to(site.prior.class_counts)
            squares = float((p * p / site.prior.class_counts).sum())
        classes = None if reading.classes is None else reading.classes.to(site.prior.shifts)
        centre = max(min(1.0, draws.run / window.count), draws.imbalance)
        is_source = number == 0 and batch.memory.bank.has_source
        mean, second = window.sums / window.count
        found = weigh(
            mean,
            second,
            window.count,
            site.prior,
            site.reference,
            Reading(centre, classes, squares),
            self.weights.source_is_source if is_source else self.weights.no_shift,
            self.weights,
        )
        ready = site.reference.buffers(self.max_weight * found.shift, source)
        return Window(window.count, window.sums, window.count, *found, ready)

    def _statistics(self, used: Sequence[Window], batch: Batch, source: Source, rows: int) -> Statistics:
        """What a site normalizes with: its domain's statistics, or each instance its own domain's."""
        now = batch.window(batch.memory.bank.now, source)
        status = "source" if now.weighed == 0 else "tracking"
        site = on_device(batch.profile, source.mean.device)[source.name]
        told = None if now.weighed == 0 else Told(now, site, source)
        if len(used) == 1:
            return Statistics(ready=used[0].ready, diagnostics=told, status=status)
        mean = torch.empty(batch.count, source.mean.numel(), dtype=torch.float64, device=source.mean.device)
        variance = torch.empty_like(mean)
        for group, window in zip(batch.groups, used, strict=True):
            chosen = slice(None) if group.rows is None else group.rows.to(mean.device)
            mean[chosen], variance[chosen] = window.ready[0].double(), window.ready[1].double()
        parts = rows // batch.count  # of an instance, such as views
        if parts > 1:
            mean, variance = mean.repeat_interleave(parts, 0), variance.repeat_interleave(parts, 0)
        return Statistics(ready=now.ready, instances=(mean, variance), diagnostics=told, status=status)

    # -- after the answer ----------------------------------------------------------------------------------------

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """Count the predicted classes, and weigh the old windows that are due."""
        batch: Batch | None = answer.carry
        if batch is None:
            return states, answer.memory
        bank, profile = batch.memory.bank, batch.profile
        for number, index in batch.due:
            source = answer.sources[index]
            site = on_device(profile, source.mean.device)[source.name]
            batch.windows[number, index] = self._weighed(batch.windows[number, index], batch, number, site, source)
        for number in {number for number, _ in batch.windows}:
            domain = bank.domain(number)
            windows = list(domain.windows) or [Window.empty(source) for source in answer.sources]
            for (owner, index), window in batch.windows.items():
                if owner == number:
                    windows[index] = window
            bank = bank.with_domain(domain._replace(windows=tuple(windows)))
        draws = batch.memory.draws
        probabilities = answer.probabilities if batch.features is None else batch.features
        if probabilities is not None and len(probabilities) == batch.count:
            p = probabilities.detach().cpu().double()
            finite = p.isfinite().all(1)
            for group in batch.groups:
                rows = torch.arange(len(p)) if group.admitted is None else group.admitted
                mine = p[rows[finite[rows]]]
                if len(mine) and mine.shape[1] == profile.class_frequencies.numel():
                    domain = bank.domain(group.number)
                    bank = bank.with_domain(domain._replace(answers=class_draws.after(domain.answers, mine)))
            draws = draws_of((domain.answers for domain in bank.domains), profile.class_frequencies)
        return states, batch.memory._replace(bank=bank, draws=draws)


def _instances_in(evidence: Evidence) -> int | None:
    """How many instances the rows of a site's evidence are of; None where they are not whole instances."""
    args, kwargs = evidence.arguments
    length = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), 0)
    every = evidence.count if evidence.kept is None else len(evidence.kept)
    if length == 0 or every % length or every == length:
        return evidence.count
    return length if evidence.kept is None else None


def _rows(mask: np.ndarray[Any, Any]) -> Tensor | None:
    return None if mask.all() else torch.from_numpy(np.flatnonzero(mask))


def change_of(profile: SourceProfile) -> Change:
    """The test for a change of domain under a profile, made once."""
    found = profile.__dict__.get("_change")
    if found is None:
        found = profile.__dict__["_change"] = Change(profile.places.classes.numpy())
    return found


def on_device(profile: SourceProfile, device: torch.device) -> Mapping[str, SiteProfile]:
    """The profile's sites with their tensors on a device, copied there once."""
    if device.type == "cpu":
        return profile.sites
    key = str(device)
    if key not in profile.devices:
        profile.devices[key] = {name: site.to(device) for name, site in profile.sites.items()}
    return profile.devices[key]
