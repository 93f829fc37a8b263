"""The configuration of a patched tower, in the `__dict__` of the module that runs its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn

from clipkernels.adapters.blocks import BlockCache
from clipkernels.marks import Marks
from clipkernels.methods import Method
from clipkernels.plan import Plan

SLOT = "_clipkernels"


class WeakModule:
    """A weak reference to a module that survives copies and pickles.

    An owner refers to its tower by it, because a cycle would keep a deleted model alive.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.ref = (lambda: None) if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakModule:
        module = self.ref()
        return self if module is None else type(self)(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakModule, (self.ref(),)


class WeakContainer(WeakModule):
    """A weak reference to a module around the tower, which a pickle of the tower alone leaves out.

    The container sets it again when it is unpickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakContainer, (None,)


class Slot(NamedTuple):
    """The configuration in the `__dict__` of a patched owner.

    method: the method that it runs.
    weights: the modules of the method, by their parameter names in `run`.
    plan: the plan for the tower's usual number of tokens.
    pool: `pool_of` the tower when the plan was made.
    attention: the host's choice of an attention implementation when the tower was patched, or None.
    tower: the class of the adapter.
    root: the whole image tower, which contains the owner.
    cache: the blocks as the last forward read them.
    marks: the marks of a hand-over, or None.
    container: the module that hands the tower's tokens over to a language model.
    """

    method: Method
    weights: Mapping[str, nn.Module]
    plan: Plan
    pool: tuple[bool, bool]
    attention: str | None
    tower: Any
    root: WeakModule
    cache: BlockCache
    marks: Marks | None = None
    container: WeakContainer = WeakContainer(None)

    def modules(self) -> Mapping[str, nn.Module]:
        """The modules of the method that a forward runs with."""
        if not torch.jit.is_tracing():
            return self.weights
        # They are no part of the traced module, so the trace holds them as constants, which must need no gradient.
        return {name: deepcopy(module).requires_grad_(False) for name, module in self.weights.items()}
