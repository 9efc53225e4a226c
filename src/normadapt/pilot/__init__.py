"""A careful way in: an adapted model tried in shadow, on a share of the traffic, on all, and taken back on harm."""

from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    Guard,
    LabelledError,
    Latency,
    NonFinite,
    Score,
    VarianceRatio,
)
from normadapt.pilot.pilot import Pilot
from normadapt.pilot.plan import Plan, StageRule
from normadapt.pilot.routing import arm_of
from normadapt.pilot.stages import Cause, Position, Stage, Transition
from normadapt.pilot.verdict import Outcome, Verdict
from normadapt.pilot.watch import Trip, Watch

__all__ = [
    "Cause",
    "ClassConcentration",
    "ConfidenceCollapse",
    "Disagreement",
    "Guard",
    "LabelledError",
    "Latency",
    "NonFinite",
    "Outcome",
    "Pilot",
    "Plan",
    "Position",
    "Score",
    "Stage",
    "StageRule",
    "Transition",
    "Trip",
    "VarianceRatio",
    "Verdict",
    "Watch",
    "arm_of",
]
