"""The field's rules under their usual names, each from its formula, to compare with: `adapt(model, policy=EMA())`.

Hyper-parameters are weights on the **test** statistic, as everywhere in this library, unless a docstring says that the
paper's is kept. None of them tests whether there is a shift, and none uses a profile.
"""

from normadapt.baselines.balanced import BBN, BDN
from normadapt.baselines.fixed import EDTN, AlphaBN, BatchStatistics, Hybrid, MedBN, SchneiderPrior, Source
from normadapt.baselines.instances import IABN, UnMixTNS
from normadapt.baselines.running import DUA, EMA, RBN, TBR
from normadapt.baselines.tema import TEMA

__all__ = [
    "BBN",
    "BDN",
    "DUA",
    "EDTN",
    "EMA",
    "IABN",
    "RBN",
    "TBR",
    "TEMA",
    "AlphaBN",
    "BatchStatistics",
    "Hybrid",
    "MedBN",
    "SchneiderPrior",
    "Source",
    "UnMixTNS",
]
