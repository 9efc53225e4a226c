"""All streams of an adapted model as one snapshot, and back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from normadapt.adapted.streams import Record, Stream
from normadapt.adapted.trees import flatten, rebuild, text
from normadapt.errors import SnapshotError
from normadapt.layers.hooks import SiteHook, are_profiled
from normadapt.layers.policy import NO_DIAGNOSTICS
from normadapt.layers.sites import Fingerprint

FORMAT = 2
"""Raised whenever an older state can no longer be read."""


def take_snapshot(
    identity: Fingerprint, policy: Any, hooks: list[SiteHook], streams: Mapping[str, Stream]
) -> dict[str, Tensor]:
    """Every stream's records as a plain dict of tensors, with what is needed to refuse another model's."""
    flat = flatten(FORMAT, "format")
    flat.update(flatten(identity.digest, "model"))
    flat.update(flatten(identity.model_name, "model_name"))
    flat.update(flatten(type(policy).__name__, "policy"))
    flat.update(flatten(are_profiled(hooks), "profiled"))
    flat.update(flatten(len(streams), "streams"))
    for index, (name, stream) in enumerate(streams.items()):
        flat.update(flatten(name, f"stream|{index}|name"))
        flat.update(flatten(stream.memory, f"stream|{index}|memory"))
        for hook, record in zip(hooks, stream.records, strict=True):
            flat.update(flatten(record._replace(told=record.diagnostics), f"stream|{index}|site|{hook.site.name}"))
    return flat


def read_snapshot(
    state: Mapping[str, Tensor], identity: Fingerprint, policy: Any, hooks: list[SiteHook]
) -> dict[str, Stream]:
    """The streams in a snapshot of this very model and policy.

    Raises:
        SnapshotError: If it is of another model or policy, incomplete, or holds non-finite numbers.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"restore() needs what snapshot() returned, a dict of tensors; got {type(state).__name__}")
    if int(rebuild(state, "format", 0)) != FORMAT if "format#" in state else True:
        raise SnapshotError(
            "the snapshot was taken by another version of normadapt, under a rule that is gone"
            " -> begin anew: adapt(), then snapshot()"
        )
    digest, kind = text(state, "model"), text(state, "policy")
    if digest != identity.digest:
        other = Fingerprint(text(state, "model_name"), digest)
        raise SnapshotError(f"the snapshot was taken of {other}, this model was made from {identity}")
    if kind != type(policy).__name__:
        raise SnapshotError(f"the snapshot was taken under {kind}, this model runs {type(policy).__name__}")
    if rebuild(state, "profiled", None) != are_profiled(hooks):
        words = ("without", "with") if are_profiled(hooks) else ("with", "without")
        raise SnapshotError(f"the snapshot was taken {words[0]} a source profile, this model runs {words[1]} one")
    streams: dict[str, Stream] = {}
    keys = sorted(state)  # rebuild looks through all keys that it is given: show it one site's at a time
    for index in range(int(rebuild(state, "streams", None))):
        prefix = f"stream|{index}|"
        found = _behind(state, keys, prefix + "memory")
        if not found and prefix + "memory~" not in state and policy.memory is not None:
            raise SnapshotError(f"the snapshot has no entry {prefix + 'memory'!r}")
        memory = rebuild(found, prefix + "memory", policy.memory) if found else None
        sites = [(f"{prefix}site|{hook.site.name}", hook) for hook in hooks]
        records = [_record(_behind(state, keys, name), name, policy, hook) for name, hook in sites]
        streams[text(state, f"stream|{index}|name")] = Stream(records, memory)
    return streams


def _behind(state: Mapping[str, Tensor], keys: list[str], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, which stand side by side in the sorted `keys`."""
    first, last = bisect_left(keys, prefix + "|"), bisect_left(keys, prefix + "}")  # "}" follows "|"
    return {key: state[key] for key in keys[first:last]}


def _record(state: Mapping[str, Tensor], prefix: str, policy: Any, hook: SiteHook) -> Record:
    template = Record(policy.init(hook.source), hook.source.original, 0, 0, "", NO_DIAGNOSTICS)
    record: Record = rebuild(state, prefix, template)
    if bool((record.buffers[1] < 0).any()):
        raise SnapshotError(f"the snapshot holds a negative variance for {hook.site.name!r}")
    return record
