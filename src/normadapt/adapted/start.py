"""The start of a stream without source data: what a profile would say is measured on its own first inputs.

Before a batch is answered there is at most one further pass of its own size: of the batch itself as the source sees it,
then, once enough inputs are kept, of these under one rehearsal after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normadapt.domains.describe import describe, names, only_input
from normadapt.domains.places import Places, PlaceSettings, measure_places
from normadapt.layers.hooks import SiteHook
from normadapt.layers.moments import instance_moments
from normadapt.layers.predictions import Predictions, class_probabilities
from normadapt.layers.reference import Reference
from normadapt.layers.sites import Fingerprint
from normadapt.profiles.rehearsals import Rehearsal, rehearsals_for
from normadapt.profiles.rehearse import (
    Inputs,
    Looking,
    Shown,
    changed_item,
    feature_clusters,
    features_of,
    grouped,
    input_moments,
    measure_all,
    standardized,
)
from normadapt.profiles.site_prior import ProfileSettings, Scatter, site_prior
from normadapt.profiles.source_profile import SiteProfile, SourceProfile

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]

_AS_SOURCE = 16  # inputs of which the scatter can be measured at all: until then the source answers
_INPUTS = 64  # inputs that are kept and rehearsed
_BLOCK = 8  # inputs of a rehearsal that are shown before the next rehearsal's
_DESCRIBED = 4  # descriptions of changed inputs before a batch is answered, for each of its instances


class _Groups:
    """Normalizes rows by the moments of all rows of their own rehearsal that were shown so far."""

    def __init__(self, references: Sequence[Reference], count: int, first_site: int) -> None:
        self.references = references
        self.count = count
        self.first_site = first_site
        self.first = torch.zeros(0)
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        self.members = torch.zeros(0, dtype=torch.long)

    def step(self, hook: SiteHook, x: Tensor) -> tuple[Tensor, Tensor] | None:
        index = hook.index
        parts = x.shape[0] // max(len(self.members), 1)
        if parts * len(self.members) != x.shape[0]:
            return None
        members = self.members.to(x.device).repeat_interleave(parts)
        values = instance_moments(x).values.nan_to_num(0.0, 0.0, 0.0)
        mean, variance = values
        if index == self.first_site:
            self.first = grouped(values, len(self.members))
        rows = torch.stack((mean, variance + mean.square()), 1)
        if index not in self.sums:
            self.sums[index] = rows.new_zeros(self.count, 1), rows.new_zeros(self.count, 2, x.shape[1])
        number, sums = self.sums[index]
        number = number.index_add(0, members, number.new_ones(len(members), 1))
        sums = sums.index_add(0, members, rows)
        self.sums[index] = number, sums
        reference, source = self.references[index], hook.source
        scale = rows.new_empty(self.count, x.shape[1])
        offset = rows.new_empty(self.count, x.shape[1])
        for group in self.members.unique().tolist():
            m, v = reference.buffers(self.shift(index, group), source)
            one = ((source.original[1].double() + source.eps) / (v.double() + source.eps).clamp_min(1e-300)).sqrt()
            scale[group], offset[group] = one, source.original[0].double() - m.double() * one
        return scale[members].to(x.dtype), offset[members].to(x.dtype)

    def shift(self, index: int, group: int) -> Tensor:
        """Shift (2C,) of a site under one rehearsal so far."""
        number, sums = self.sums[index]
        mean, second = sums[group] / number[group]
        return self.references[index].shift_of(mean, second - mean.square())


class Start:
    """The measuring of one stream's first inputs: progress, not evidence, so that a copy of a stream may share it.

    Args:
        hooks: Of the model.
        identity: Of the model.
        rehearsals: Changes by name; None for the default ones.
        settings: How inputs are measured.
        inputs: How many are kept.
    """

    def __init__(
        self,
        hooks: Sequence[SiteHook],
        identity: Fingerprint,
        rehearsals: Mapping[str, Rehearsal] | None = None,
        settings: ProfileSettings | None = None,
        inputs: int = _INPUTS,
    ) -> None:
        self._hooks = hooks
        self._identity = identity
        self._wanted = rehearsals
        self._settings = settings or ProfileSettings()
        self._inputs = inputs
        self._references = [Reference.of_running_statistics(hook.source) for hook in hooks]
        self._rows: list[Arguments] = []  # one instance each
        self._moments: list[list[Tensor]] = [[] for _ in hooks]
        self._probabilities: list[Tensor] | None = []
        self._order: list[int] = []
        self._calls: dict[int, int] = {}
        self._about: Inputs | None = None
        self._rehearsals: Mapping[str, Rehearsal] = {}
        self._features: list[list[Tensor]] = []
        self._own = torch.zeros(0, 0, dtype=torch.float64)
        self._queue: list[tuple[int, int]] = []
        self._groups: _Groups | None = None
        self._built = 0
        self._places: Places | None = None
        self._scatters: list[Scatter | None] = []
        self._frequencies = torch.zeros(0, dtype=torch.float64)
        self._looks = torch.zeros(0, 0, dtype=torch.float64)
        self._clusters: tuple[Tensor, float] = (torch.zeros(0, 0, dtype=torch.float64), 0.0)
        self._labels = torch.zeros(0, dtype=torch.long)
        self.latest: SourceProfile | None = None
        self.several: bool | None = None
        self.done = False
        self.waits = False  # whether what a restored stream knows is better than what is found before the end

    @property
    def count(self) -> int:
        """Inputs kept so far."""
        return len(self._rows)

    @property
    def gathered(self) -> bool:
        """Whether all inputs that are to be rehearsed are there."""
        return self.count >= self._inputs

    def progress(self) -> str:
        """How far it is, in a sentence."""
        if self.done:
            words = "several domains" if self.several else "one domain"
            return f"Rehearsed on the stream's own first {self.count} inputs, which were taken for {words}."
        if self.count < self._inputs:
            how = "the source answers" if self.count < _AS_SOURCE else "weights know no directions yet"
            return f"Starting: {self.count} of {self._inputs} first inputs seen; {how}."
        total = len(self._rehearsals) + 1
        left = len(self._queue)
        all_rows = total * self.count
        return f"Starting: {100 * (all_rows - left) // max(all_rows, 1)} % of {total} rehearsals shown."

    def step(self, model: nn.Module, arguments: Arguments, predictions: Predictions | None) -> None:
        """One further pass, at most as large as a batch; `latest` is what was found so far.

        Args:
            model: The hooked model.
            arguments: Those of the batch that is to be answered.
            predictions: As for `adapt`.
        """
        tensors = (
            value for value in (*arguments[0], *arguments[1].values()) if isinstance(value, Tensor) and value.dim()
        )
        rows = next((value.shape[0] for value in tensors), 0)
        if self.done or rows == 0:
            return
        if self.count < self._inputs:
            self._gather(model, arguments, rows, predictions)
        else:
            self._show(model, rows)

    # -- the inputs as they are ----------------------------------------------------------------------------------

    def _gather(self, model: nn.Module, arguments: Arguments, rows: int, predictions: Predictions | None) -> None:
        looking = Looking()
        output = self._run(model, looking, arguments)
        finite = torch.ones(rows, dtype=torch.bool)
        own: dict[int, Tensor] = {}
        for index in looking.moments:
            try:
                values = looking.of(index, rows)
            except ValueError:
                continue  # rows that are not the batch's: not adapted
            if values is not None:
                own[index] = values
                finite &= values.isfinite().all(2).all(0).cpu()
        probabilities = class_probabilities(output, predictions)
        if probabilities is None or len(probabilities) != rows:
            self._probabilities = None
        elif self._probabilities is not None:
            finite &= probabilities.isfinite().all(1).cpu()
        chosen = finite.nonzero().flatten()[: max(self._inputs - self.count, 0)]
        if not len(chosen):
            return
        for index, values in own.items():
            self._moments[index].append(values[:, chosen.to(values.device)])
            self._calls[index] = max(self._calls.get(index, 1), len(looking.moments[index]))
        if self._probabilities is not None and probabilities is not None:
            self._probabilities.append(probabilities[chosen.to(probabilities.device)])
        self._order += [index for index in looking.order if index not in self._order]
        before = self.count
        self._rows += [_row(arguments, int(k), rows) for k in chosen]
        if self.count >= _AS_SOURCE:
            if self._about is None:
                self._plan()
            self._describe(_DESCRIBED * rows)
        if any(before < mark <= self.count for mark in (_AS_SOURCE, 2 * _AS_SOURCE, self._inputs)):
            self._measure()
            if self.gathered:
                self._begin()
            self._find()

    def _measure(self, groups: Tensor | None = None) -> None:
        """Scatter of the inputs so far, within the domains that were found among them."""
        every = [torch.cat(moments, 1) if moments else None for moments in self._moments]
        every = [None if v is None or v.shape[1] != self.count else v for v in every]
        probabilities = torch.cat(self._probabilities) if self._probabilities else None
        labels = torch.full((self.count,), -1) if probabilities is None else probabilities.argmax(1).cpu()
        shown = Shown(every, self._order, self._calls, labels, probabilities)
        classes = 0 if probabilities is None else probabilities.shape[1]
        if probabilities is not None:
            self._frequencies = torch.full((classes,), 1 / classes, dtype=torch.float64)
        elif self.count >= self._inputs:
            centres, width, labels = feature_clusters(shown, self._references)
            if centres.shape[0] > 1:
                self._clusters, shown.labels, classes = (centres, width), labels, centres.shape[0]
                self._frequencies = torch.bincount(labels, minlength=classes).double() / len(labels)
        self._labels = shown.labels
        self._scatters = measure_all(self._hooks, shown, classes, self._settings, from_stream=True, groups=groups)

    def _plan(self) -> None:
        """Settle in which units inputs are described and changed, and how."""
        tensors = [only_input(row) for row in self._rows]
        found = [x for x in tensors if x is not None]
        if len(found) < self.count or len({x.shape[1:] for x in found}) != 1:
            self._about = Inputs([], [], torch.zeros(0), torch.zeros(0))
        else:
            self._about = Inputs([], [], *input_moments(found))
        wanted = self._wanted
        if wanted is None:
            wanted = rehearsals_for(found[0].dim()) if self._about.described else {}
        self._rehearsals = wanted
        self._features = [[] for _ in wanted]

    def _describe(self, most: int) -> None:
        """Describe some of the first inputs under the rehearsals: that takes no pass."""
        about = self._about
        if about is None or not about.described:
            return
        for features, change in zip(self._features, self._rehearsals.values(), strict=True):
            have = sum(map(len, features))
            take = min(_BLOCK - have, most)
            if take > 0:
                item = changed_item(_joined(self._rows[have : have + take]), change, about)
                features.append(self._described(item))
                most -= take

    def _described(self, item: Arguments) -> Tensor:
        """Descriptions (n, p') of inputs in the stream's own units."""
        x, about = only_input(item), self._about
        if x is None or about is None or not about.described:
            raise RuntimeError("a start describes inputs of one tensor, after it has gathered them")
        return describe(standardized(x, about.mean, about.deviation)).cpu().nan_to_num(0.0, 0.0, 0.0)

    def _begin(self) -> None:
        """All inputs are there: tell domains apart by what inputs look like, and line the rehearsals up."""
        total = len(self._rehearsals) + 1
        blocks = range(0, self.count, _BLOCK)
        self._queue = [(a, i) for b in blocks for a in range(total) for i in range(b, min(b + _BLOCK, self.count))]
        self._groups = _Groups(self._references, total, self._order[0])
        first = torch.cat(self._moments[self._order[0]], 1)
        self._own = self._featured(_joined(self._rows), first)
        self._describe(self.count * _BLOCK)
        self._place(self._own[:, : self._looked()] if self._looked() else self._own)
        self._features = [[] for _ in range(total)]
        if not self._rehearsals:
            self._queue, self.done = [], True

    def _looked(self) -> int:
        """Numbers in a description; 0 where inputs are not described."""
        about = self._about
        return len(names(about.mean.numel(), self._rank())) if about is not None and about.described else 0

    def _featured(self, item: Arguments, first: Tensor) -> Tensor:
        """Features (n, p) by which places are found."""
        about = self._about
        if about is None:
            raise RuntimeError("a start describes inputs after it has gathered them")
        return features_of([item], first, self._references[self._order[0]], about, only_input)[0]

    def _place(self, own: Tensor) -> None:
        """Find the domains among the inputs, and the discriminants between rehearsed ones, from features (n, p)."""
        every = [torch.cat(features) for features in self._features[-len(self._rehearsals) :] if features]
        found = measure_places(own, every, self._labels, self._frequencies, PlaceSettings(), from_stream=True)
        self._places, self.several = found.places, found.several
        self._measure(found.groups)
        if self._looked() and every:
            self._looks = torch.stack([one[:, : self._looked()].mean(0) for one in (own, *every)])

    def _rank(self) -> int:
        x = only_input(self._rows[0])
        return 0 if x is None else x.dim()

    # -- all sites under each rehearsal --------------------------------------------------------------------------

    def _show(self, model: nn.Module, rows: int) -> None:
        groups, about = self._groups, self._about
        if groups is None or about is None:
            raise RuntimeError("a start shows rehearsals after it has looked at them")
        batch, self._queue = self._queue[:rows], self._queue[rows:]
        changes: list[Rehearsal] = [_same, *self._rehearsals.values()]
        items, members = [], []
        for a in dict.fromkeys(a for a, _ in batch):
            chosen = [self._rows[i] for b, i in batch if b == a]
            items.append(changed_item(_joined(chosen), changes[a], about))
            members += [a] * len(chosen)
        groups.members = torch.tensor(members)
        self._run(model, groups, _joined(items))
        start = 0
        for a, item in zip(dict.fromkeys(members), items, strict=True):
            stop = start + members.count(a)
            self._features[a].append(self._featured(item, groups.first[:, start:stop]))
            start = stop
        total = len(changes)
        shown = (total * self.count - len(self._queue)) // (total * _BLOCK)
        self.done = not self._queue
        if self.done or (shown > self._built and shown in (1, 2, 4)):
            self._built = shown
            self._place(self._own)
            self._find()

    # -- what was found ------------------------------------------------------------------------------------------

    def _find(self) -> None:
        sites: dict[str, SiteProfile] = {}
        for hook, scatter in zip(self._hooks, self._scatters, strict=True):
            if scatter is None:
                continue
            shifts = scatter.mean.new_zeros(0, 2 * scatter.mean.numel())
            groups = self._groups
            if groups is not None and self._built and hook.index in groups.sums:
                base = groups.shift(hook.index, 0)
                shifts = torch.stack([groups.shift(hook.index, a) - base for a in range(1, groups.count)])
            nothing = scatter.mean.new_zeros(2, scatter.mean.numel())
            sites[hook.source.name] = SiteProfile(
                count=self.count,
                mean=scatter.mean,
                variance=scatter.variance,
                reference=scatter.reference,
                prior=site_prior(scatter, shifts, self._settings),
                between=nothing,
                within=nothing,
                squares=scatter.mean.new_zeros(2, 3),
                calls=self._calls.get(hook.index, 1),
            )
        none = torch.zeros(0, dtype=torch.float64)
        empty = torch.zeros(0, 0, dtype=torch.float64)
        about = self._about
        described = about is not None and about.described
        profile = SourceProfile(
            model_name=self._identity.model_name,
            fingerprint=self._identity.digest,
            count=self.count,
            class_frequencies=self._frequencies,
            sites=sites,
            places=self._places or Places(none, none, none, empty, none, empty, empty),
            place_site=self._hooks[self._order[0]].source.name,
            input_mean=about.mean.cpu() if described and about is not None else none,
            input_deviation=about.deviation.cpu() if described and about is not None else none,
            rehearsals=tuple(self._rehearsals) if self._places is not None else (),
            looks=self._looks,
            clusters=self._clusters[0],
            cluster_width=self._clusters[1],
            cluster_site=self._hooks[self._order[-1]].source.name if self._clusters[0].shape[0] > 1 else "",
            finished=self.done,
        )
        self.latest = profile

    def _run(self, model: nn.Module, visitor: Any, arguments: Arguments) -> Any:
        for hook in self._hooks:
            hook.install(hook.source.original)
            hook.current = visitor
        try:
            return model(*arguments[0], **arguments[1])
        finally:
            for hook in self._hooks:
                hook.current = None


def _same(x: Tensor) -> Tensor:
    return x


def _row(arguments: Arguments, k: int, rows: int) -> Arguments:
    """A copy of one instance of a model's arguments; a caller may write into its own."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return value[k : k + 1].detach().clone()
        return value

    args, kwargs = arguments
    return tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}


def _joined(rows: Sequence[Arguments]) -> Arguments:
    """Instances put together again; what is no tensor is the first one's."""

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.dim():
            return torch.cat(list(values))
        return first

    args = tuple(join([row[0][k] for row in rows]) for k in range(len(rows[0][0])))
    return args, {key: join([row[1][key] for row in rows]) for key in rows[0][1]}
