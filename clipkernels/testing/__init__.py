"""Error budgets, towers with random weights and operation cases, shared by tests, bench/ and `clipkernels check`."""

from clipkernels.testing.budget import (
    GuardedAllocations,
    assert_same,
    assert_within_budget,
    budget,
    exact_interpreter_dot,
    with_gaps,
)
from clipkernels.testing.towers import (
    method_id,
    open_clip_tower,
    openai_tower,
    patch_ranking,
    patched_with,
    randomized,
    timm_tower,
    transformers_tower,
)

__all__ = [
    "assert_same",
    "assert_within_budget",
    "budget",
    "patched_with",
    "GuardedAllocations",
    "method_id",
    "open_clip_tower",
    "openai_tower",
    "patch_ranking",
    "exact_interpreter_dot",
    "randomized",
    "with_gaps",
    "timm_tower",
    "transformers_tower",
]
