"""The blocks of a schedule: their check, and the default ones of a depth."""

from __future__ import annotations

from collections.abc import Sequence

from clipkernels.arguments import check_int, describe, is_list
from clipkernels.messages import quantity


def resolve_blocks(blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The zero-based blocks of a schedule on a tower of `depth` blocks, ascending; None is the default schedule.

    Raises:
        ValueError: a block that the tower does not have.
    """
    if blocks is None:
        return (3, 6, 9) if depth >= 10 else tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < depth:
            raise ValueError(
                f"blocks must be ints in [0, {depth - 1}] on a tower of {quantity(depth, 'block')}, got {block!r}"
            )
    return tuple(sorted(set(blocks)))


def normalize_blocks(blocks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Blocks as a tuple, or None; raise ValueError unless they are a sequence of ints of at least 0."""
    if blocks is None:
        return None
    if not is_list(blocks):
        raise ValueError(f"blocks must be a tuple of ints such as (3, 6, 9), got {describe(blocks)}")
    for place, block in enumerate(blocks):
        check_int(f"blocks[{place}]", block, 0)
    return tuple(blocks)
