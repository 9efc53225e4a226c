"""The ways in which `Track` may normalize a batch, and which of them the model's own answers speak for.

Whether what the instances of a stream differ by is their domain or what they show, and whether a shift found by the
layers is one that matters to the model, no layer can tell alone. Where normalizing takes away what the classes differ
by, the model becomes unsure of instances that it knew.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from normadapt.doubts import Doubts

FOLLOWED, TOGETHER, SOURCE, OWN = "followed", "together", "source", "own"
PROFILED_WAYS = MappingProxyType({FOLLOWED: "", TOGETHER: FOLLOWED, SOURCE: ""})
"""The window's statistics, with those of single instances where a stream is mixed; the window's for every instance; the
source's."""
WAYS = MappingProxyType({**PROFILED_WAYS, OWN: ""})
"""The same and each instance's own, without regard to what is natural."""

_BARS = {FOLLOWED: 0.0, TOGETHER: 0.3, SOURCE: 0.45, OWN: 0.02}  # what each must be better by
_SOURCE_RUINED = 0.2  # the source, where instances' own statistics ruin the answers
_PREFERRED = 0.5  # instances' own may be worse by so much
_AT_HOME = 128.0  # instances in a window after which it has met half of what there is to meet, whatever they are
_BALANCED = 8.0  # times as much do they count if all classes are among them, as the model sees them
_TOLD_WEIGHS = 5.0
_LEAST_ENTROPY, _LEAST_TOLD = 0.05, 0.2  # nats; smaller ones are told by chance
_PRIOR = 6.0  # instances that "no difference" is worth
OWN_WEIGHT = 0.7
"""What an instance's own statistics weigh at least in the way of that name."""


def choose_way(doubts: Doubts) -> str:
    r"""The way whose answers are the surest and tell most.

    They are compared by

    $$ -\log(H + 0.05) + 5 \log(I + 0.2), \qquad H = E\,h(p), \quad I = h(E\,p) - H $$

    with h the entropy of class probabilities p over the instances that were passed through in every way; where
    instances' own statistics are compared, E p counts two more that show all classes alike, since the first cannot tell
    of many. A model that sees garbage may be sure, but then it answers the same to everything, and I is small. The
    difference from the window's statistics is shrunk as if six more instances had shown none, and a way whose answers
    tell next to nothing (I up to 0.2) is not taken. Instances' own may be worse by 0.5 at first, by half of that after
    128 instances without a jump (after 16, if all classes are among them as these answers have it), and by 0.5 for as
    long as a stream is mixed: neither runs of a class nor mixed domains harm them, while a window has yet to meet both
    or has met the latter.

    If instances' own statistics leave the model more doubt than it has to tell (I up to H), then their moments are what
    they show, and a window that has met one class only has moved to that class. In a run of a class I is small in the
    right way, too. So the 5 is 5 N/(N + 128) then, after N instances without a jump in a stream that is not mixed,
    instances' own are not taken, and the source's may tell nothing: they have to be better by 0.2; by 0.45 with a
    profile, where instances' own are not compared. Where those do tell, a way that runs cannot mislead is there
    already, and answers with the source's that seem better are of a model that is lost: then they are not taken.

    References:
        I is what Krause, Perona and Gomes (2010), NeurIPS 23, maximize to learn classes without labels.
    """
    known = doubts.by_way()
    if FOLLOWED not in known:
        return FOLLOWED
    young, own = _young(doubts.met), known.get(OWN)
    told = {way: answers.told if own is None else answers.told_smoothed for way, answers in known.items()}
    eligible = {way for way in known if way == FOLLOWED or told[way] > _LEAST_TOLD}
    bars, weight = dict(_BARS), _TOLD_WEIGHS
    if own is not None and told[OWN] > max(_LEAST_TOLD, own.entropy):
        eligible.discard(SOURCE)
    elif own is not None:
        eligible = eligible - {OWN} | {SOURCE}
        bars[SOURCE] = _SOURCE_RUINED
        weight *= 1 - young
    balances = {way: _balance(answers.entropy, told[way], weight) for way, answers in known.items()}
    if own is not None:
        balances[OWN] += _PREFERRED * _young(doubts.met * max(1.0, _BALANCED * (1 - own.imbalance) ** 2))
    share = doubts.count / (doubts.count + _PRIOR)
    gains = {way: share * (balances[way] - balances[FOLLOWED]) - bars[way] for way in known}
    return max((way for way in known if way in eligible), key=gains.__getitem__)


def _young(met: float) -> float:
    return _AT_HOME / (_AT_HOME + met)


def _balance(entropy: float, told: float, weight: float) -> float:
    return weight * math.log(max(told, 0.0) + _LEAST_TOLD) - math.log(entropy + _LEAST_ENTROPY)
