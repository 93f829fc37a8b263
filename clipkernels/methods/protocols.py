"""The protocols of a method, and of the trained modules that a method may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from clipkernels.plan import Plan

if TYPE_CHECKING:
    from clipkernels.adapters import Tower


class Predictor(Protocol):
    """A trained ranking of the patches that enter one block, such as `learn.patch_ranking.RankPredictor`.

    block: zero-based index of the block; the ranking runs before its attention.
    tokens, prefix: the number of tokens, and of leading tokens that are not patches, that it is trained for.
    macs: multiply-accumulates for one image.
    """

    block: int
    tokens: int
    prefix: int

    @property
    def macs(self) -> int: ...

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless the predictor is for this tower."""


class LearntTokens(Protocol):
    """Tokens trained to join the patches, such as `learn.patch_ranking.VisualTokens`.

    count: number of learnt tokens per block.
    """

    count: int

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless the tokens are for this tower."""


class Method(Protocol):
    """Anything hashable with a `plan`; a new method needs nothing else.

    A method with weights also has `weights()`, which returns the modules that `tower.run` takes by name, `predictor`
    and `learnt`, and `check_tower(tower)`, which raises ValueError if they were made for another tower.

    A method may have `shortfall(plan)`, which returns a sentence if a plan of its own does less than was asked for, or
    None. `ck.patch` warns with it.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter.

        No step may touch the first `prefix` tokens.
        """
