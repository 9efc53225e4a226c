"""A plan to begin with, as a file that explains itself: the default plan with all guards."""

from __future__ import annotations

from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    Guard,
    LabelledError,
    NonFinite,
    VarianceRatio,
)

GUARDS: tuple[Guard, ...] = (
    Disagreement(),
    ClassConcentration(),
    ConfidenceCollapse(),
    LabelledError(),
    NonFinite(),
    VarianceRatio(),
)
"""All guards that need nothing to be chosen for the application."""

EXAMPLE = """\
# A trial of an adapted model, for normadapt pilot run ... --plan. Every value here is the default, the guards excepted.
# What is left out takes its default (a canary step must give its share and items, though, and a plan a guard); an
# unknown word is refused. A changed plan begins again in shadow.

alpha = 0.001                     # probability that guards roll a stage back without harm
cool_down = 3600.0                # seconds under traffic after a roll back, before the canary begins again
promote_without_labels = false    # true: a quiet stage is enough; else labels or an operator let the next one begin
minimum_labels = 100              # of a stage's own items, before labels may let the next one begin
label_margin = 0.02               # the error rate may be higher than the source's by so much
label_alpha = 0.05                # probability that labels are wrong about that
paired_share = 0.1                # of the items in full, answered by the source too: guards compare these alone, and
                                  # only their labels count. 1 while compute allows: harm is found ten times sooner
unit = "request"                  # or "stream": a camera, line or tenant is on one side as a whole
salt = "normadapt"                # two pilots with different salts do not pick the same ids
idle = 300.0                      # a gap longer than this, in seconds, is no traffic and does not count
commit_every = 1000               # items of the adapted model from one good snapshot to the next
save_every = 500                  # items from one writing of the state to the next
remember = 10000                  # items kept for labels that come late
cusum = false                     # true: guards in full forget a long quiet past; alpha is a rate then

# Both models answer, the source's answers go out, guards learn what is normal. Give it the conditions of use, and
# 3,000 items at least: with fewer, harmless bursts may be taken for harm.
[shadow]
items = 3000
bake = 3600.0                     # seconds under traffic

# The adapted model answers a share of the ids, the same ones again at a larger share. max_weight is the ceiling of the
# weight on the test statistics: a trial can begin cautiously.
[[canary]]
share = 0.01
items = 200                       # answered by the adapted model, not in all
bake = 3600.0
max_weight = 0.25

[[canary]]
share = 0.05
items = 500
bake = 3600.0
max_weight = 0.5

[[canary]]
share = 0.25
items = 1000
bake = 3600.0
max_weight = 0.75

[[canary]]
share = 0.5
items = 2000
bake = 3600.0

# The adapted model answers all; after so much of it, earlier roll backs are forgotten.
[full]
items = 5000
bake = 86400.0

# Guards compare the two models on the same inputs. margin is how much the rate may rise above that of the shadow stage.
[[guards]]
kind = "disagreement"             # another class than the source, on items of which the source is confident
margin = 0.05
confident = 0.8

[[guards]]
kind = "class_concentration"      # answers crowd into few classes
margin = 0.1
memory = 100

[[guards]]
kind = "confidence_collapse"      # much less sure than in the shadow stage, or much surer
margin = 0.05
tail = 0.05

[[guards]]
kind = "labelled_error"           # late labels: wrong where the source is right
margin = 0.02

[[guards]]
kind = "non_finite"               # NaN or infinity in an answer
own_only = true                   # false: also where the source's answer is no better, as on an input of NaN

[[guards]]
kind = "variance_ratio"           # a variance far from the source's
low = 0.001
high = 1000.0

# [[guards]]
# kind = "latency"                # answers take too long; choose the budget
# seconds = 0.1

# [[guards]]
# kind = "score"                  # what the application itself knows of a bad answer, in [0, 1], for each item
# function = "mypackage.mymodule:my_score"
# name = "my_score"
"""
"""As `normadapt pilot plan` writes it."""
