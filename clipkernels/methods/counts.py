"""Numbers of tokens: their check, their rounding to a multiple, and the warning about a shortfall."""

from __future__ import annotations

from clipkernels.arguments import check_int
from clipkernels.messages import quantity
from clipkernels.plan import Plan


def check_sequence(tokens: int, blocks: int, prefix: int) -> None:
    """Raise ValueError unless a plan can be made for these numbers of tokens, blocks and prefix tokens."""
    check_int("blocks", blocks, 0, 2**16, "2¹⁶")
    check_int("prefix", prefix, 0, 2**31, "2³¹")
    check_int("tokens", tokens, prefix, 2**31, "2³¹")


def round_up(keep: int, others: int, most: int, multiple: int) -> int:
    """The least count ≥ keep for which count + others is a multiple; `keep` if that exceeds `most`."""
    count = keep + -(keep + others) % multiple
    return count if count <= most else keep


def shortfall_message(method: str, plan: Plan, reduces: bool, multiple: int) -> str | None:
    """A sentence if a plan removes no token although its method reduces, or misses a multiple; else None."""
    if reduces and not any(plan.steps):
        return f"{method} removes none of {quantity(plan.entry, 'token')}: there are too few patches for this share"
    counts = [after for step, (_, after) in zip(plan.steps, plan.passes, strict=True) if step]
    missed = [count for count in counts if count % multiple]
    if not missed:
        return None
    remaining = quantity(missed[0], "token")
    return f"{method} leaves {remaining}, no multiple of {multiple}: there are too few patches to keep more"
