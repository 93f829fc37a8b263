"""The blocks of a patched tower: read once, and read again when one of them changes.

Reading a block finds out if it is supported, if it has hooks, and which of its modules need not be called. This depends
on the class, the attributes, the parameters, the submodules and the hooks of every module in it. Reading all blocks in
every forward takes a tenth of the host's time at batch 1; comparing what the reading depends on takes a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from clipkernels.adapters.hooks import KINDS, fires_hooks, has_global_hooks, has_hooks
from clipkernels.adapters.protocols import Tower, UnsupportedTower


class Blocks(NamedTuple):
    """Blocks in order, the parts of each, and for each true if it has hooks that a tower calls."""

    hosts: list[nn.Module]
    parts: list[Any]
    hooked: list[bool]


class _State(NamedTuple):
    """The state of blocks that their parts depend on.

    modules: the container and every module of the blocks.
    classes: their classes.
    forwards: the forward of each distinct class.
    dicts: the attributes, parameters and submodules of each module.
    copies: the same as they were when the blocks were read.
    hooks: the hooks of each module.
    """

    modules: list[nn.Module]
    classes: list[type]
    forwards: dict[Any, Any]
    dicts: list[dict[str, Any]]
    copies: list[dict[str, Any]]
    hooks: list[dict[int, Any]]

    def is_current(self) -> bool:
        """Return true if nothing has changed and there is no hook."""
        if any(self.hooks) or has_global_hooks() or list(map(type, self.modules)) != self.classes:
            return False
        try:
            # Equal means identical for all but numbers and texts: a comparison of two tensors is an error, or a sync.
            same = self.dicts == self.copies
        except Exception:  # whatever the attributes of a module raise
            return False
        return same and all(kind.forward is forward for kind, forward in self.forwards.items())


class BlockCache:
    """The blocks that a patched tower ran last. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._last: tuple[Blocks, _State, int | None] | None = None

    def read(self, tower: Tower, hosts: list[nn.Module], width: int | None = None) -> Blocks:
        """Read the blocks of a tower, or return the last reading if none of them has changed. See `read_blocks`."""
        # A compiler would guard every attribute, and a replica of DataParallel lives for one forward.
        if torch.compiler.is_compiling() or "_is_replica" in tower.owner.__dict__:
            return read_blocks(tower, hosts, width=width)
        last = self._last
        if last is not None and last[0].hosts == hosts and width in (None, last[2]) and last[1].is_current():
            return last[0]
        state = _state_of(tower, hosts)
        blocks = read_blocks(tower, hosts, width=width)
        # Parts that were read beside hooks may differ when the hooks are gone. A parametrized weight is computed anew
        # at every access, from others that change in place.
        fleeting = any(state.hooks) or has_global_hooks() or any(map(is_parametrized, state.modules))
        self._last = None if fleeting else (blocks, state, width)
        return blocks

    def clear(self) -> None:
        """Forget the blocks, and with them the parameters that they had."""
        self._last = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, ()


def read_blocks(tower: Tower, hosts: list[nn.Module], first: int = 0, width: int | None = None) -> Blocks:
    """Read the blocks `hosts` of a tower from index `first` on.

    Args:
        tower: the tower.
        hosts: its blocks.
        first: index of the first block to check.
        width: channels of the tokens whose norms are computed by kernels, which do not check them again; None for none.
    Raises:
        UnsupportedTower: a block's parts would skip something that its own forward does, or its norms have another
            width.
    """
    for index in range(first, len(hosts)):
        refuse(tower, hosts[index], index)
    parts = [tower.parts(host) for host in hosts]
    for index, part in enumerate(parts if width is not None else ()):
        for norm in (part.norm1, part.norm2):
            if norm is not None and norm[0].shape[0] != width:
                raise UnsupportedTower(f"block {index}: expected norms of width {width}, got {norm[0].shape[0]}")
    return Blocks(hosts, parts, [has_hooks(host) and fires_hooks(tower, host) for host in hosts])


def refuse(tower: Tower, host: nn.Module, index: int) -> None:
    """Raise UnsupportedTower if a block's parts would skip something that its own forward does."""
    reason = tower.unsupported_reason(host)
    if reason is not None:
        alike = [at for at, other in enumerate(tower.blocks) if tower.unsupported_reason(other) == reason]
        others = ", ".join(str(at) for at in alike if at != index)
        raise UnsupportedTower(f"block {index}{f' (and {others})' if others else ''}: {reason}")


def _state_of(tower: Tower, hosts: Sequence[nn.Module]) -> _State:
    """The present state of blocks and of their container."""
    blocks: Any = tower.blocks
    modules = [blocks] if isinstance(blocks, nn.Module) else []
    modules += [module for host in hosts for module in host.modules()]
    dicts = [part for module in modules for part in (vars(module), module._parameters, module._modules)]
    classes: list[Any] = list(map(type, modules))
    forwards = {kind: kind.forward for kind in classes}
    hooks = [getattr(module, f"_{kind}_hooks") for module in modules for kind in KINDS]
    return _State(modules, classes, forwards, dicts, [dict(part) for part in dicts], hooks)
