"""Labels that come late: what both models had answered is remembered by id, and what labels say of it is evidence.

The evidence for a promotion is an e-process of its own. Its hypothesis is the opposite of the guard's, "the adapted
model is worse by the margin or more", so that a stage passes only where labels speak against that.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from normadapt.pilot.e_process import EProcess
from normadapt.pilot.routing import Id

_LONG = 1000  # labels that the document of the answers may lag behind; beyond it, it is written anew

# Two models that mostly agree give signals of 1/2 that hardly scatter: there large bets pay, elsewhere small ones.
_BETS = (0.03, 0.1, 0.3, 0.6, 0.95)


class Answered(NamedTuple):
    """What both models said of an item.

    Args:
        adapted: Class that the adapted model gave it.
        source: Class that the source gave it.
        era: Roll backs before it: after another one the model that answered is no longer in use.
        visit: Transitions before it: tells whether it belongs to the present stage.
        moment: Items that the arm had answered by then, in all.
    """

    adapted: int
    source: int
    era: int
    visit: int
    moment: int


class LateLabels:
    """Remembers the last items and weighs the labels that arrive for them.

    Args:
        remember: Items kept; older ones are forgotten.
        margin: Difference in error rate up to which the adapted model does not count as worse.
        alpha: Probability that the evidence is wrong.
    """

    def __init__(self, remember: int, margin: float, alpha: float) -> None:
        self._remember = remember
        self._margin = margin
        self.threshold = math.log(1 / alpha)
        self._answered: OrderedDict[str, Answered] = OrderedDict()
        self.matched = 0
        self.unmatched = 0
        self.outdated = 0
        self.classes: int | None = None  # that the model knows, once it has answered
        self._used: list[str] = []  # ids that were labelled since all answers were written
        self.restart()

    def __len__(self) -> int:
        return len(self._answered)

    @property
    def count(self) -> int:
        """Labels of this stage's own items."""
        return self._evidence.count

    @property
    def evidence(self) -> float:
        """Log e-value now against "worse by the margin or more".

        The largest so far would be enough for the test, but not for a promotion: harm may have begun since.
        """
        return self._evidence.log_value

    @property
    def against(self) -> float:
        """Log e-value now against "worse by the margin at most"."""
        return self._against.log_value

    @property
    def long(self) -> bool:
        """Whether it is time to write all answers anew, because many were labelled since."""
        return len(self._used) >= _LONG

    def is_class(self, label: int) -> bool:
        """Whether the model may give this class."""
        return label >= 0 and (self.classes is None or label < self.classes)

    def remember(
        self, ids: Iterable[Id], adapted: Sequence[int], source: Sequence[int], era: int, visit: int, moment: int
    ) -> None:
        """Keep what both models answered to these items; an id that comes again stands for its last item."""
        for id_, ours, theirs in zip(ids, adapted, source, strict=True):
            key = str(id_)
            self._answered[key] = Answered(ours, theirs, era, visit, moment)
            self._answered.move_to_end(key)
        while len(self._answered) > self._remember:
            self._answered.popitem(last=False)

    def match(self, id: Id) -> Answered | None:  # noqa: A002 (the word that the user writes)
        """What was answered to an item, once; None if it is unknown, forgotten, labelled already or had one answer."""
        found = self._answered.pop(str(id), None)
        if found is None:
            self.unmatched += 1
        else:
            self.matched += 1
            self._used.append(str(id))
        return found

    def weigh(self, adapted_wrong: bool, source_wrong: bool) -> None:
        """Take in a label of this stage."""
        self._evidence.update((1 - adapted_wrong + source_wrong) / 2)
        self._against.update((1 + adapted_wrong - source_wrong) / 2)

    def restart(self) -> None:
        """Another stage: its labels speak for themselves."""
        self._evidence = EProcess((1 - self._margin) / 2, grid=_BETS)
        self._against = EProcess((1 + self._margin) / 2, grid=_BETS)

    def to_dict(self, *, answered: bool) -> dict[str, Any]:
        """Plain data: with what was answered, which may be long, or with the ids labelled since that was written."""
        state: dict[str, Any] = {
            "matched": self.matched,
            "unmatched": self.unmatched,
            "outdated": self.outdated,
            "evidence": self._evidence.to_dict(),
            "against": self._against.to_dict(),
            "classes": self.classes,
        }
        if answered:
            self._used = []
            return state | {"answered": [[key, *value] for key, value in self._answered.items()]}
        return state | {"used": list(self._used)}

    def from_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` described."""
        self.matched, self.unmatched = int(state["matched"]), int(state["unmatched"])
        self.outdated = int(state["outdated"])
        self._evidence = EProcess.from_dict(state["evidence"])
        if "against" in state:  # an earlier version did not say
            self._against = EProcess.from_dict(state["against"])
            self.classes = None if state["classes"] is None else int(state["classes"])
        self._used = [str(key) for key in state.get("used", ())]
        used = set(self._used)
        for key, *values in state.get("answered", ()):
            if key not in used:
                self._answered[key] = Answered(*map(int, values))


def as_class(label: object) -> int | None:
    """A label as the number of a class; None if it is none."""
    if isinstance(label, torch.Tensor):
        label = label.item() if label.numel() == 1 else None
    elif hasattr(label, "item") and getattr(label, "ndim", None) == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
        return None
    return int(label)
