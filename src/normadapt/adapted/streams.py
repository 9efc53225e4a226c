"""One stream's memory (a camera, a line, a tenant), and one forward pass through it.

A pass writes only into its own pending records; the stream takes them over when the pass has succeeded, so a
failed forward leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normadapt.layers.hooks import SiteHook
from normadapt.layers.moments import InstanceMoments, gather_evidence
from normadapt.layers.policy import Answer, Diagnostics, Policy, Source, State, Statistics
from normadapt.types import Buffers

PER_INSTANCE = ", per instance"
"""Ends the status of a site that gives instances statistics of their own."""


Behind: TypeAlias = Callable[[Source, int], Statistics]
"""See `Statistics.behind`."""


class Record(NamedTuple):
    """What a stream knows of one site.

    Args:
        state: The policy's memory of the site.
        buffers: Statistics in use, ready to be written.
        count: Finite instances seen.
        excluded: Instances left out because their activations were not finite.
        status: What happened at the last batch.
        told: What the policy said at its last step, or what makes it; None if nothing, or before the first.
    """

    state: State
    buffers: Buffers
    count: int  # type: ignore[assignment]  # hides tuple.count
    excluded: int
    status: str
    told: Diagnostics | Callable[[], Diagnostics] | None

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What the policy said at its last step; None if nothing, or before the first."""
        return self.told() if callable(self.told) else self.told


class Stream(NamedTuple):
    """Records of all sites, in the order of the sites, and what the policy remembers of all of them together."""

    records: list[Record]
    memory: Any = None


class Pass:
    """One adapting forward pass (or a policy's several): the records that the stream will have if it succeeds."""

    def __init__(
        self,
        policy: Policy,
        stream: Stream,
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}),
        *,
        watched: bool = False,
    ) -> None:
        self.policy = policy
        self.records = list(stream.records)
        self.memory = stream.memory
        self.carry: Any = None
        self.bad: Tensor | None = None
        self.index = 0
        self.rows = 0
        self.moments: list[InstanceMoments | None] | None = [None] * len(self.records) if watched else None
        self._arguments = arguments
        self._behind: Behind | None = None
        self._here = 0
        self._calls = [0] * len(self.records)
        self._had_evidence = False

    def answered(self, probabilities: Tensor | None, sources: Sequence[Source]) -> None:
        """The pass is over: the policy sees all sites at once, and what was answered."""
        if self._had_evidence:  # an empty batch moves nothing
            answer = Answer(probabilities, self.carry, self.memory, self.index, sources)
            before = [record.state for record in self.records]
            states, self.memory = self.policy.answered(before, answer)
            if len(states) != len(self.records):
                raise ValueError(
                    f"{type(self.policy).__name__}.answered() must return one state for each of the "
                    f"{len(self.records)} sites; got {len(states)}"
                )
            if states is not before:
                self.records = [r._replace(state=state) for r, state in zip(self.records, states, strict=True)]
        self.index += 1
        self.carry = self.bad = self._behind = None
        self._calls = [0] * len(self.records)

    def step(self, hook: SiteHook, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Adapt one site to its input; returns a per-instance affine map (scale, offset) (n, C) if one is needed."""
        index = hook.index
        if self._behind is not None:
            return self._settle(hook, x, self._behind)
        before = self.records[index]
        evidence, excluded = gather_evidence(x, self.bad)
        first = self.index == 0  # a further pass brings the same instances again: not counted twice
        lost = before.excluded + (excluded if first else 0)
        if evidence is None:
            if excluded:
                self.bad = torch.ones(len(x), dtype=torch.bool, device=x.device)
            status = "skipped: non-finite input" if excluded else "skipped: empty batch"
            self.records[index] = before._replace(excluded=lost, status=status)
            return None
        if evidence.kept is not None:
            self.bad = ~evidence.kept
        if not self._had_evidence:
            self.rows = len(x)
        self._had_evidence = True
        if self.moments is not None:
            self.moments[index] = evidence.instances
        evidence = evidence._replace(
            upstream=self.carry,
            memory=self.memory,
            arguments=self._arguments,
            input=_finite_rows(x, evidence.kept) if self.policy.needs_input else None,
            pass_index=self.index,
            call=self._calls[index],
        )
        self._calls[index] += 1
        result = self.policy.step(before.state, evidence, hook.source)
        if type(result) is not tuple or len(result) != 2 or not isinstance(result[1], Statistics):
            raise TypeError(
                f"{type(self.policy).__name__}.step() must return a pair (state, Statistics(mean, variance)) for "
                f"{hook.site.name!r}; got {type(result).__name__}"
            )
        state, statistics = result
        self.carry, self._behind, self._here = statistics.carry, statistics.behind, evidence.count
        count = before.count + (evidence.count if first else 0)
        return self._use(hook, before._replace(state=state, count=count, excluded=lost), before, statistics, x)

    def _settle(self, hook: SiteHook, x: Tensor, behind: Behind) -> tuple[Tensor, Tensor] | None:
        """A site behind one that has said what all others are to use: it is not looked at."""
        before = self.records[hook.index]
        after = before._replace(count=before.count + self._here) if self.index == 0 else before
        return self._use(hook, after, before, behind(hook.source, x.shape[0]), x)

    def _use(
        self, hook: SiteHook, after: Record, before: Record, statistics: Statistics, x: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        buffers = self._buffers(hook, statistics, before.buffers)
        if buffers is None or (statistics.ready is None and not _are_finite(statistics.instances)):
            self.records[hook.index] = after._replace(state=before.state, status="skipped: non-finite statistics")
            return None
        told = statistics.diagnostics or before.told
        source_in_use = buffers is hook.source.original
        if source_in_use and isinstance(told, Diagnostics):
            told = told.unweighted()
        instances = None
        if statistics.instances is not None:
            instances = self._instance_map(hook, statistics.instances, buffers, x)
        status = statistics.status or (told.status if isinstance(told, Diagnostics) else "")
        if not status:
            status = "source" if source_in_use and instances is None else "adapted"
        if instances is not None:
            status += PER_INSTANCE
        self.records[hook.index] = after._replace(buffers=buffers, status=status, told=told)
        hook.install(buffers)
        return instances

    def _buffers(self, hook: SiteHook, statistics: Statistics, in_use: Buffers) -> Buffers | None:
        if statistics.ready is not None:
            like = hook.source.original[0]
            ready = statistics.ready
            return ready if ready[0].dtype == like.dtype else (ready[0].to(like), ready[1].to(like))
        mean, variance = statistics.mean, statistics.variance
        if mean is None or variance is None:
            return in_use
        original = hook.source.original
        if mean is hook.source.mean and variance is hook.source.variance:
            return original  # not a rounded copy: the source's predictions stay equal to the bit
        expected = hook.source.mean.shape
        if mean.shape != expected or variance.shape != expected:
            raise ValueError(
                f"{type(self.policy).__name__}.step() must return a mean and a variance of shape {tuple(expected)} "
                f"for {hook.site.name!r}; got {tuple(mean.shape)} and {tuple(variance.shape)}"
            )
        like = original[0]
        written = mean.to(like), variance.to(like)
        if math.isfinite(float((written[0] + written[1].sqrt()).sum())):
            return written
        # Not finite or negative, or only too large for the layer's dtype.
        if not bool((mean.isfinite() & variance.isfinite() & (variance >= 0)).all()):
            return None
        largest = torch.finfo(like.dtype).max
        return mean.clamp(-largest, largest).to(like), variance.clamp(max=largest).to(like)

    def _instance_map(
        self, hook: SiteHook, instances: tuple[Tensor, Tensor], buffers: Buffers, x: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Scale and offset (n, C) that give each instance its own statistics under a layer that uses common ones."""
        mean, variance = instances
        kept = None if self.bad is None or self.bad.shape[0] != x.shape[0] else ~self.bad
        rows = x.shape[0] if kept is None else int(kept.sum())
        expected = (rows, x.shape[1])
        if mean.shape != expected or variance.shape != expected:
            raise ValueError(
                f"{type(self.policy).__name__}.step() must return per-instance statistics of shape {expected} "
                f"for {hook.site.name!r}; got {tuple(mean.shape)} and {tuple(variance.shape)}"
            )
        eps = hook.source.eps
        scale = ((buffers[1].double() + eps) / (variance + eps).clamp_min(1e-300)).sqrt()
        offset = buffers[0].double() - mean * scale
        if kept is not None:  # instances with NaN or Inf were not measured: leave them as they are
            full = scale.new_ones(x.shape[0], scale.shape[1]), scale.new_zeros(x.shape[0], scale.shape[1])
            full[0][kept], full[1][kept] = scale, offset
            scale, offset = full
        return scale.to(x.dtype), offset.to(x.dtype)


def _finite_rows(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x[kept]


def _are_finite(instances: tuple[Tensor, Tensor] | None) -> bool:
    return instances is None or math.isfinite(float((instances[0] + instances[1].sqrt()).sum()))


def new_stream(policy: Policy, hooks: list[SiteHook]) -> Stream:
    """A stream that has seen nothing: every site at its source."""
    return Stream([Record(policy.init(h.source), h.source.original, 0, 0, "source", None) for h in hooks])


def install(hooks: list[SiteHook], records: list[Record]) -> None:
    """Write the statistics in use into the layers."""
    for hook, record in zip(hooks, records, strict=True):
        hook.install(record.buffers)
