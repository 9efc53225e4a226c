"""What is measured once on source data, so that a stream can later be told from it: `SourceProfile`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normadapt.domains.places import Places
from normadapt.errors import ProfileMismatchError
from normadapt.layers.reference import Reference
from normadapt.layers.sites import Fingerprint, fingerprint
from normadapt.layers.spread import Spread
from normadapt.types import LocationScale, PerChannel, PerClass
from normadapt.weights.matrix import SitePrior

FORMAT = "normadapt source profile 2"
_REMEDY = "measure one for this model with profile_source(model, source_loader)"


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """What the source looks like at one site. All tensors float64; the instance is the sampling unit.

    Args:
        count: Number of instances measured.
        mean: Mean of the layer's input (C,), in its own units.
        variance: Variance of the layer's input (C,), over instances and positions, biased.
        reference: What is believed of these as the source's moments: shifts are measured from there.
        prior: Covariances of shifts, classes and instances.
        between: Between-class part (2, C) of the variance across instances: row 0 of the instance means over
            sqrt(v_s + eps), row 1 of the half-log-variances.
        within: Within-class part (2, C).
        squares: Traces (2, 3): tr(BB), tr(BW), tr(WW), with channel weights gamma^2.
        calls: How often the layer was called in one pass; its moments are the mean over the calls.
    """

    count: int
    mean: PerChannel
    variance: PerChannel
    reference: Reference
    prior: SitePrior
    between: LocationScale
    within: LocationScale
    squares: Tensor
    calls: int = 1

    def to(self, device: torch.device) -> SiteProfile:
        """The same with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return SiteProfile.from_tensors(self.count, moved, self.calls)

    def spread(self, channel_weight: PerChannel) -> Spread:
        """The spread of one instance under channel weights gamma^2 (C,)."""
        device = channel_weight.device
        return Spread.from_parts(
            self.between.to(device), self.within.to(device), channel_weight, self.squares.to(device)
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {name: getattr(self, name) for name in ("mean", "variance", "between", "within", "squares")}
        found |= {f"reference.{name}": value for name, value in self.reference._asdict().items()}
        return found | {f"prior.{name}": value for name, value in self.prior._asdict().items()}

    @classmethod
    def from_tensors(cls, count: int, tensors: Mapping[str, Tensor], calls: int = 1) -> SiteProfile:
        """What `tensors` gave."""
        return cls(
            count,
            tensors["mean"],
            tensors["variance"],
            Reference(*(tensors[f"reference.{name}"] for name in Reference._fields)),
            SitePrior(*(tensors[f"prior.{name}"] for name in SitePrior._fields)),
            tensors["between"],
            tensors["within"],
            tensors["squares"],
            calls,
        )


@dataclass(frozen=True, eq=False)
class SourceProfile:
    """Statistics of a model on its source data, measured once and saved as safetensors.

    Args:
        model_name: Class of the model it was measured on.
        fingerprint: Hash of that model's state; a profile is refused by any other.
        count: Number of instances measured.
        class_frequencies: How often the model predicts each class (K,), or each cluster of features where its output
            gives no classes; (0,) where there are neither.
        sites: One `SiteProfile` per normalization layer, by its name.
        places: Where inputs lie among the rehearsed domains.
        place_site: Name of the layer that is reached first, whose moments tell domains apart.
        input_mean, input_deviation: Of each channel of the inputs (c,); (0,) where inputs are not described.
        rehearsals: Names of the rehearsals, in the order of `places.known`.
        looks: Mean description (a, p) of the inputs under each rehearsal, first the unchanged ones'.
        clusters: Centres (K, C) of the last layer's instance means, in source deviations, where the output gives no
            classes; (0, 0) else.
        cluster_width: Root mean square distance of instances from their centre a channel.
        unlikeness: How far the inputs' moments lie from the running statistics, root mean square over layers and
            channels in source deviations, beyond what the number of inputs explains.
        cluster_site: Name of the layer whose features these are.
        finished: Whether all rehearsals were shown; False while a stream without source data is still starting.
        excluded: Instances left out because some layer saw NaN or Inf.
    """

    model_name: str
    fingerprint: str
    count: int
    class_frequencies: PerClass
    sites: Mapping[str, SiteProfile] = field(repr=False)
    places: Places = field(repr=False)
    place_site: str = ""
    input_mean: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    input_deviation: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    rehearsals: tuple[str, ...] = ()
    looks: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64), repr=False)
    clusters: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64), repr=False)
    cluster_width: float = 0.0
    unlikeness: float = 0.0
    cluster_site: str = ""
    finished: bool = True
    excluded: int = 0

    @cached_property
    def devices(self) -> dict[str, Mapping[str, SiteProfile]]:
        """Copies of `sites` on other devices, made when first asked for."""
        return {}

    def check(self, model: nn.Module) -> None:
        """Raise `ProfileMismatchError` unless this profile was measured on `model` as it is."""
        given = fingerprint(model)
        if given.digest == self.fingerprint:
            return
        measured = Fingerprint(self.model_name, self.fingerprint)
        missing = [name for name in self.sites if name not in dict(model.named_modules())]
        why = f"it has no layer {missing[0]!r}" if missing else "its weights or running statistics differ"
        raise ProfileMismatchError(
            f"the profile was measured on {measured}, the model given is {given}: {why}.\n  -> {_REMEDY}"
        )

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file."""
        tensors = {f"{name}|{key}": t for name, site in self.sites.items() for key, t in site.tensors().items()}
        tensors |= {f"|places.{name}": value for name, value in self.places._asdict().items()}
        for name in ("class_frequencies", "input_mean", "input_deviation", "looks", "clusters"):
            tensors[f"|{name}"] = getattr(self, name)
        described = {
            "model_name": self.model_name,
            "fingerprint": self.fingerprint,
            "count": self.count,
            "excluded": self.excluded,
            "sites": {name: [site.count, site.calls] for name, site in self.sites.items()},
            "place_site": self.place_site,
            "rehearsals": self.rehearsals,
            "cluster_width": self.cluster_width,
            "unlikeness": self.unlikeness,
            "cluster_site": self.cluster_site,
        }
        metadata = {"format": FORMAT, "profile": json.dumps(described)}
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SourceProfile:
        """Read a profile that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ProfileMismatchError: If the file is not a source profile, is one of an older version, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no source profile at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ProfileMismatchError(f"{path} is not a source profile: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ProfileMismatchError(
                f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}\n  -> {_REMEDY}"
            )
        broken = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
        if broken:
            raise ProfileMismatchError(f"{path} holds non-finite numbers in {', '.join(broken)}\n  -> {_REMEDY}")
        try:
            return cls._from_parts(json.loads(metadata["profile"]), tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileMismatchError(f"{path} is damaged: {error!r}\n  -> {_REMEDY}") from error

    @classmethod
    def _from_parts(cls, described: Any, tensors: Mapping[str, Tensor]) -> SourceProfile:
        sites: dict[str, SiteProfile] = {}
        for name, (count, calls) in described["sites"].items():
            own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}|")}
            sites[str(name)] = SiteProfile.from_tensors(int(count), own, int(calls))
        return cls(
            model_name=str(described["model_name"]),
            fingerprint=str(described["fingerprint"]),
            count=int(described["count"]),
            class_frequencies=tensors["|class_frequencies"],
            sites=sites,
            places=Places(*(tensors[f"|places.{name}"] for name in Places._fields)),
            place_site=str(described["place_site"]),
            input_mean=tensors["|input_mean"],
            input_deviation=tensors["|input_deviation"],
            rehearsals=tuple(map(str, described["rehearsals"])),
            looks=tensors["|looks"],
            clusters=tensors["|clusters"],
            cluster_width=float(described["cluster_width"]),
            unlikeness=float(described["unlikeness"]),
            cluster_site=str(described["cluster_site"]),
            excluded=int(described["excluded"]),
        )
