"""All streams of an adapted model as one snapshot, and back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from normadapt.errors import SnapshotError
from normadapt.hooks import SiteHook, are_profiled
from normadapt.policies.base import Diagnostics
from normadapt.sites import Fingerprint
from normadapt.snapshots import flatten, rebuild, text
from normadapt.statistics import Composition
from normadapt.streams import Record, Stream, initial_state

_NO_DIAGNOSTICS = Diagnostics(0.0, (0.0, 0.0), (0.0, 0.0), ((0.0, 0.0), (0.0, 0.0)), (0.0, 0.0), "")


def take_snapshot(
    identity: Fingerprint, policy: Any, hooks: list[SiteHook], streams: Mapping[str, Stream]
) -> dict[str, Tensor]:
    """Every stream's records as a plain dict of tensors, with what is needed to refuse another model's."""
    flat = flatten(identity.digest, "model")
    flat.update(flatten(identity.model_name, "model_name"))
    flat.update(flatten(type(policy).__name__, "policy"))
    flat.update(flatten(are_profiled(hooks), "profiled"))
    flat.update(flatten(len(streams), "streams"))
    for index, (name, stream) in enumerate(streams.items()):
        flat.update(flatten(name, f"stream|{index}|name"))
        flat.update(flatten(stream.composition, f"stream|{index}|composition"))
        for hook, record in zip(hooks, stream.records, strict=True):
            flat.update(flatten(record, f"stream|{index}|site|{hook.site.name}"))
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
        composition = rebuild(_behind(state, keys, prefix + "composition"), prefix + "composition", Composition())
        sites = [(f"{prefix}site|{hook.site.name}", hook) for hook in hooks]
        records = [_record(_behind(state, keys, name), name, policy, hook) for name, hook in sites]
        streams[text(state, f"stream|{index}|name")] = Stream(records, composition)
    return streams


def _behind(state: Mapping[str, Tensor], keys: list[str], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, which stand side by side in the sorted `keys`."""
    first, last = bisect_left(keys, prefix + "|"), bisect_left(keys, prefix + "}")  # "}" follows "|"
    return {key: state[key] for key in keys[first:last]}


def _record(state: Mapping[str, Tensor], prefix: str, policy: Any, hook: SiteHook) -> Record:
    template = Record(initial_state(policy, hook.source), hook.original, 0, 0, "", _NO_DIAGNOSTICS)
    record: Record = rebuild(state, prefix, template)
    if bool((record.buffers[1] < 0).any()):
        raise SnapshotError(f"the snapshot holds a negative variance for {hook.site.name!r}")
    return record
