"""Keep a trained network's normalization statistics right while its data drift."""

from normadapt import baselines
from normadapt.adapt import AdaptedModel, adapt
from normadapt.policies import Blend, Policy, Statistics, Track
from normadapt.profile import SourceProfile
from normadapt.profiling import profile_source
from normadapt.recalibrate import recalibrate
from normadapt.statistics import Evidence
from normadapt.version import __version__

__all__ = [
    "AdaptedModel",
    "Blend",
    "Evidence",
    "Policy",
    "SourceProfile",
    "Statistics",
    "Track",
    "__version__",
    "adapt",
    "baselines",
    "profile_source",
    "recalibrate",
]
