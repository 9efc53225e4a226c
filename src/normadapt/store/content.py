"""A snapshot's content: an adapted model's state as the bytes of one safetensors file, and back with every check.

The file's header says whose state it is. It is one entry of canonical JSON, without a time in it, so that the same
state gives the same bytes, and the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from normadapt.adapted import persistence
from normadapt.adapted._adapt import AdaptedModel
from normadapt.adapted.trees import rebuild, text
from normadapt.errors import SnapshotError, StoreError
from normadapt.layers.sites import Fingerprint
from normadapt.store.records import canonical
from normadapt.version import __version__

FORMAT = "normadapt-snapshot-2"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def header_of(adapted: AdaptedModel, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whose state it is: model, policy, sites, streams, version.

    Raises:
        SnapshotError: If it is not what `AdaptedModel.snapshot` gives, or what a former version gave.
    """
    if "format#" not in state or int(state["format#"]) != persistence.FORMAT:
        raise SnapshotError(
            "the state is of another version of normadapt, or no snapshot -> give what AdaptedModel.snapshot() gives"
        )
    return {
        "format": FORMAT,
        "version": __version__,
        "model_name": text(state, "model_name"),
        "fingerprint": text(state, "model"),
        "policy": text(state, "policy"),
        "settings": _settings(adapted.policy),
        "profiled": rebuild(state, "profiled", None),
        "streams": [text(state, f"stream|{index}|name") for index in range(rebuild(state, "streams", None))],
        "sites": [
            {"name": site.name, "kind": site.kind, "channels": site.channels, "eps": site.eps} for site in adapted.sites
        ],
    }


def _settings(policy: Any) -> dict[str, str]:
    """A policy's hyper-parameters as they print; nothing of an object that is no dataclass.

    What prints with its address would give the same state another name in every process.
    """
    printed = (
        {field.name: repr(getattr(policy, field.name)) for field in fields(policy)} if is_dataclass(policy) else {}
    )
    return {key: value for key, value in printed.items() if " at 0x" not in value}


def check_owner(kept: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Refuse what is not of the same model, under the same kind of policy, with a profile or without one.

    Args:
        kept: A header.
        given: Another header, or `identity_of` a model.
        where: What the first one is of, for the message.

    Raises:
        SnapshotError: With both names.
    """
    remedy = "-> give it the model that it was begun with, or use a store of its own for this one"
    if given["fingerprint"] != kept["fingerprint"]:
        owner, other = (Fingerprint(header["model_name"], header["fingerprint"]) for header in (kept, given))
        raise SnapshotError(f"{where} is of {owner}; the model given was made from {other} {remedy}")
    for key, words in (("policy", "policy"), ("profiled", "source profile")):
        if given.get(key, kept[key]) != kept[key]:
            raise SnapshotError(f"{where} has {words}: {kept[key]}; the model given has {given[key]} {remedy}")


def identity_of(adapted: AdaptedModel) -> dict[str, Any]:
    """What a header says of the model alone."""
    model_name, digest = adapted.fingerprint
    return {"model_name": model_name, "fingerprint": digest, "policy": type(adapted.policy).__name__}


def encode(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file: the same for the same state, on every machine and in every version.

    Written here because the library takes 20 microseconds for each of some thousand small tensors, and does not promise
    the order of what it writes.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key in sorted(state):
        by_dtype.setdefault(state[key].dtype, []).append(key)
    entries: dict[str, Any] = {"__metadata__": {"normadapt": canonical(header)}}
    data: list[bytes] = []
    end = 0
    for dtype in sorted(by_dtype, key=lambda dtype: (-dtype.itemsize, str(dtype))):  # so that all are aligned
        if dtype not in _DTYPES:
            raise SnapshotError(
                f"a snapshot cannot hold {dtype} at {by_dtype[dtype][0]!r}; it can hold {', '.join(_DTYPES.values())}"
            )
        name = _DTYPES[dtype]
        for key in by_dtype[dtype]:
            value = state[key].detach().cpu()
            if dtype is torch.bfloat16:  # numpy has no such type
                value = value.view(torch.int16)
            data.append(value.numpy().tobytes())
            start, end = end, end + len(data[-1])
            entries[key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *data])


def decode_header(data: bytes, where: str) -> dict[str, Any]:
    """What `header_of` said, from the bytes of a file.

    Raises:
        StoreError: If they are not a snapshot's.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["normadapt"])
        found = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where} is not a snapshot of normadapt ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise StoreError(
            f"{where} has format {found!r}; this version reads {FORMAT!r} -> use the version that wrote it"
        )
    return dict(header)


def decode(data: bytes, where: str) -> dict[str, Tensor]:
    """The state, from the bytes of a file.

    Raises:
        StoreError: If they are no safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # safetensors has error classes of its own, which changed between its versions
        raise StoreError(f"{where} is not a safetensors file: {error}") from error


def check_state(
    header: Mapping[str, Any], state: Mapping[str, Tensor], source: Callable[[], Mapping[str, Tensor]] | None
) -> None:
    """Refuse a state that would spoil a model: every number finite, every variance in use above 0, every site there.

    A variance of 0 is accepted where the source has 0 itself (a channel that is dead in the model as trained).

    Args:
        header: As `header_of` gives it.
        state: As `AdaptedModel.snapshot` gives it.
        source: Called for the source's own state if there is a 0; None if `state` is the source's.

    Raises:
        SnapshotError: Every offending entry is named.
    """
    problems = [f"{key}: non-finite numbers" for key in _not_finite(state)]
    dead: Mapping[str, Tensor] | None = None
    for index, stream in enumerate(header["streams"]):
        for site in header["sites"]:
            place = f"stream {stream!r}, site {site['name']!r}"
            variance = state.get(f"stream|{index}|site|{site['name']}|buffers|1")
            if variance is None or tuple(variance.shape) != (site["channels"],):
                got = "none" if variance is None else str(tuple(variance.shape))
                problems.append(f"{place}: expected a variance of shape ({site['channels']},), got {got}")
                continue
            if bool((variance > 0).all()):
                continue
            dead = (source() if source is not None else state) if dead is None else dead
            own = dead[f"stream|0|site|{site['name']}|buffers|1"]
            bad = (variance <= 0) & ~((variance == 0) & (own.to(variance) == 0))
            if bool(bad.any()):
                channels = ", ".join(map(str, bad.nonzero().flatten()[:5].tolist()))
                problems.append(f"{place}: variance not above 0 in {int(bad.sum())} channels, the first are {channels}")
    if problems:
        raise SnapshotError(
            "a state to keep or to use must have finite numbers, and variances above 0 wherever the source's are:\n  "
            + "\n  ".join(problems[:20])
            + "\n  -> reset() the stream, or go back to a good snapshot"
        )


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of entries with NaN or Inf. All of a dtype are looked at together: there are a thousand small ones."""
    together: dict[torch.dtype, list[Tensor]] = {}
    for value in state.values():
        if value.is_floating_point():
            together.setdefault(value.dtype, []).append(value.reshape(-1))
    if all(bool(torch.cat(values).isfinite().all()) for values in together.values()):
        return []
    return [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
