"""A table that never grows: rows come in, columns of means stay, and neighbours merge when it is full."""

from __future__ import annotations

import numpy as np

from normadapt.reports.history import Numbers


class Columns:
    """Means of what was added, in at most `most` columns, the last of which may still be open.

    Args:
        width: Numbers a row.
        most: Columns, even.
    """

    def __init__(self, width: int, most: int) -> None:
        self.most = most
        self.stride = 1  # rows of a full column
        self.count = 0
        self.rows = np.zeros(most)
        self.items = np.zeros(most)
        self.times = np.zeros(most)
        self._sums = np.zeros((width, most))
        self._known = np.zeros((width, most))

    def add(self, row: Numbers, time: float, items: float) -> None:
        """One more row; NaN in it stands for not known."""
        if self.count == 0 or self.rows[self.count - 1] >= self.stride:
            if self.count == self.most:
                self._merge()
                self.add(row, time, items)
                return
            self.times[self.count] = time
            self.count += 1
        self._put(self.count - 1, row, 1.0, items)

    def append(self, row: Numbers, time: float, items: float, rows: float) -> None:
        """A column from elsewhere, of so many rows."""
        if self.count == self.most:
            self._merge()
        self.times[self.count] = time
        self.count += 1
        self._put(self.count - 1, row, rows, items)
        while self.stride < rows:
            self.stride *= 2

    def _put(self, place: int, row: Numbers, rows: float, items: float) -> None:
        known = np.isfinite(row)
        self._sums[:, place] += np.where(known, row, 0.0) * rows
        self._known[:, place] += known * rows
        self.rows[place] += rows
        self.items[place] += items

    def _merge(self) -> None:
        half = self.most // 2
        for name in ("rows", "items", "_sums", "_known"):
            values = getattr(self, name)
            merged = np.zeros_like(values)
            merged[..., :half] = values[..., 0::2] + values[..., 1::2]
            setattr(self, name, merged)
        self.times[:half] = self.times[0::2].copy()
        self.count, self.stride = half, 2 * self.stride

    def means(self) -> Numbers:
        """The columns so far (width, T)."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self._sums[:, : self.count] / self._known[:, : self.count])
