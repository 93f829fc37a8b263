"""The row of a measurement to take: the fastest that keeps enough nearest neighbours, or a dense one, with the reason.

A row qualifies if it is faster than the fastest dense row in nine rounds of ten, its embeddings are finite, and the
95 % interval of its share of images with the same nearest other image lies above a bound. The interval is Wilson's,
so that few images never qualify a row: ten images that all agree leave a share of 72 % possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from clipkernels.comparison.towers import EAGER, Row

MIN_AGREEMENT = 0.9
NORMAL_97_5 = 1.959964
"""The quantile of the normal distribution that leaves 2.5 % on either side."""


class Choice(NamedTuple):
    """The row to take in one precision, and the sentences that say why.

    method, mode: of the row, as in `Row`.
    """

    precision: str
    method: str
    mode: str
    min_agreement: float
    reason: str

    def record(self) -> dict[str, Any]:
        """Return the choice as plain values."""
        return self._asdict()


def choose(rows: Sequence[Row], images: int, min_agreement: float, meaningless: str | None = None) -> Choice:
    """Return the row to take of the rows of one precision.

    Args:
        rows: all rows of one precision, at least one of them dense.
        images: the number of images that they were compared on.
        min_agreement: least share, in [0, 1), of images whose nearest other image stays the same.
        meaningless: the reason why neighbours say nothing here, such as random weights; None if they do.
    """
    row, reason = _decide(rows, images, min_agreement, meaningless)
    return Choice(
        row.precision, row.method, row.mode, min_agreement, f"{row.precision}: take {name_of(row, rows)}{reason}"
    )


def _decide(rows: Sequence[Row], images: int, min_agreement: float, meaningless: str | None) -> tuple[Row, str]:
    """Return the row to take and the end of a sentence that says why."""
    dense = next(row for row in rows if row.speed.name == row.speed.baseline)
    reduced = [row for row in rows if len(set(row.speed.tokens)) > 1]
    faster = [row for row in reduced if row.speed.speedup.low > 1]
    kept = f"keep the nearest other image of {100 * min_agreement:g} % of images"
    if not reduced:
        return dense, ", the fastest row: no method that reduces tokens was measured."
    if not faster:
        best = max(reduced, key=lambda row: row.speed.speedup.median)
        return (
            dense,
            f": no method is faster in nine rounds of ten. {name_of(best, rows)} comes closest: {_speed(best)}.",
        )
    if meaningless is not None:
        return dense, f": {meaningless}, so neighbours say nothing about the cost of a faster method."
    if images < 2:
        return dense, ": a single image has no neighbours, which would show the cost of a faster method."
    needed = math.ceil(min_agreement * NORMAL_97_5**2 / (1 - min_agreement))
    if images < needed:
        return dense, f": {images} images cannot show that a faster method would {kept}; it takes at least {needed}."
    surest = max(faster, key=lambda row: (row.fidelity.finite, _least(row, images)))
    fit = [row for row in faster if row.fidelity.finite and _least(row, images) >= min_agreement]
    if not fit:
        closest = f"{name_of(surest, rows)} comes closest: {_figures(surest, images)}."
        return dense, f": no faster method is sure to {kept}. {closest}"
    best = max(fit, key=lambda row: row.speed.speedup.median)
    figures = f"{_figures(best, images)}, speed-up {_speed(best)}"
    return best, f", the fastest that is sure to {kept}: {figures}. In a larger collection it keeps fewer."


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, of which `successes` of `trials` were observed.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    share, square = successes / trials, NORMAL_97_5**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = NORMAL_97_5 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def name_of(row: Row, rows: Sequence[Row]) -> str:
    """Return the name of a row: the method, and the mode if any of the rows is compiled."""
    compiled = any(other.mode != EAGER for other in rows)
    return f"{row.method}, {row.mode}" if compiled else row.method


def _same(row: Row, images: int) -> int:
    """Return the number of images whose nearest other image is the same."""
    return round((row.fidelity.agreement or 0.0) * images)


def _least(row: Row, images: int) -> float:
    """Return the lower end of the 95 % interval of the share of images whose nearest other image is the same."""
    return interval(_same(row, images), images)[0]


def _figures(row: Row, images: int) -> str:
    same = _same(row, images)
    low, high = (100 * end for end in interval(same, images))
    share = f"{same} of {images} (95 % interval {low:.1f} to {high:.1f} %), mean cosine {row.fidelity.cosine[1]:.4f}"
    return share if row.fidelity.finite else f"{share}, with embeddings that are not finite"


def _speed(row: Row) -> str:
    speedup = row.speed.speedup
    return f"×{speedup.median:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"
