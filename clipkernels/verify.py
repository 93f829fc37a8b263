"""Check, before a tower is patched, that its blocks compute what their parts compute."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from clipkernels import block
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.blocks import refuse
from clipkernels.adapters.modules import is_forward_replaced
from clipkernels.backend import choose, use_kernels
from clipkernels.block import TokenState


def verify(tower: Tower) -> None:
    """Raise UnsupportedTower unless each kind of block computes the same through its parts as by its own forward."""
    for module in tower.owner.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedTower(f"expected modules in Python, got the ScriptModule {type(module).__name__}")
    refuse_replaced(tower)
    kinds: dict[tuple[type, ...], tuple[int, nn.Module]] = {}
    for index, host in enumerate(tower.blocks):
        refuse(tower, host, index)
        kinds.setdefault(tuple(type(module) for module in host.modules()), (index, host))
    if tower.like.is_meta:
        warnings.warn("the model is on the meta device, its blocks could not be verified", stacklevel=3)
        return
    for index, host in kinds.values():
        _probe(tower, host, index)


def _probe(tower: Tower, host: nn.Module, index: int) -> None:
    """Compare the residual of a block's own forward with that of its parts, in fp32 on random input.

    Raises:
        UnsupportedTower: the two differ, or the parts do not run.
    """
    # A copy without hooks, because the probe must leave the model, its hooks and its mode unchanged.
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(vars(m)[name]): OrderedDict() for m in host.modules() for name in hooks}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, min(tower.num_tokens, 17), tower.width, generator=generator, device="cpu").to(tower.like.device)
    try:
        probe = copy.deepcopy(host, memo).float().eval()
        rope = tower.rope_like(host, x.shape[1] - tower.prefix)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            expected = tower.run_block(probe, x, rope) - x
            # A requested backend that cannot run here is only a warning: the model may move to a device where it can.
            choose("auto", x.device, x.dtype, "attention")
    except Exception as error:  # any error of a module that cannot be copied or run in fp32
        warnings.warn(f"block {index} could not be verified: {error}", stacklevel=4)
        return
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            parts = tower.parts(probe)
            output = block.forward(parts, TokenState(x, rope=rope), None, tower.prefix, fused=use_kernels(x))
            actual = output.state.x - x
    except Exception as error:  # the parts differ from the modules that they are named after
        raise UnsupportedTower(f"block {index}: its own forward runs, its parts do not: {error}") from error
    if not expected.isfinite().all():
        warnings.warn("the model's weights are not finite, its blocks could not be verified", stacklevel=4)
        return
    difference, scale = (actual - expected).abs().max(), expected.abs().max()
    # 2e-3 leaves room for TF32. A residual much smaller than x carries the rounding error of x.
    if difference > 2e-3 * scale + 8 * torch.finfo(x.dtype).eps * x.abs().max():
        raise UnsupportedTower(
            f"block {index}: expected a plain attention block, got {type(host).__name__}, whose residual differs from "
            f"that of its parts by a relative {difference / scale:.1e}"
        )


def refuse_replaced(tower: Tower) -> None:
    """Raise UnsupportedTower if the owner's forward is not its class's."""
    # The patched loop replaces only the class's forward and would bypass another one.
    if is_forward_replaced(tower.owner):
        raise UnsupportedTower(f"the forward of {type(tower.owner).__name__} was replaced: patch the model first")
