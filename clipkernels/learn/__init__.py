"""Small modules trained on a frozen CLIP (few-shot heads, patch ranking, distillation), and recovery of a tower."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from clipkernels.learn.recovery import recover

__all__ = ["recover"]


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module 'clipkernels.learn' has no attribute {name!r}")
    from clipkernels.learn import recovery

    globals()[name] = recovery.recover
    return recovery.recover
