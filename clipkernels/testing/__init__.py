"""Error budgets, towers with random weights and operation cases, shared by tests, benches and `clipkernels check`."""

from clipkernels.testing.budget import assert_within_budget, budget, guarded, placeless, strided
from clipkernels.testing.towers import (
    given_to,
    named,
    open_clip_tower,
    openai_tower,
    patch_ranking,
    randomized,
    timm_tower,
    transformers_tower,
)

__all__ = [
    "assert_within_budget",
    "budget",
    "given_to",
    "guarded",
    "named",
    "open_clip_tower",
    "openai_tower",
    "patch_ranking",
    "placeless",
    "randomized",
    "strided",
    "timm_tower",
    "transformers_tower",
]
