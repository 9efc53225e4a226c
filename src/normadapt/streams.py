"""One stream's memory (a camera, a line, a tenant), and one forward pass through it.

A pass writes only into its own pending records; the stream takes them over when the pass has succeeded, so a
failed forward leaves no trace.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.hooks import Buffers, SiteHook
from normadapt.policies.base import Diagnostics, Source, State, Statistics
from normadapt.statistics import Composition, InstanceMoments, gather_evidence

PER_INSTANCE = ", per instance"
"""Ends the status of a site that gives instances statistics of their own."""


class Record(NamedTuple):
    """What a stream knows of one site.

    Args:
        state: The policy's memory.
        buffers: Statistics in use, ready to be written.
        count: Finite instances seen.
        excluded: Instances left out because their activations were not finite.
        status: What happened at the last batch.
        diagnostics: What the policy said at its last step; None if nothing, or before the first.
        way: The one of the policy's ways that `buffers` are of; see `Policy.ways`.
    """

    state: State
    buffers: Buffers
    count: int  # type: ignore[assignment]  # hides tuple.count
    excluded: int
    status: str
    diagnostics: Diagnostics | None
    way: str = ""

    def answered_as(self, answer: Record) -> Record:
        """What another pass over the same batch has to say of the answer, where the knowledge kept is this one's."""
        told, said = self.diagnostics, answer.diagnostics
        if told is not None:
            told = told.unweighted() if said is None else told._replace(weight=said.weight, noise=said.noise)
        return self._replace(buffers=answer.buffers, status=answer.status, diagnostics=told, way=answer.way)


class Stream(NamedTuple):
    """Records of all sites, in the order of the sites, and the predicted classes so far."""

    records: list[Record]
    composition: Composition


class Pass:
    """One adapting forward pass (or a policy's several): the records that the stream will have if it succeeds.

    `way` is the one of the policy's ways in which it goes; `jumped`, `mixed` and `split` say afterwards whether a
    site gathers its evidence anew, whether one finds several domains in the stream, and whether one gave instances
    statistics of their own. `told` knows the batch's own predicted classes, where it has been passed before.
    """

    def __init__(
        self,
        policy: Any,
        stream: Stream,
        *,
        watched: bool = False,
        way: str = "",
        told: Composition | None = None,
    ) -> None:
        self.policy = policy
        self.records = list(stream.records)
        self.composition = stream.composition if stream.composition.last is not None else None
        self.carry: Any = None
        self.bad: Tensor | None = None
        self.index = 0
        self.way, self.told = way, told
        self.jumped = self.split = self.mixed = False
        self.moments: list[InstanceMoments | None] | None = [None] * len(self.records) if watched else None
        self._needs_input = bool(getattr(policy, "needs_input", False))
        self._had_evidence = False

    def repeat(self) -> None:
        """Get ready for another forward pass over the same batch; the policy sees all sites at once."""
        if self._had_evidence:  # an empty batch moves nothing
            states = self.policy.between([record.state for record in self.records])
            if len(states) != len(self.records):
                raise ValueError(
                    f"{type(self.policy).__name__}.between() must return one state for each of the "
                    f"{len(self.records)} sites; got {len(states)}"
                )
            self.records = [r._replace(state=state) for r, state in zip(self.records, states, strict=True)]
        self.index += 1
        self.carry = self.bad = None

    def step(self, hook: SiteHook, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Adapt one site to its input; returns a per-instance affine map (scale, offset) (n, C) if one is needed."""
        before = self.records[hook.index]
        evidence, kept, excluded = gather_evidence(x, self.composition, self.carry, self.bad)
        if kept is not None:
            self.bad = ~kept
        first = self.index == 0  # a further pass brings the same instances again: not counted twice
        lost = before.excluded + (excluded if first else 0)
        if evidence is None:
            status = "skipped: non-finite input" if excluded else "skipped: empty batch"
            self.records[hook.index] = before._replace(excluded=lost, status=status)
            return None
        self._had_evidence = True
        if self.moments is not None:
            self.moments[hook.index] = evidence.instances
        if self._needs_input:
            evidence = evidence._replace(input=x if kept is None else x[kept])
        turned = self.way != before.way
        if not first or self.way or turned:
            evidence = evidence._replace(pass_index=self.index, way=self.way, turned=turned, told=self.told)
        result = self.policy.step(before.state, evidence, hook.source)
        if type(result) is not tuple or len(result) != 2 or not isinstance(result[1], Statistics):
            raise TypeError(
                f"{type(self.policy).__name__}.step() must return a pair (state, Statistics(mean, variance)) for "
                f"{hook.site.name!r}; got {type(result).__name__}"
            )
        state, statistics = result
        self.carry = statistics.carry
        count = before.count + (evidence.count if first else 0)
        buffers = self._buffers(hook, statistics, before.buffers)
        self.split = self.split or statistics.instances is not None
        if buffers is None or not _are_finite(statistics.instances):
            status = "skipped: non-finite statistics"
            self.records[hook.index] = before._replace(count=count, excluded=lost, status=status)
            return None
        diagnostics = statistics.diagnostics or before.diagnostics
        source_in_use = buffers is hook.original
        if source_in_use and diagnostics is not None:
            diagnostics = diagnostics.unweighted()
        self.jumped = self.jumped or statistics.jumped
        self.mixed = self.mixed or statistics.mixed
        instances = None
        if statistics.instances is not None:
            instances = self._instance_map(hook, statistics.instances, buffers, evidence.instances, x, kept)
        status = statistics.status or (diagnostics.status if diagnostics is not None else "")
        if not status:
            status = "source" if source_in_use and instances is None else "adapted"
        if instances is not None:
            status += PER_INSTANCE
        self.records[hook.index] = Record(state, buffers, count, lost, status, diagnostics, self.way)
        hook.site.write(*buffers)
        return instances

    def taken_as(self, way: str) -> list[Record]:
        """The records, where the answer is taken for that of `way`, which would have given the same."""
        if way == self.way:
            return self.records
        return [record._replace(way=way) if record.way == self.way else record for record in self.records]

    def _buffers(self, hook: SiteHook, statistics: Statistics, in_use: Buffers) -> Buffers | None:
        mean, variance = statistics.mean, statistics.variance
        if mean is None or variance is None:
            return in_use
        if mean is hook.source.mean and variance is hook.source.variance:
            return hook.original  # not a rounded copy: the source's predictions stay equal to the bit
        expected = hook.source.mean.shape
        if mean.shape != expected or variance.shape != expected:
            raise ValueError(
                f"{type(self.policy).__name__}.step() must return a mean and a variance of shape {tuple(expected)} "
                f"for {hook.site.name!r}; got {tuple(mean.shape)} and {tuple(variance.shape)}"
            )
        like = hook.original[0]
        written = mean.to(like), variance.to(like)
        if math.isfinite(float((written[0] + written[1].sqrt()).sum())):
            return written
        # Not finite or negative, or only too large for the layer's dtype.
        if not bool((mean.isfinite() & variance.isfinite() & (variance >= 0)).all()):
            return None
        largest = torch.finfo(like.dtype).max
        return mean.clamp(-largest, largest).to(like), variance.clamp(max=largest).to(like)

    def _instance_map(
        self,
        hook: SiteHook,
        instances: tuple[Tensor, Tensor],
        buffers: Buffers,
        measured: InstanceMoments,
        x: Tensor,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset (n, C) that give each instance its own statistics under a layer that uses common ones."""
        mean, variance = instances
        if mean.shape != measured.mean.shape or variance.shape != measured.mean.shape:
            raise ValueError(
                f"{type(self.policy).__name__}.step() must return per-instance statistics of shape "
                f"{tuple(measured.mean.shape)} for {hook.site.name!r}; got {tuple(mean.shape)} and "
                f"{tuple(variance.shape)}"
            )
        eps = hook.source.eps
        scale = ((buffers[1].double() + eps) / (variance + eps).clamp_min(1e-300)).sqrt()
        offset = buffers[0].double() - mean * scale
        if kept is not None:  # instances with NaN or Inf were not measured: leave them as they are
            full = scale.new_ones(x.shape[0], scale.shape[1]), scale.new_zeros(x.shape[0], scale.shape[1])
            full[0][kept], full[1][kept] = scale, offset
            scale, offset = full
        return scale.to(x.dtype), offset.to(x.dtype)


def _are_finite(instances: tuple[Tensor, Tensor] | None) -> bool:
    return instances is None or math.isfinite(float((instances[0] + instances[1].sqrt()).sum()))


def new_stream(policy: Any, hooks: list[SiteHook], composition: Composition) -> Stream:
    """A stream that has seen nothing: every site at its source."""
    records = [Record(initial_state(policy, h.source), h.original, 0, 0, "source", None) for h in hooks]
    return Stream(records, composition)


def install(hooks: list[SiteHook], records: list[Record]) -> None:
    """Write the statistics in use into the layers."""
    for hook, record in zip(hooks, records, strict=True):
        hook.site.write(*record.buffers)


def initial_state(policy: Any, source: Source) -> State:
    """The policy's state before any data; () for a policy that defines none."""
    return policy.init(source) if hasattr(policy, "init") else ()
