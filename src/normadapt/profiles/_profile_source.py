"""Measuring a source profile: one pass over source inputs, and one for each rehearsal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normadapt.domains.describe import only_input
from normadapt.domains.places import PlaceSettings
from normadapt.errors import NormadaptError
from normadapt.layers.batches import batch_length, check_loader, check_model, moved_item, split_item
from normadapt.layers.hooks import SiteHook, measuring_copy
from normadapt.layers.predictions import Predictions, class_probabilities
from normadapt.layers.reference import Reference
from normadapt.layers.sites import fingerprint
from normadapt.profiles.rehearsals import Rehearsal, rehearsals_for
from normadapt.profiles.rehearse import (
    Inputs,
    Looking,
    OwnMoments,
    Rehearsed,
    Shown,
    assemble,
    changed_item,
    feature_clusters,
    features_of,
    input_moments,
    measure_all,
)
from normadapt.profiles.site_prior import ProfileSettings
from normadapt.profiles.source_profile import SourceProfile

_UNLIKE = 0.15  # deviation from the running statistics, in source units, from which a profile is said to be unlike them


@dataclass(frozen=True)
class ProfileProgress:
    """Where the measuring of a profile stands.

    Args:
        stage: "source inputs", or the name of the rehearsal under way.
        done: Passes over the inputs done.
        passes: Passes in all; None while it is not known.
        batches: Batches done in this pass.
        instances: Instances done in this pass.
    """

    stage: str
    done: int
    passes: int | None
    batches: int
    instances: int


def profile_source(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rehearsals: Mapping[str, Rehearsal] | None = None,
    predictions: Predictions | None = None,
    progress: Callable[[ProfileProgress], None] | None = None,
    settings: ProfileSettings | None = None,
) -> SourceProfile:
    """Measure a model on source data and show it some twenty changes of them; the model is not changed, no labels.

    A few hundred instances suffice. The first 256 are rehearsed: changed, and passed through the model once for each
    change, in the loader's own batches. Classes are the model's own predictions; where the output gives none, clusters
    of the last layer's features stand for them. A loader is iterated once.

    Args:
        model: A module with normalization layers, in any mode; a copy in eval mode is run.
        loader: Yields tensors, tuples or lists whose first element is the input, or dicts of keywords.
        rehearsals: Changes by name, each a callable from inputs (n, c, ...), standardized by the source's own mean and
            deviation a channel, to changed ones of the same shape. Default: `rehearsals_for` the input's dimensions;
            none where the model takes anything but one tensor.
        predictions: Maps an output to class probabilities (n, K). Default: the softmax of a 2-d tensor output.
        progress: Called after each batch of each pass.
        settings: How many inputs are rehearsed, and how far they are trusted.

    Returns:
        The profile, to be handed to `adapt` or saved. Warns where the inputs are unlike the model's training data.

    Raises:
        UnsupportedLayerError: If the model has no normalization layer.
        NormadaptError: If the loader yields fewer than two finite instances.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        >>> with warnings.catch_warnings(action="ignore"):  # this model was not trained on these numbers
        ...     profile = profile_source(model, [torch.randn(32, 1, 8, 8) for _ in range(4)])
        >>> profile.count, list(profile.sites), len(profile.rehearsals)
        (128, ['1'], 20)

    References:
        Rehearsal, and the instance as the sampling unit, are this project's own (docs/THEORY.md, sections 2 and 8).
    """
    check_model(model, "profile_source()")
    check_loader(loader, "profile_source()")
    settings = ProfileSettings() if settings is None else settings
    with torch.no_grad():
        copy, hooks = measuring_copy(model, verb="profile_source()")
        source = _Source(copy, hooks, predictions, settings, progress)
        source.show(loader)
        inputs = source.inputs()
        if rehearsals is None:
            x = only_input(inputs.items[0]) if inputs.described else None
            rehearsals = {} if x is None else rehearsals_for(x.dim())
        hooks = source.reached(model)
        profile = source.rehearse(inputs, hooks, rehearsals, fingerprint(model))
    if profile.unlikeness > _UNLIKE:
        warnings.warn(
            f"the {profile.count} source inputs are unlike what the model was trained on: their moments lie "
            f"{profile.unlikeness:.2f} source deviations from its running statistics, root mean square over layers; "
            "the profile believes the running statistics, and helps all the same",
            stacklevel=2,
        )
    return profile


class _Source:
    """The passes over source inputs."""

    def __init__(
        self,
        model: nn.Module,
        hooks: list[SiteHook],
        predictions: Predictions | None,
        settings: ProfileSettings,
        progress: Callable[[ProfileProgress], None] | None,
    ) -> None:
        self._model = model
        self._hooks = hooks
        self._predictions = predictions
        self._settings = settings
        self._progress = progress
        self._items: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
        self._lengths: list[int] = []
        self._moments: list[list[Tensor]] = [[] for _ in hooks]
        self._first: list[Tensor] = []
        self._probabilities: list[Tensor] | None = []
        self._order: list[int] = []
        self._calls: dict[int, int] = {}
        self._excluded = 0
        self._passes: int | None = None

    def show(self, loader: Iterable[Any]) -> None:
        """One pass over all inputs as they are."""
        batches = instances = kept = 0
        for item in loader:
            arguments = moved_item(split_item(item), self._model)
            looking = Looking()
            output = self._run(looking, arguments)
            rows = batch_length(item)
            finite = torch.ones(rows, dtype=torch.bool)
            for index, hook in enumerate(self._hooks):
                try:
                    values = looking.of(index, rows)
                except ValueError as error:
                    raise NormadaptError(
                        f"profile_source(): {hook.site.name!r}: {error}\n  -> its first dimension must hold a fixed "
                        "number of rows an instance, such as views; other layers cannot be adapted"
                    ) from error
                if values is not None:
                    self._moments[index].append(values)
                    finite &= values.isfinite().all(2).all(0).cpu()
            first = looking.first(rows)
            if first is not None:
                self._first.append(first)
            self._order += [index for index in looking.order if index not in self._order]
            for index, calls in looking.moments.items():
                self._calls[index] = max(self._calls.get(index, 1), len(calls))
            self._note(output, rows, finite)
            lost = rows - int(finite.sum())
            if kept < self._settings.inputs and rows:
                take = min(rows - lost, self._settings.inputs - kept)
                if take:
                    self._items.append(_first_rows(arguments, rows, finite, take))
                    self._lengths.append(take)
                    kept += take
            self._keep(finite)
            self._excluded += lost
            batches, instances = batches + 1, instances + rows - lost
            self._tell("source inputs", 0, batches, instances)
        if instances < 2:
            raise NormadaptError(
                f"profile_source() needs at least two finite source instances; the loader gave {instances} "
                f"in {batches} batches"
            )

    def _keep(self, finite: Tensor) -> None:
        if bool(finite.all()):
            return
        for site in (*self._moments, self._first):
            if site:
                site[-1] = site[-1][:, finite.to(site[-1].device)]
        if self._probabilities:
            self._probabilities[-1] = self._probabilities[-1][finite.to(self._probabilities[-1].device)]

    def _note(self, output: Any, rows: int, finite: Tensor) -> None:
        if self._probabilities is None:
            return
        probabilities = class_probabilities(output, self._predictions)
        if probabilities is None or len(probabilities) != rows:
            self._probabilities = None
            return
        finite &= probabilities.isfinite().all(1).cpu()
        self._probabilities.append(probabilities)

    def _run(self, visitor: Any, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Any:
        for hook in self._hooks:
            if not isinstance(visitor, OwnMoments):
                hook.install_source()
            hook.current = visitor
        try:
            return self._model(*arguments[0], **arguments[1])
        finally:
            for hook in self._hooks:
                hook.current = None

    def _tell(self, stage: str, done: int, batches: int, instances: int) -> None:
        if self._progress is not None:
            self._progress(ProfileProgress(stage, done, self._passes, batches, instances))

    def inputs(self) -> Inputs:
        """The inputs to rehearse."""
        tensors = [only_input(item) for item in self._items]
        found = [x for x in tensors if x is not None]
        if len(found) < len(tensors) or len({x.shape[1:] for x in found}) != 1:
            nothing = torch.zeros(0)
            return Inputs(self._items, self._lengths, nothing, nothing)
        return Inputs(self._items, self._lengths, *input_moments(found))

    def reached(self, model: nn.Module) -> list[SiteHook]:
        """All hooks, once those of layers without running statistics know the moments that were measured."""
        for hook, moments in zip(self._hooks, self._moments, strict=True):
            if moments and not hook.site.tracked:
                values = torch.cat(moments, 1)
                mean = values[0].mean(0)
                hook.take_source(mean, values[1].mean(0) + values[0].var(0, correction=0))
        return self._hooks

    def rehearse(
        self, inputs: Inputs, hooks: list[SiteHook], rehearsals: Mapping[str, Rehearsal], identity: Any
    ) -> SourceProfile:
        """One pass for each change, and all that is known put together."""
        every = [torch.cat(moments, 1) if moments else None for moments in self._moments]
        probabilities = torch.cat(self._probabilities) if self._probabilities else None
        count = next(values.shape[1] for values in every if values is not None)
        labels = torch.full((count,), -1) if probabilities is None else probabilities.argmax(1).cpu()
        shown = Shown(every, self._order, self._calls, labels, probabilities)
        classes = 0 if probabilities is None else probabilities.shape[1]
        references = [Reference.of_running_statistics(hook.source) for hook in hooks]
        clusters: tuple[Tensor, float] = (torch.zeros(0, 0, dtype=torch.float64), 0.0)
        if probabilities is None:
            centres, width, labels = feature_clusters(shown, references)
            if centres.shape[0] > 1:
                clusters, shown.labels, classes = (centres, width), labels, centres.shape[0]
        scatters = measure_all(hooks, shown, classes, self._settings, from_stream=False)
        references = [
            reference if scatter is None else scatter.reference
            for reference, scatter in zip(references, scatters, strict=True)
        ]
        self._passes = 2 + len(rehearsals)
        first = self._order[0]
        base = self._rehearse("unchanged", lambda x: x, inputs, hooks, references, first, 1)
        met = {
            name: self._rehearse(name, change, inputs, hooks, references, first, done)
            for done, (name, change) in enumerate(rehearsals.items(), start=2)
        }
        own, _ = features_of(
            inputs.items, torch.cat(self._first, 1)[:, : sum(inputs.lengths)], references[first], inputs, only_input
        )
        settings = self._settings, PlaceSettings()
        return assemble(
            hooks,
            identity,
            shown,
            scatters,
            base,
            met,
            own,
            inputs,
            clusters,
            self._excluded,
            settings,
            from_stream=False,
        )[0]

    def _rehearse(
        self,
        name: str,
        change: Rehearsal,
        inputs: Inputs,
        hooks: list[SiteHook],
        references: list[Any],
        first: int,
        done: int,
    ) -> Rehearsed:
        own = OwnMoments(references, first)
        items, seen = [], 0
        for batches, (item, length) in enumerate(zip(inputs.items, inputs.lengths, strict=True), start=1):
            changed = changed_item(item, change, inputs)
            items.append(changed)
            self._run(own, changed)
            own.ended(length)
            seen += length
            self._tell(name, done, batches, seen)
        features, look = features_of(items, torch.cat(own.first, 1), references[first], inputs, only_input)
        shifts = [own.shift(hook.index) if hook.index in own else None for hook in hooks]
        return Rehearsed(shifts, features, look)


def _first_rows(
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]], rows: int, finite: Tensor, take: int
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The first finite rows of a model's arguments."""
    chosen = finite.nonzero().flatten()[:take]
    if len(chosen) == rows:
        return arguments

    def some(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return value[chosen.to(value.device)]
        return value

    args, kwargs = arguments
    return tuple(map(some, args)), {key: some(value) for key, value in kwargs.items()}
