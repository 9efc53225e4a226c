"""`adapt(model)`: a model that answers like the one it was given and keeps its normalization statistics right."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normadapt.adapted import reporting
from normadapt.adapted.domain_reports import domain_reports
from normadapt.adapted.forward import answer
from normadapt.adapted.observation import Observation, Observer, Observers, Seen
from normadapt.adapted.persistence import read_snapshot, take_snapshot
from normadapt.adapted.rule import Domains, Memory
from normadapt.adapted.settings import DEFAULT_STREAM, current, use
from normadapt.adapted.start import Start
from normadapt.adapted.streams import PER_INSTANCE, Stream, install, new_stream
from normadapt.adapted.trees import map_tensors
from normadapt.domains.bank import Bank, Domain
from normadapt.errors import NormadaptError, SnapshotError, UnsupportedLayerError
from normadapt.layers.batches import batch_length, check_loader, check_model, moved_item, split_item
from normadapt.layers.hooks import SiteHook, are_profiled, hooked_copy, outside_autograd, plain_copy
from normadapt.layers.policy import Policy, Source
from normadapt.layers.predictions import Predictions
from normadapt.layers.sites import Fingerprint, Site, fingerprint
from normadapt.profiles.rehearsals import Rehearsal
from normadapt.profiles.source_profile import SourceProfile
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.report import Report


class Held(NamedTuple):
    """A state that `AdaptedModel.hold` gave; its parts are nobody else's business.

    Args:
        fingerprint: Of the original model.
        streams: Records by stream.
    """

    fingerprint: Fingerprint
    streams: Mapping[str, Stream]


class AdaptedModel(nn.Module):
    """A model whose normalization statistics follow the data; made by `adapt`.

    Call it as the original. It always computes as in eval mode, whatever `train()` says, and its state_dict has
    the original's keys, with the statistics in use as values. One lock serializes forward passes; streams keep
    their statistics apart. `load_state_dict` loads into parameters of its own and into the statistics in use, which
    hold until the next adapting batch; to resume adaptation use `snapshot` and `restore`.

    Args:
        model: A copy that shares its parameters with the original.
        hooks: One per normalization layer, already holding its source.
        policy: How evidence becomes statistics.
        predictions: Maps an output to class probabilities, or None for the default.
        identity: Fingerprint of the original.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: list[SiteHook],
        policy: Policy,
        predictions: Predictions | None,
        identity: Fingerprint,
    ) -> None:
        super().__init__()
        self.model = model
        self.policy = policy
        self.fingerprint = identity
        self._predictions = predictions
        self._hooks = hooks
        self._profiled = are_profiled(hooks)
        self._modules_in_eval = list(model.modules())
        self._adapting = True
        self._streams: dict[str, Stream] = {}
        self._starts: dict[str, Start] = {}
        self._lock = threading.RLock()
        self._observers = Observers(self._lock)
        self.training = False
        self.register_load_state_dict_pre_hook(_prepare_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_finish_load)  # type: ignore[no-untyped-call]
        self._install(self._stream(DEFAULT_STREAM))

    # -- switches ------------------------------------------------------------------------------------------------

    @property
    def adapting(self) -> bool:
        """Whether forward passes adapt; set it to switch adaptation on or off for every thread and stream."""
        return self._adapting

    @adapting.setter
    def adapting(self, value: bool) -> None:
        self._adapting = bool(value)

    def paused(self) -> Any:
        """Context in which this thread's forward passes use the statistics as they are and change nothing.

        Statistics that each instance had of its own (status "per instance") cannot stand still: all share the layer's.
        """
        return use(self, mode="paused")

    def as_source(self) -> Any:
        """Context in which this thread's forward passes answer exactly as the original in eval mode."""
        return use(self, mode="source")

    def stream(self, name: str) -> Any:
        """Context in which this thread's forward passes belong to the stream `name`, with statistics of its own."""
        if not isinstance(name, str):
            raise ValueError(f"a stream's name must be a string; got {name!r}")
        return use(self, stream=name)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers that are adapted, in the model's order; `snapshot` and the report name them so."""
        return tuple(hook.site for hook in self._hooks)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is known of each of `sites` before any test data."""
        return tuple(hook.source for hook in self._hooks)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that have adapted or were looked at so far."""
        with self._lock:
            return tuple(self._streams)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set `training` and nothing else: the model inside stays in eval mode."""
        self.training = mode
        return self

    def observe(self, observer: Observer) -> Observation:
        """Show every adapting pass from now on, once it has succeeded, to `observer(stream, seen)`.

        Any number of observers may look on. What one raises is counted in the handle and costs no answer; copies of the
        model have none. Without observers nothing is done for them.

        Returns:
            A handle: `remove()` ends it, as does leaving it as a context.

        Example:
            >>> import torch
            >>> adapted = adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
            >>> with adapted.observe(lambda stream, seen: print(stream, len(seen.records), seen.output.shape)):
            ...     _ = adapted(torch.randn(16, 1, 8, 8))
            default 1 torch.Size([16, 4, 6, 6])
        """
        if not callable(observer):
            raise TypeError(f"observe() needs something to call with (stream, seen); got {observer!r}")
        return self._observers.add(observer)

    # -- the forward pass ----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adapt to the batch, then answer it: one call of the model (or `policy.passes`), with its own arguments."""
        setting = current(self)
        with self._lock:
            for module in self._modules_in_eval:  # somebody may have reached inside and switched one
                if module.training:
                    module.training = False
            if setting.mode == "source":
                return self._answer_as_source(self._stream_or_untouched(setting.stream), args, kwargs)
            if setting.mode == "paused" or not self._adapting:
                self._install(self._stream_or_untouched(setting.stream))
                return self.model(*args, **kwargs)
            return self._answer_adapting(setting.stream, self._stream(setting.stream), args, kwargs)

    def _answer_as_source(self, stream: Stream, args: Any, kwargs: Any) -> Any:
        for hook in self._hooks:
            hook.install_source()
        try:
            return self.model(*args, **kwargs)
        finally:
            self._install(stream)

    def _answer_adapting(self, name: str, stream: Stream, args: Any, kwargs: Any) -> Any:
        watched = bool(self._observers)
        started = time.perf_counter() if watched else 0.0
        try:
            if isinstance(self.policy, Domains) and not self._profiled:
                stream = self._start(name, stream, (args, kwargs))
            answered = answer(
                lambda: self.model(*args, **kwargs),
                self._hooks,
                self.policy,
                self._predictions,
                stream,
                (args, kwargs),
                watched=watched,
            )
        except BaseException:
            self._install(stream)
            raise
        self._streams[name] = answered.stream
        if answered.running.moments is not None:
            took = time.perf_counter() - started
            moments = answered.running.moments
            seen = Seen(answered.stream.records, moments, answered.output, answered.probabilities, took)
            with outside_autograd():
                self._observers.show(name, seen)
        return answered.output

    def _start(self, name: str, stream: Stream, arguments: Any) -> Stream:
        """Without source data: one further pass, by which the stream's own first inputs are measured."""
        start, memory = self._starts.get(name), stream.memory
        if start is None:
            learned = memory.learned if isinstance(memory, Memory) else None
            if learned is not None and learned.finished:
                return stream  # restored from a snapshot of a stream that had started
            start = self._starts[name] = Start(self._hooks, self.fingerprint)
            start.waits = learned is not None
        with outside_autograd():
            if not start.done:
                start.step(self.model, arguments, self._predictions)
            return _learned(stream, start)

    def rehearse(self, loader: Iterable[Any], *, rehearsals: Mapping[str, Rehearsal] | None = None) -> None:
        """Without source data: measure and rehearse the current stream's inputs at once, and begin it anew.

        Otherwise that is done batch by batch on the first 64 inputs that the stream shows.

        Args:
            loader: Inputs as the stream shows them, some 64 to 256; items as for `profile_source`.
            rehearsals: Changes by name, see `profile_source`.

        Raises:
            NormadaptError: If there is a source profile, or the loader yields fewer than 16 finite instances.
        """
        if self._profiled or not isinstance(self.policy, Domains):
            raise NormadaptError(
                "rehearse() is for Domains without a source profile -> adapt(model), then rehearse(loader)"
            )
        check_loader(loader, "rehearse()")
        given = list(loader)
        items = [moved_item(split_item(item), self.model) for item in given]
        lengths = [batch_length(item) for item in given]
        name = current(self).stream
        with self._lock, outside_autograd():
            start = Start(self._hooks, self.fingerprint, rehearsals, inputs=max(16, min(256, sum(lengths))))
            try:
                for item in items:
                    start.step(self.model, item, self._predictions)
                while start.gathered and not start.done:
                    start.step(self.model, items[0], self._predictions)
            finally:
                self._install(self._stream(name))
            if not start.done:
                raise NormadaptError(f"rehearse() needs at least 16 finite instances; the loader gave {start.count}")
            self._starts[name] = start
            self._streams[name] = _learned(self._untouched(), start)
            self._install(self._streams[name])

    def _stream(self, name: str) -> Stream:
        if name not in self._streams:
            self._streams[name] = self._stream_or_untouched(name)
        return self._streams[name]

    def _stream_or_untouched(self, name: str) -> Stream:
        """For passes that change nothing: a name that nothing was learned for is not kept, there may be any number."""
        if name in self._streams:
            return self._streams[name]
        with outside_autograd():
            return self._untouched()

    def _untouched(self) -> Stream:
        return new_stream(self.policy, self._hooks)

    def _install(self, stream: Stream) -> None:
        install(self._hooks, stream.records)

    # -- state ---------------------------------------------------------------------------------------------------

    def reset(self, stream: str | None = None) -> None:
        """Forget what was seen: one stream by name, or all of them; the source's statistics are in use again.

        Raises:
            KeyError: If there is no stream of that name.
        """
        with self._lock:
            if stream is not None and stream not in self._streams:
                raise KeyError(f"no stream {stream!r}; there are {', '.join(map(repr, self._streams)) or 'none'}")
            for name in [stream] if stream is not None else list(self._streams):
                del self._streams[name]
                self._starts.pop(name, None)
            self._install(self._stream(current(self).stream))

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that adapting has changed, as a plain dict of tensors: all streams, for `restore`."""
        with self._lock:
            return take_snapshot(self.fingerprint, self.policy, self._hooks, self._streams)

    def source_snapshot(self) -> dict[str, Tensor]:
        """What `snapshot` gives before the first batch: one stream that has seen nothing, every site at its source."""
        with self._lock, outside_autograd():
            return take_snapshot(self.fingerprint, self.policy, self._hooks, {DEFAULT_STREAM: self._untouched()})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `snapshot` gave; all of it or, on an error, nothing.

        Raises:
            SnapshotError: If the snapshot is of another model or policy, incomplete, or holds non-finite numbers.
        """
        with outside_autograd():
            streams = read_snapshot(state, self.fingerprint, self.policy, self._hooks)
        with self._lock:
            self._starts = {}
            self._take_over(streams)

    def hold(self) -> Held:
        """The state as it is, for `rewind`: as `snapshot`, but in memory only and at no cost."""
        with self._lock:
            return Held(self.fingerprint, MappingProxyType(dict(self._streams)))  # streams are replaced, never changed

    def rewind(self, held: Held) -> None:
        """Take back what `hold` gave, as `restore` does a snapshot: under a millisecond, for when a request waits.

        Raises:
            SnapshotError: If it was held by an adapted model of another original.
        """
        if held.fingerprint != self.fingerprint:
            raise SnapshotError("rewind() was given the state of another model -> pass what this one's hold() gave")
        with self._lock:
            self._take_over(dict(held.streams))

    def _take_over(self, streams: dict[str, Stream]) -> None:
        self._streams = streams
        self._move_streams()
        self._install(self._stream(current(self).stream))

    def freeze(self, domain: int | str | None = None) -> nn.Module:
        """An ordinary module in eval mode with the statistics of a domain baked in; parameters stay shared.

        Warns where each instance had statistics of its own: an ordinary module has one set for all.

        Args:
            domain: Number or name of a domain of the current stream; the present one by default.

        Raises:
            KeyError: If there is no such domain.
        """
        with self._lock:
            stream = self._stream(current(self).stream)
            records = stream.records
            if domain is not None:
                windows = self._domain(stream, domain).windows
                own = [w.ready for w in windows] or [hook.source.original for hook in self._hooks]
                records = [r._replace(buffers=buffers) for r, buffers in zip(records, own, strict=True)]
            layers = 0 if domain is not None else sum(record.status.endswith(PER_INSTANCE) for record in records)
            if layers:
                warnings.warn(
                    f"{layers} of {len(records)} layers gave each instance statistics of its own; in the frozen "
                    "model all instances share a layer's, and a mixed stream may be answered much worse",
                    stacklevel=2,
                )
            install(self._hooks, records)
            try:
                with outside_autograd():
                    return plain_copy(self.model)
            finally:
                self._install(stream)

    def _notes(self, name: str) -> tuple[str, ...]:
        start = self._starts.get(name)
        if not isinstance(self.policy, Domains) or self._profiled:
            return ()
        return ("Starting: nothing seen; the source answers.",) if start is None else (start.progress(),)

    # -- domains -------------------------------------------------------------------------------------------------

    @property
    def domains(self) -> tuple[DomainReport, ...]:
        """The domains that the current stream has met, in the order in which it met them; () for another policy."""
        with self._lock:
            stream = self._stream(current(self).stream)
        profile = self._known(stream)
        if profile is None or not isinstance(stream.memory, Memory):
            return ()
        return domain_reports(stream.memory, profile, self._hooks)

    @property
    def domain(self) -> DomainReport | None:
        """The domain that the current stream is in now; None before its first batch."""
        return next((domain for domain in self.domains if domain.is_present), None)

    def name_domain(self, domain: int | str, name: str) -> None:
        """Give a domain of the current stream a name; it is then the last to be given up for a new one.

        Raises:
            KeyError: If there is no such domain.
            ValueError: If the name is empty, or another domain has it.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a domain's name must be a word or several; got {name!r}")
        self._change_domain(domain, lambda bank, found: _named(bank, found, name))

    def forget_domain(self, domain: int | str) -> None:
        """Forget what the current stream knows of a domain: the source's evidence, or another domain altogether.

        Raises:
            KeyError: If there is no such domain.
        """
        self._change_domain(domain, lambda bank, found: bank.without(found.number))

    def _change_domain(self, domain: int | str, change: Callable[[Bank, Domain], Bank]) -> None:
        with self._lock:
            name = current(self).stream
            stream = self._stream(name)
            found = self._domain(stream, domain)
            memory = stream.memory._replace(bank=change(stream.memory.bank, found))
            self._streams[name] = stream._replace(memory=memory)

    def _domain(self, stream: Stream, domain: int | str) -> Domain:
        names: list[str] = []
        if isinstance(stream.memory, Memory):
            bank = stream.memory.bank
            for found in bank.domains:
                if domain in (found.number, bank.name_of(found)):
                    return found
            names = [repr(bank.name_of(found)) for found in bank.domains]
        raise KeyError(f"no domain {domain!r} in this stream; there are {', '.join(names) or 'none'}")

    def _known(self, stream: Stream) -> SourceProfile | None:
        """What is known of the source: the profile, or what the stream itself was rehearsed on."""
        learned = stream.memory.learned if isinstance(stream.memory, Memory) else None
        return learned or self._hooks[0].source.profile

    def report(self) -> Report:
        """What was seen and done at every site, in the current stream."""
        name = current(self).stream
        with self._lock:
            adapting = self._adapting and current(self).mode == "adapt"
            records = list(self._stream(name).records)
            domains = self.domains
            notes = self._notes(name)
        # Records are replaced, never changed: a pass need not wait while they are reduced to numbers.
        return reporting.describe(
            self.fingerprint.model_name, self.policy, name, adapting, self._hooks, records, domains, notes
        )

    # -- torch's own protocols -----------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's keys, with the current stream's statistics in use."""
        with self._lock:
            self._install(self._stream(current(self).stream))
            return self.model.state_dict(*args, **kwargs)

    def _own_parameters(self, data: Callable[[Tensor], Tensor]) -> None:
        """Replace every Parameter by one of our own over `data` of its values; ties between layers stay."""
        own: dict[int, nn.Parameter] = {}
        for module in self._modules_in_eval:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    copied = nn.Parameter(data(parameter.detach()), parameter.requires_grad)
                    module._parameters[name] = own.setdefault(id(parameter), copied)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        # Moving or casting replaces a Parameter's data: do that to our own Parameters, not to the original's.
        self._own_parameters(lambda tensor: tensor)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            mean, variance = hook.source.original
            original = fn(mean), fn(variance)
            hook.source = _moved(hook.source._replace(profile=None), original[0].device)._replace(
                original=original, profile=hook.source.profile
            )
            hook.install(original)
        self._starts = {}
        self._move_streams()
        return self

    def _move_streams(self) -> None:
        """Bring every stream to where its site is: state stays float64, buffers take the layer's dtype."""
        for name, stream in self._streams.items():
            records = []
            for hook, record in zip(self._hooks, stream.records, strict=True):
                like = hook.source.original[0]
                mean, variance = record.buffers
                records.append(_moved(record, like.device)._replace(buffers=(mean.to(like), variance.to(like))))
            memory = stream.memory
            moved = memory.moved(like.device) if isinstance(memory, Memory) else _moved(memory, like.device)
            self._streams[name] = Stream(records, moved)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_observers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()
        self._observers = Observers(self._lock)


def _learned(stream: Stream, start: Start) -> Stream:
    """The stream with what its start has found so far."""
    found, memory = start.latest, stream.memory
    if found is None or (start.waits and not start.done):
        return stream
    if not isinstance(memory, Memory):
        return stream._replace(memory=Memory.begun(found, has_source=False))
    if memory.learned is found:
        return stream
    return stream._replace(memory=memory.relearned(found))


def _named(bank: Bank, found: Domain, name: str) -> Bank:
    if any(bank.name_of(other) == name and other.number != found.number for other in bank.domains):
        raise ValueError(f"another domain of this stream is named {name!r}")
    return bank.with_domain(found._replace(name=name))


def _moved(tree: Any, device: torch.device) -> Any:
    return map_tensors(tree, lambda tensor: tensor.to(device))


def _prepare_load(adapted: AdaptedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict: give its keys our inner prefix, and let it write into copies of the buffers."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    state_dict.update({f"{prefix}model.{key[len(prefix) :]}": state_dict.pop(key) for key in keys})
    with outside_autograd():
        adapted._own_parameters(torch.clone)  # loading writes in place, and the original must not change
        stream = adapted._stream(current(adapted).stream)
        for hook, record in zip(adapted._hooks, stream.records, strict=True):
            hook.site.write(record.buffers[0].clone(), record.buffers[1].clone())


def _finish_load(adapted: AdaptedModel, _keys: Any) -> None:
    """After load_state_dict: what was loaded into the layers is in use in the current stream."""
    name = current(adapted).stream
    stream = adapted._stream(name)
    with outside_autograd():
        records = [
            record._replace(buffers=tuple(_normal(buffer) for buffer in hook.site.buffers()))
            for hook, record in zip(adapted._hooks, stream.records, strict=True)
        ]
    adapted._streams[name] = Stream(records, stream.memory)
    adapted._install(adapted._streams[name])


def _normal(buffer: Any) -> Any:
    """A tensor that gradients can pass by: a loaded one may have been made in inference mode."""
    return buffer.clone() if buffer.is_inference() else buffer


def adapt(
    model: nn.Module,
    profile: SourceProfile | None = None,
    policy: Policy | None = None,
    *,
    predictions: Predictions | None = None,
) -> AdaptedModel:
    """A model that answers like `model` and keeps its normalization statistics right while the data drift.

    `model` is never changed: the result shares its parameters and owns its statistics.

    Args:
        model: Any module with layers that keep running statistics: BatchNorm1d, 2d, 3d, SyncBatchNorm and their
            subclasses; with a profile also batch norms that keep none.
        profile: What `profile_source` measured on this very model; without it the same is learned from the stream.
        policy: How evidence becomes statistics; `Domains()` by default.
        predictions: Maps an output to class probabilities (n, K). Default: the softmax of a 2-d tensor output; for any
            other output the correlation of labels within a stream is not used.

    Returns:
        The adapted model, adapting from its first call.

    Raises:
        UnsupportedLayerError: If no layer can be adapted, or one keeps no statistics and there is no profile.
        ProfileMismatchError: If the profile was measured on another model.
        TypeError: If `policy` has no `step`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> adapted = adapt(model)
        >>> adapted(torch.randn(16, 1, 8, 8)).shape
        torch.Size([16, 3])

    References:
        Kimura (2025), arXiv 2505.16257, and this project's own rule (docs/THEORY.md, section 8).
    """
    policy = Domains() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a normadapt.Policy with a step of its own; got {policy!r}")
    check_model(model, "adapt()")
    if profile is not None and not isinstance(profile, SourceProfile):
        hint = (
            "pass a policy by name: policy=..."
            if isinstance(profile, Policy)
            else "read a file with SourceProfile.load"
        )
        raise TypeError(f"adapt() needs a SourceProfile as profile, got {type(profile).__name__} -> {hint}")
    if any(isinstance(module, AdaptedModel) for module in model.modules()):
        raise UnsupportedLayerError(
            "adapt() was given a model that is already adapted -> pass the original, or what freeze() returned"
        )
    with outside_autograd():
        copy, hooks = hooked_copy(model, profile, verb="adapt()")
    return AdaptedModel(copy, hooks, policy, predictions, fingerprint(model))
