"""What a domain looks like, in words that an operator reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN = 0.25  # of the deviation among source inputs: a level that changed less is not worth a word
_NEAR = 0.6  # of its distance from the source: a rehearsal nearer to a domain than this is one that it resembles


def contrast_of(look: Tensor, source: Tensor) -> float:
    """Contrast of inputs with this mean description (p,) over the source's."""
    return math.exp(float(look[1] - source[1]))


def look_in_words(look: Tensor, source: Tensor, deviation: Tensor, beside: str = "source") -> str:
    """How inputs differ from the source's: "contrast 0.4 of source, brighter".

    Args:
        look: Mean description (p,) of the domain's inputs, see `domains.describe`.
        source: The same of the source's.
        deviation: Natural deviation of each number among the source's inputs.
        beside: What they are compared with.
    """
    if look.numel() < 2:
        return ""
    words = []
    ratio = contrast_of(look, source)
    if not 0.87 < ratio < 1.15:
        words.append(f"contrast {ratio:.2g} of {beside}")
    level = float(look[0] - source[0])
    if abs(level) > max(_PLAIN, 0.5 * float(deviation[0])):
        words.append("brighter" if level > 0 else "darker")
    if look.numel() > 6:
        edges = math.exp(float(look[2] - source[2])) / ratio
        if edges > 1.5:
            words.append("rougher")
        elif edges < 0.67:
            words.append("smoother")
    return ", ".join(words) or f"as the {beside}"


def resembled(place: Tensor, known: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    """Names of the rehearsals that a domain at this place (r,) is like, the nearest first, at most two.

    Args:
        place: The domain's.
        known: Places (a, r) of the rehearsals.
        names: Theirs.
    """
    if not len(known):
        return ()
    distance = torch.linalg.vector_norm(known - place, dim=1)
    near = distance < _NEAR * torch.linalg.vector_norm(place)
    order = distance.argsort().tolist()
    return tuple(names[k] for k in order if bool(near[k]))[:2]
