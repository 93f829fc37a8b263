"""Budgets: what a reduced tower must keep and what it may cost, as text such as "recall@1>=.99, speedup>=1.5"."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

from clipkernels.arguments import describe

Name = Literal["recall", "text_recall", "cosine_p1", "cosine_mean", "accuracy_drop", "speedup", "gmacs"]
Direction = Literal[">=", "<="]

MAX_NEAREST = 1 << 20
TERM = re.compile(r"([a-z_0-9]+)(?:@(\d+))?\s*(>=|<=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)


class Rule(NamedTuple):
    """The form of a constraint.

    example: a term of it, which messages show.
    direction: the only comparison that it has.
    low, high: range of its bound, `high` included.
    least: `low` is included too.
    ranked: it has a number of nearest images, after an @.
    quality: it is about embeddings, not about cost.
    """

    example: str
    direction: Direction
    low: float
    high: float
    least: bool = False
    ranked: bool = False
    quality: bool = True


RULES: dict[str, Rule] = {
    "recall": Rule("recall@1>=0.99", ">=", 0, 1, ranked=True),
    "text_recall": Rule("text_recall@10>=0.8", ">=", 0, 1, ranked=True),
    "cosine_p1": Rule("cosine_p1>=0.98", ">=", 0, 1),
    "cosine_mean": Rule("cosine_mean>=0.99", ">=", 0, 1),
    "accuracy_drop": Rule("accuracy_drop<=0.005", "<=", 0, 1, least=True),
    "speedup": Rule("speedup>=1.5", ">=", 1, 1e6, least=True, quality=False),
    "gmacs": Rule("gmacs<=11", "<=", 0, 1e9, quality=False),
}
KNOWN = ", ".join(rule.example for rule in RULES.values())


class Constraint(NamedTuple):
    """One term of a budget.

    name: the figure.
    k: number of nearest images of a recall, or None.
    bound: the least value of the figure, or the greatest if its direction is "<=".
    """

    name: Name
    k: int | None
    bound: float

    @property
    def direction(self) -> Direction:
        """The comparison of the figure with the bound."""
        return RULES[self.name].direction

    @property
    def is_quality(self) -> bool:
        """True if the figure is about embeddings."""
        return RULES[self.name].quality

    @property
    def is_cost(self) -> bool:
        """True if the figure is about time or operations."""
        return not self.is_quality

    @property
    def figure_name(self) -> str:
        """The name with its number of nearest images: "recall@1"."""
        return self.name if self.k is None else f"{self.name}@{self.k}"

    @property
    def text(self) -> str:
        """The term as `parse_budget` reads it: "recall@1>=0.99"."""
        return f"{self.figure_name}{self.direction}{self.bound:.12g}"


def parse_budget(text: str) -> tuple[Constraint, ...]:
    """The constraints of a budget, in the order of the text; a plan must keep all of them.

    Args:
        text: terms separated by commas. Shares, cosines and drops are fractions, a speed-up is a factor.
    Raises:
        TypeError: no text.
        ValueError: an unknown figure, a comparison in the wrong direction, a percentage, a bound out of range, or a
            figure that occurs twice. The message names the term.
    """
    if not isinstance(text, str):
        raise TypeError(f"budget must be text such as {RULES['recall'].example!r}, got {describe(text)}")
    if not text.strip():
        raise ValueError(f"expected a budget of one or more of {KNOWN}, got an empty one: name a figure and its bound")
    constraints: dict[str, Constraint] = {}
    for term in text.split(","):
        constraint = _parse_term(term.strip())
        if constraint.figure_name in constraints:
            raise ValueError(
                f"expected {constraint.figure_name} once in a budget, got it twice: keep the stricter bound"
            )
        constraints[constraint.figure_name] = constraint
    return tuple(constraints.values())


def _parse_term(term: str) -> Constraint:
    """The constraint of one term; raises ValueError, which names the term."""
    shown = describe(term)
    if not term:
        raise ValueError(f"expected one of {KNOWN} between commas, got nothing: remove a comma")
    word = re.match(r"[a-z_0-9]*", term, re.IGNORECASE)
    name = word[0].lower() if word else ""
    if name not in RULES:
        raise ValueError(f"expected one of {KNOWN}, got {shown}: use one of these names")
    rule = RULES[name]
    if term.endswith("%"):
        raise ValueError(f"expected a fraction as in {rule.example}, got {shown}: divide the percentage by 100")
    match = TERM.fullmatch(term)
    if match is None:
        raise ValueError(
            f"expected a term such as {rule.example}, got {shown}: write {name}{rule.direction} and a number"
        )
    _, rank, direction, number = match.groups()
    if rule.ranked and (rank is None or len(rank) > 7 or not 1 <= int(rank) <= MAX_NEAREST):
        raise ValueError(
            f"expected {name}@K with K from 1 to {MAX_NEAREST}, got {shown}: say how many nearest images count, as in "
            f"{rule.example}"
        )
    if not rule.ranked and rank is not None:
        raise ValueError(f"expected {name} without @{rank:.7}, got {shown}: write {rule.example}")
    if direction != rule.direction:
        raise ValueError(f"expected {name}{rule.direction}…, got {shown}: a budget bounds {name} from the other side")
    bound = float(number)
    if not (rule.low < bound <= rule.high or (rule.least and bound == rule.low)):
        advice = "give a fraction, such as 0.99 for 99 %" if rule.high == 1 else f"write it as in {rule.example}"
        raise ValueError(
            f"expected a bound of {name} in {'[' if rule.least else '('}{rule.low:g}, {rule.high:g}], got {shown}: "
            f"{advice}"
        )
    return Constraint(cast(Name, name), int(rank) if rank is not None else None, bound)
