"""The rows of a tower that a language model gets: every token once, at the position of its patch; NaN in the others.

NaN marks a row that is not passed on. It goes through the modules after the blocks by `marked_rows`, so that the host's
own code returns as many rows as before, and whatever bypasses the hand-over fails loudly. The modules compute zeros in
place of NaN, because 0·NaN would spoil the gradients of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.block import Ranking
from clipkernels.reference.precision import upcast
from clipkernels.reference.ranking import rows_at, strongest_first

NAN = float("nan")


class Marks(NamedTuple):
    """The marks that a patched tower sets.

    choice: the method that chooses among the patches of a tower that stays whole, a `Select`; None for a method whose
        steps choose.
    cell: side in patches of the square that becomes one image token.
    after: the choice is made after the tower, from its ranking.
    """

    choice: Any = None
    cell: int = 1
    after: bool = False


class Choice(NamedTuple):
    """The slots of an image that go on, and the slots that are averaged.

    dominant: slots (B,k) that go on as they are.
    contextual: slots (B,m) that go on as the mean of their group.
    shares: share (B,m,S) of each slot in the mean of each group; None if m = 0.
    """

    dominant: Tensor
    contextual: Tensor
    shares: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """Rows (B,S,…) with NaN in those that do not go on, and the means in those of groups."""
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        chosen = torch.cat([self.dominant, self.contextual], 1)
        goes_on = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        goes_on = goes_on.index_put((batch, chosen), torch.ones_like(chosen, dtype=torch.bool))
        marked = torch.where(goes_on.view(*x.shape[:2], *[1] * (x.ndim - 2)), x, NAN)
        if self.shares is None:
            return marked
        means = (self.shares.to(upcast(x).dtype) @ upcast(x).flatten(2)).unflatten(2, x.shape[2:])
        return marked.index_put((batch, self.contextual), means.to(x.dtype))


def choose_slots(ranking: Ranking, dominant: int, contextual: int) -> Choice:
    """The choice of the slots with the best scores, and of groups among the others.

    Args:
        ranking: scores (B,S) and keys (B,S,D).
        dominant: number of slots that go on as they are, ties to the lower index.
        contextual: number of groups. Their slots are spread evenly over the remaining ones; each other slot joins the
            group whose slot has the most similar key, by cosine, ties to the first.
    """
    slots = ranking.scores.shape[1]
    order = strongest_first(ranking.scores)
    best, rest = order[:, :dominant].sort(-1).values, order[:, dominant:].sort(-1).values
    if not contextual:
        return Choice(best, best[:, :0], None)
    # Evenly by integers: the same on every device.
    spread = torch.arange(contextual, device=rest.device) * rest.shape[1] // contextual
    keys = normalize(upcast(rows_at(ranking.keys, rest)), dim=-1)
    group = (keys @ keys[:, spread].mT).nan_to_num(-2).argmax(-1)
    group = group.index_copy(1, spread, torch.arange(contextual, device=rest.device).expand(group.shape[0], -1))
    members = torch.nn.functional.one_hot(group, contextual).mT.to(keys.dtype)
    shares = torch.zeros(*members.shape[:2], slots, dtype=keys.dtype, device=keys.device)
    shares = shares.scatter(2, rest[:, None].expand_as(members), members / members.sum(2, keepdim=True))
    return Choice(best, rest[:, spread], shares)


def choose(marks: Marks, ranking: Ranking, prefix: int, tokens: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tokens (B,N,C), after the last block and after others, with the marks of one choice among the cells."""
    scores, keys = cells_of(ranking.scores[..., None], marks.cell), cells_of(ranking.keys, marks.cell)
    choice = choose_slots(Ranking(scores.mean((2, 3)), keys.mean(2)), *marks.choice.counts(scores.shape[1]))
    last, *others = (
        torch.cat([x[:, :prefix], patches_of(choice.apply(cells_of(x[:, prefix:], marks.cell)), marks.cell)], 1)
        for x in tokens
    )
    return last, others


def cells_of(x: Tensor, cell: int) -> Tensor:
    """Patches (B,P,C) as cells (B,S,cell²,C), of a square grid if a cell has several.

    Raises:
        ValueError: cells do not fill the grid.
    """
    if cell == 1:
        return x[:, :, None]
    side = round(x.shape[1] ** 0.5) // cell
    if (side * cell) ** 2 != x.shape[1]:
        raise ValueError(
            f"expected a square grid that squares of {cell} × {cell} patches fill, got {x.shape[1]} patches: resize "
            "the images"
        )
    return x.unflatten(1, (side, cell, side, cell)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def patches_of(x: Tensor, cell: int) -> Tensor:
    """Cells (B,S,cell²,C) as patches (B,P,C), which undoes `cells_of`."""
    if cell == 1:
        return x[:, :, 0]
    side = round(x.shape[1] ** 0.5)
    return x.unflatten(2, (cell, cell)).unflatten(1, (side, side)).transpose(2, 3).flatten(1, 4)


def place_rows(x: Tensor, position: Tensor, prefix: int, tokens: int) -> Tensor:
    """Rows (B,prefix+n,C) as (B,tokens,C), each at the position (B,n) of its patch, NaN at the other positions."""
    places = x.new_full((x.shape[0], tokens - prefix, x.shape[2]), NAN)
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.cat([x[:, :prefix], places.index_put((batch, position), x[:, prefix:])], 1)


def unmerge(x: Tensor, sources: list[Tensor], prefix: int) -> Tensor:
    """Tokens (B,N,C) with every patch at its position: a copy of the row that holds it, zeros if it is gone."""
    if not sources:
        return x
    source = sources[-1]
    patches = x[torch.arange(x.shape[0], device=x.device)[:, None], source.clamp_min(0)]
    patches = patches.masked_fill((source < 0)[..., None], 0)
    return torch.cat([x[:, :prefix], patches], 1)


def marked_rows(base: Any, cell: int) -> dict[str, Any]:
    """The layer of a module after the blocks that passes marks on; `cell` patches in each direction become one row."""

    @wraps(base.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        marked = x.isnan().any(-1, keepdim=True)  # of several layers in a row, the last may have fewer tokens
        y = base.forward(self, x.masked_fill(marked, 0), *args, **kwargs)
        if cell > 1:
            marked = cells_of(marked, cell).any(2)
        return y.masked_fill(marked, NAN)

    return {"forward": forward}
