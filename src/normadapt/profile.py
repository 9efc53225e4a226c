"""What is measured once on source data, so that a stream can later be told from it: `SourceProfile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normadapt.errors import ProfileMismatchError
from normadapt.shapes import LocationScale, PerChannel, PerClass
from normadapt.sites import Fingerprint, fingerprint
from normadapt.spread import Spread

_FORMAT = "normadapt source profile 1"


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """What the source looks like at one site. All tensors float64; the instance is the sampling unit.

    Args:
        count: Number of instances measured.
        mean: Mean of the layer's input (C,), in its own units.
        variance: Variance of the layer's input (C,), over instances and positions.
        between: Between-class part (2, C) of the variance across instances: row 0 of the instance means over
            sqrt(v_s + eps), row 1 of the half-log-variances.
        within: Within-class part (2, C).
        squares: Traces (2, 3) behind the gates: tr(BB), tr(BW), tr(WW).
        third_cumulant: Third cumulant (C,) of the instance means, in cubed input units.
    """

    count: int
    mean: PerChannel
    variance: PerChannel
    between: LocationScale
    within: LocationScale
    squares: Tensor
    third_cumulant: PerChannel

    def spread(self, channel_weight: PerChannel) -> Spread:
        """The spread of one instance under channel weights gamma^2 (C,)."""
        device = channel_weight.device
        return Spread.from_parts(
            self.between.to(device), self.within.to(device), channel_weight, self.squares.to(device)
        )


_TENSORS = ("mean", "variance", "between", "within", "squares", "third_cumulant")


@dataclass(frozen=True, eq=False)
class SourceProfile:
    """Statistics of a model on its source data, measured once and saved as safetensors.

    Args:
        model_name: Class of the model it was measured on.
        fingerprint: Hash of that model's state; a profile is refused by any other.
        count: Number of instances measured.
        class_frequencies: How often the model predicts each class (K,), or None when its output gives no classes.
        sites: One `SiteProfile` per normalization layer, by its name.
        excluded: Instances left out because some layer saw NaN or Inf.
    """

    model_name: str
    fingerprint: str
    count: int
    class_frequencies: PerClass | None
    sites: Mapping[str, SiteProfile] = field(repr=False)
    excluded: int = 0

    def check(self, model: nn.Module) -> None:
        """Raise `ProfileMismatchError` unless this profile was measured on `model` as it is."""
        given = fingerprint(model)
        if given.digest == self.fingerprint:
            return
        measured = Fingerprint(self.model_name, self.fingerprint)
        missing = [name for name in self.sites if name not in dict(model.named_modules())]
        why = f"it has no layer {missing[0]!r}" if missing else "its weights or running statistics differ"
        raise ProfileMismatchError(
            f"the profile was measured on {measured}, the model given is {given}: {why}.\n"
            "  -> measure one for this model with profile_source(model, source_loader)"
        )

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file."""
        tensors = {f"{name}|{key}": getattr(p, key).contiguous() for name, p in self.sites.items() for key in _TENSORS}
        counts = [p.count for p in self.sites.values()]
        tensors["|counts"] = torch.tensor(counts, dtype=torch.int64)
        if self.class_frequencies is not None:
            tensors["|class_frequencies"] = self.class_frequencies.contiguous()
        metadata = {
            "format": _FORMAT,
            "model_name": self.model_name,
            "fingerprint": self.fingerprint,
            "count": str(self.count),
            "excluded": str(self.excluded),
            "sites": "\n".join(self.sites),
        }
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SourceProfile:
        """Read a profile that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ProfileMismatchError: If the file is not a source profile, or holds non-finite numbers.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no source profile at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ProfileMismatchError(f"{path} is not a source profile: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ProfileMismatchError(
                f"{path} is not a source profile: expected format {_FORMAT!r}, got {metadata.get('format')!r}"
            )
        broken = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
        if broken:
            raise ProfileMismatchError(f"{path} holds non-finite numbers in {', '.join(broken)}: measure it again")
        names = metadata["sites"].split("\n")
        counts = tensors["|counts"].tolist()
        sites = {
            name: SiteProfile(count, *(tensors[f"{name}|{key}"] for key in _TENSORS))
            for name, count in zip(names, counts, strict=True)
        }
        return cls(
            metadata["model_name"],
            metadata["fingerprint"],
            int(metadata["count"]),
            tensors.get("|class_frequencies"),
            sites,
            int(metadata["excluded"]),
        )
