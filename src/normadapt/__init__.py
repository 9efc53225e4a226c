"""Keep a trained network's normalization statistics right while its data drift."""

from normadapt import baselines
from normadapt.adapted._adapt import AdaptedModel, adapt
from normadapt.adapted._recalibrate import recalibrate
from normadapt.adapted.rule import Domains
from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, Statistics
from normadapt.profiles._profile_source import profile_source
from normadapt.profiles.source_profile import SourceProfile
from normadapt.version import __version__
from normadapt.weights.blend import Blend


def __getattr__(name: str) -> object:
    if name == "Track":
        raise AttributeError("normadapt.Track is gone: Domains() takes its place, and adapt() uses it by default")
    raise AttributeError(f"module 'normadapt' has no attribute {name!r}")


__all__ = [
    "AdaptedModel",
    "Blend",
    "Domains",
    "Evidence",
    "Policy",
    "SourceProfile",
    "Statistics",
    "__version__",
    "adapt",
    "baselines",
    "profile_source",
    "recalibrate",
]
