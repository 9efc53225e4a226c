"""Policies: how evidence about a stream becomes the statistics in use. One strategy a file."""

from normadapt.policies.base import Diagnostics, Policy, Source, State, Statistics
from normadapt.policies.blend import Blend
from normadapt.policies.track import Track

__all__ = ["Blend", "Diagnostics", "Policy", "Source", "State", "Statistics", "Track"]
