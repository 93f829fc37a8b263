"""`Dense`: no reduction."""

from __future__ import annotations

from dataclasses import dataclass

from clipkernels.methods.counts import check_sequence
from clipkernels.plan import Plan


@dataclass(frozen=True)
class Dense:
    """No reduction: the output of the host tower, computed faster.

    Query, key and value come from one packed projection. If only CLS is pooled, the last block computes its query,
    projection and MLP for the CLS row only.

    Guarantees: the host's output and gradients up to rounding; no token is dropped, merged or reordered.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        check_sequence(tokens, blocks, prefix)
        return Plan((None,) * blocks, tokens, prefix)
